"""The application: every page of the viewer as a route.

Which question it answers: *which page is meant, and what stands on it?* Place in the flow: over everything else of
`view/`; `serve.py` runs it, and so may any server that knows ASGI, below any path. All state is that of one call of
`application`.
"""

from collections.abc import Callable, Collection, Iterator
from importlib import resources
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route

from polyray.errors import PolyrayError, nearest
from polyray.report.catalog import Catalog
from polyray.report.headline import CONTROLS
from polyray.report.plain import network_name
from polyray.report.summary import AUROC_AGAINST
from polyray.view import asked, export, language, layers, neuron, neurons, trying, words
from polyray.view.asked import PAGE_SIZES, Asked, RefusedError
from polyray.view.columns import STATUSES
from polyray.view.guard import HEADERS, Guard
from polyray.view.index import Index
from polyray.view.site import Site

if TYPE_CHECKING:
    from polyray.view.pictures import Pictures

N_FOUND = 50
"""Clusters on a page of the search."""
_SEARCHED = ("any", "name", "label")
_MOST = 2**31 - 1
_TYPES = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


class MissingError(PolyrayError):
    """An address names what is not there."""


def application(
    catalog: Catalog,
    *,
    hosts: Collection[str] | None = None,
    pictures: "Pictures | None" = None,
    trier: trying.Trying | None = None,
) -> Starlette:
    """The viewer of a dataset as an ASGI application.

    Args:
        catalog: the dataset.
        hosts: Host headers that are answered, such as `127.0.0.1:7870`; None: any, where something in front of the
            application decides that.
        pictures: probe images, where they may be shown.
        trier: who tries swaps, in service mode; the pages say nothing of it where there is nobody.

    Returns:
        An application with nothing in common with any other one. It may be mounted below a path.
    """
    pages = Pages(Site(catalog, pictures), trier)
    routes = [
        Route("/", pages.map),
        Route("/neurons", pages.table),
        Route("/neurons.csv", pages.csv),
        Route("/neurons.parquet", pages.parquet),
        Route("/neuron", pages.neuron),
        Route("/search", pages.search),
        Route("/help", pages.help),
        Route("/thumbnail", pages.thumbnail),
        Route("/image", pages.image),
        Route("/static/{name}", pages.static),
        *([] if trier is None else [Route("/swap", pages.swap)]),
    ]
    on_error: dict[Any, Callable[[Request, Exception], Response]] = {
        RefusedError: pages.refused,
        MissingError: pages.missing,
        HTTPException: pages.missing,
        PolyrayError: pages.broken,
        Exception: pages.broken,
    }
    return Starlette(routes=routes, exception_handlers=on_error, middleware=[Middleware(Guard, hosts=hosts)])


class Pages:
    """The pages of one dataset.

    Args:
        site: the dataset.
        trier: who tries swaps, if anybody.
    """

    def __init__(self, site: Site, trier: trying.Trying | None = None) -> None:
        self._site, self._trier = site, trier
        self._templates = Environment(
            loader=PackageLoader("polyray.view"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters |= words.FILTERS
        self._templates.globals |= {"statuses": STATUSES, "page_sizes": PAGE_SIZES, "outline": layers.outline}
        self._templates.globals["against"] = AUROC_AGAINST
        self._templates.globals["controls"] = {name: CONTROLS[name] for name in layers.BESIDE}
        folder = resources.files("polyray.view") / "static"
        self._static = {f.name: f.read_bytes() for f in folder.iterdir() if f.name.rpartition(".")[2] in _TYPES}

    def map(self, request: Request) -> Response:
        """The network as layers."""
        index = self._site.index()
        wanted = self._asked(request, index, ("preset",))
        preset = asked.preset_of(wanted, index.kind)
        run = self._site.catalog.dataset.run
        return self._page(
            request,
            index,
            "map.html",
            asked=wanted,
            preset=preset,
            overview=self._site.overview(index, preset),
            notes=run["provenance"].get("notes", []),
            spread=index.kind.column(index.kind.spread),
        )

    def table(self, request: Request) -> Response:
        """The table of neurons."""
        index = self._site.index()
        wanted = self._asked(request, index)
        return self._page(
            request,
            index,
            "neurons.html",
            asked=wanted,
            preset=asked.preset_of(wanted, index.kind),
            sort=wanted.sort or index.kind.best,
            page=neurons.page(index, wanted),
            diagnoses=sorted(set().union(*(asked.patterns(d) for d in index.diagnoses))),
        )

    def csv(self, request: Request) -> Response:
        """The table as CSV."""
        return self._file(request, export.csv, "text/csv; charset=utf-8", "neurons.csv")

    def parquet(self, request: Request) -> Response:
        """The table as Parquet."""
        return self._file(request, export.parquet, "application/vnd.apache.parquet", "neurons.parquet")

    def neuron(self, request: Request) -> Response:
        """One neuron."""
        index = self._site.index()
        layer, number = self._place(request, index, ("layer", "neuron", "preset"))
        wanted = self._asked(request, index, ("preset",), beside=("layer", "neuron"))
        preset = asked.preset_of(wanted, index.kind)
        read = language.neuron if index.is_categorical else neuron.neuron
        found = read(self._site.catalog, index, layer, number)
        if found is None:
            raise MissingError(self._absent(index, layer, number))
        row = index.place(layer, number)
        return self._page(
            request,
            index,
            "language.html" if index.is_categorical else "neuron.html",
            asked=wanted,
            preset=preset,
            found=found,
            beside=[None, None] if row is None else neurons.beside(index, row),
            neighbours=[] if row is None else neurons.neighbours(index, row, preset),
            pictures=self._site.pictures,
            offered=self._offered(index, found),
        )

    def swap(self, request: Request) -> Response:
        """A swap that somebody thought of, and what the neuron says of it now."""
        index = self._site.index()
        layer, number = self._place(request, index, ("layer", "neuron", "patch", "example", "other"))
        found = (
            None
            if self._trier is None or index.is_categorical
            else neuron.neuron(self._site.catalog, index, layer, number)
        )
        if self._trier is None or found is None:
            raise MissingError(self._absent(index, layer, number))
        chosen, tried = trying.tried(self._site.catalog, self._trier, layer, number, request.query_params)
        return self._page(
            request,
            index,
            "swap.html",
            tried.status,
            asked=Asked(),
            preset="",
            found=found,
            pictures=self._site.pictures,
            offered=self._offered(index, found),
            chosen=chosen,
            tried=tried,
        )

    def _offered(self, index: Index, found: dict[str, Any]) -> dict[str, Any] | None:
        if self._trier is None:
            return None
        if index.is_categorical:
            return {"why_not": trying.NO_IMAGES}
        return trying.choices(self._site.catalog, self._trier, found)

    def search(self, request: Request) -> Response:
        """Neurons by concept."""
        index = self._site.index()
        query = request.query_params
        _only(request, ("q", "in", "page", "preset"))
        words_, by, at = query.get("q", "").strip(), query.get("in") or "any", query.get("page") or "1"
        problems = []
        if by not in _SEARCHED:
            problems.append(f"in cannot be {by[:80]!r}.{nearest(by[:80], _SEARCHED)}")
        if len(words_) > asked.LONGEST:
            problems.append(f"q may have {asked.LONGEST} letters, got {len(words_)}.")
        if not (at.isascii() and at.isdigit() and 1 <= int(at[:12]) <= _MOST):
            problems.append(f"page must be a whole number from 1, got {at[:40]!r}.")
        if problems:
            raise RefusedError(problems)
        wanted = self._asked(request, index, ("preset",), beside=("q", "in", "page"))
        preset = asked.preset_of(wanted, index.kind)
        found = neurons.search(index, words_, by, int(at), N_FOUND, preset) if words_ else None
        return self._page(
            request, index, "search.html", asked=wanted, preset=preset, words=words_, by=by, at=int(at), found=found
        )

    def help(self, request: Request) -> Response:
        """What the words and keys mean."""
        index = self._site.index()
        return self._page(request, index, "help.html", asked=Asked(), preset="", page_title="Help")

    def thumbnail(self, request: Request) -> Response:
        """A prototype of a cluster as the dataset has it."""
        index = self._site.index()
        layer, number = self._place(request, index, ("layer", "neuron", "cluster", "i"))
        cluster, i = _whole(request, "cluster"), _whole(request, "i")
        found = self._site.catalog.at("clusters", ["thumbnails"], layer=layer, neuron=number, cluster=cluster)
        if not found:
            raise MissingError(f"neuron {number} of layer {layer!r} has no cluster {cluster}.")
        pictures = found[0]["thumbnails"] or []
        data = pictures[i] if i < len(pictures) else None
        return _picture(data if data is not None and words.is_jpeg(data) else None, "no picture")

    def image(self, request: Request) -> Response:
        """A probe image by its number."""
        _only(request, ("example",))
        if self._site.pictures is None:
            raise MissingError("probe images are not shown: start the viewer with --probe.")
        example = _whole(request, "example")
        if example >= len(self._site.pictures):
            raise MissingError(f"the probe set has no image {example}: it has {len(self._site.pictures)}.")
        return _picture(self._site.pictures.jpeg(example), "cannot be read")

    def static(self, request: Request) -> Response:
        """Style sheet, script and icon, which were read when the application was made."""
        name = request.path_params["name"]
        if name not in self._static:
            raise MissingError("there is no such file.")
        return Response(self._static[name], media_type=_TYPES[name.rpartition(".")[2]])

    def refused(self, request: Request, error: Exception) -> Response:
        """An address that cannot be meant."""
        problems = error.problems if isinstance(error, RefusedError) else [str(error)]
        return self._told(request, 400, "This address asks for what there cannot be", problems)

    def missing(self, request: Request, error: Exception) -> Response:
        """What is not there."""
        status = error.status_code if isinstance(error, HTTPException) else 404
        why = str(error) if isinstance(error, MissingError) else "No page has this address."
        return self._told(request, status, "Not found", [why])

    def broken(self, request: Request, error: Exception) -> Response:
        """What failed; the page says what polyray knows of it, and the log has the rest."""
        why = str(error) if isinstance(error, PolyrayError) else "The viewer failed; its log says how."
        told = self._told(request, 500, "This page cannot be shown", [why])
        # What nobody foresaw is answered from outside the guard.
        told.headers.update(HEADERS)
        return told

    def _told(self, request: Request, status: int, title: str, lines: list[str]) -> Response:
        if request.url.path.endswith(("/image", "/thumbnail")):
            return Response("\n".join(lines), status, media_type="text/plain; charset=utf-8")
        index = self._site.index()
        return self._page(request, index, "told.html", status, asked=Asked(), preset="", title=title, lines=lines)

    def _page(self, request: Request, index: Index, template: str, status: int = 200, **shown: Any) -> Response:
        root = request.scope.get("root_path", "").rstrip("/")

        def url(path: str, **query: object) -> str:
            pairs = [(k.rstrip("_"), v) for k, v in query.items() if v not in (None, "")]
            return root + path + ("?" + urlencode(pairs) if pairs else "")

        run = self._site.catalog.dataset.run
        html = self._templates.get_template(template).render(
            shown,
            root=root,
            url=url,
            index=index,
            kind=index.kind,
            run=run,
            subject=network_name(run) or str(self._site.catalog.dataset.path),
            **self._links(request, root),
            is_finished=self._site.is_finished,
            progress=self._site.progress(),
        )
        return HTMLResponse(html, status, {"Cache-Control": "no-store"})

    def _links(self, request: Request, root: str) -> dict[str, Callable[[object], str]]:
        """Addresses of the same page under another preset, and of another one of its pages."""

        def to(key: str) -> Callable[[object], str]:
            kept = [(k, v) for k, v in request.query_params.multi_items() if k not in (key, "page") and v]
            return lambda value: f"{root}{_path(request)}?{urlencode([*kept, (key, str(value))])}"

        return {"preset_link": to("preset"), "page_link": to("page")}

    def _file(
        self, request: Request, write: Callable[[Index, Asked], Iterator[bytes]], media_type: str, name: str
    ) -> Response:
        index = self._site.index()
        wanted = self._asked(request, index)
        headers = {"Content-Disposition": f'attachment; filename="{name}"', "Cache-Control": "no-store"}
        return StreamingResponse(write(index, wanted), media_type=media_type, headers=headers)

    def _asked(
        self, request: Request, index: Index, known: tuple[str, ...] | None = None, beside: tuple[str, ...] = ()
    ) -> Asked:
        """What the query asks for; `known` are all keys that the page has, `beside` those that it reads itself."""
        if known is not None:
            _only(request, (*known, *beside))
        return asked.parse([(k, v) for k, v in request.query_params.multi_items() if k not in beside], index)

    def _place(self, request: Request, index: Index, known: tuple[str, ...]) -> tuple[str, int]:
        _only(request, known)
        layer = request.query_params.get("layer", "")
        if layer not in index.layers:
            raise MissingError(f"there is no layer {words.clean(layer[:80])!r}.{nearest(layer[:80], index.layers)}")
        return layer, _whole(request, "neuron")

    def _absent(self, index: Index, layer: str, number: int) -> str:
        near = neurons.nearest_neuron(index, layer, number)
        if near is None:
            return f"layer {layer!r} has no neurons yet: the sweep has not come to it."
        return f"layer {layer!r} has no neuron {number}; the nearest in number is {near}."


def _picture(jpeg: bytes | None, why: str) -> Response:
    """A picture; where there is none one that says so."""
    headers = {"Cache-Control": "private, max-age=3600" if jpeg else "no-store"}
    if jpeg is not None:
        return Response(jpeg, media_type="image/jpeg", headers=headers)
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64"><rect width="64" height="64" fill="#8886"/>'
        f'<text x="32" y="35" font-size="9" font-family="sans-serif" text-anchor="middle" fill="#888">{why}</text>'
        "</svg>"
    )
    return Response(svg, media_type="image/svg+xml", headers=headers)


def _path(request: Request) -> str:
    """The path of a request, below where the application is mounted."""
    path: str = request.scope["path"]
    return path.removeprefix(request.scope.get("root_path", "").rstrip("/")) or "/"


def _only(request: Request, known: tuple[str, ...]) -> None:
    unknown = [k for k in request.query_params if k not in known]
    if unknown:
        raise RefusedError([f"{k[:80]!r} is nothing that this page knows.{nearest(k[:80], known)}" for k in unknown])


def _whole(request: Request, key: str) -> int:
    value = request.query_params.get(key, "")
    if not (value.isascii() and value.isdigit() and int(value[:12]) <= _MOST):
        raise RefusedError([f"{key} must be a whole number from 0, got {value[:40]!r}."])
    return int(value)
