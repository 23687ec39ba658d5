"""The command line: the only place that prints, exits or reads the environment.

Place in the flow: the top. Exit codes: 0 done; 2 bad config or data, nothing written (for `plan`: infeasible);
3 stopped with failed units, resumable; 4 `verify` found something; 130 interrupted, resumable.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from polyray import files, logs, printed
from polyray.bars import Bars, duration
from polyray.cluster.interrupt import Stop
from polyray.config import AnyConfig, Config, load_config
from polyray.errors import ConfigError, DataError, ModelError, PolyrayError, StoreError
from polyray.psi_text_config import PsiTextConfig
from polyray.text_config import TextConfig

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A census of the neurons of a network: which respond to several unrelated things, to which, how sure one "
    "can be.",
)

OK, REFUSED, INCOMPLETE, DAMAGED, INTERRUPTED = 0, 2, 3, 4, 130

ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML file with the sections science and execution.")
]
OutPath = Annotated[str, typer.Argument(metavar="OUT", help="Folder of a dataset.")]
Json = Annotated[bool, typer.Option("--json", help="Print one machine-readable object on standard output.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Override one key of the config, for instance science.seed=1."),
]
LogJson = Annotated[
    str | None,
    typer.Option(
        "--log-json", metavar="FILE", help="Add one JSON object a line for every event to FILE; - for standard error."
    ),
]
Address = Annotated[
    str | None, typer.Option(help="Ray cluster; by default RAY_ADDRESS or the config's, else Ray is started here.")
]


def main() -> None:
    """Entry point of the `polyray` command."""
    logs.to_people()
    app()


def _console(as_json: bool = False) -> Console:
    """Standard output for people; standard error where standard output is for machines."""
    stream = sys.stderr if as_json else sys.stdout
    width = None if stream.isatty() else 160
    return Console(file=stream, width=width, highlight=False, soft_wrap=not stream.isatty())


def _aside(as_json: bool) -> AbstractContextManager[object]:
    """What libraries print while they load models goes to standard error where standard output is for machines."""
    return redirect_stdout(sys.stderr) if as_json else nullcontext()


def _leave(error: Exception, code: int, as_json: bool) -> NoReturn:
    kind = type(error).__name__
    if as_json:
        print(json.dumps({"error": kind, "message": str(error), "exit": code}))
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]{kind}:[/] {escape(str(error))}")
    raise typer.Exit(code)


def _guarded(call: Callable[[], int], as_json: bool) -> NoReturn:
    """Runs a command and turns what it raises into its exit code."""
    try:
        code = call()
    except (ConfigError, DataError, ModelError, StoreError) as e:
        _leave(e, REFUSED, as_json)
    except PolyrayError as e:
        _leave(e, INCOMPLETE, as_json)
    except KeyboardInterrupt as e:
        told = f"{e}" if str(e).startswith("interrupted") else "interrupted"
        told += "; what is committed stays, and the same command goes on where this one stopped"
        if as_json:
            print(json.dumps({"error": "Interrupted", "message": told, "exit": INTERRUPTED}))
        Console(stderr=True, highlight=False, soft_wrap=True).print(escape(told))
        raise typer.Exit(INTERRUPTED) from None
    raise typer.Exit(code)


def _config(path: Path, overrides: list[str] | None, address: str | None) -> AnyConfig:
    config = load_config(path, overrides)
    address = address or config.execution.address or os.environ.get("RAY_ADDRESS") or None
    # mypy cannot tell that a copy of either kind is of that kind.
    moved: AnyConfig = config.model_copy(update={"execution": config.execution.model_copy(update={"address": address})})
    return moved


@app.command()
def run(
    config: ConfigPath,
    out: Annotated[str, typer.Option("--out", metavar="OUT", help="Folder of the dataset; resumed where it exists.")],
    overrides: Set = None,
    address: Address = None,
    log_json: LogJson = None,
    as_json: Json = False,
) -> None:
    """Run the sweep, or go on with what OUT already holds."""
    stop = Stop()
    with stop.listening():
        _guarded(lambda: _run(_config(config, overrides, address), out, log_json, stop, as_json), as_json)


def _run(config: AnyConfig, out: str, log_json: str | None, stop: Stop, as_json: bool) -> int:
    # Imported here: the commands that only read a dataset start without Ray and torch.
    from polyray.cluster import apart, service
    from polyray.dataset import open as open_dataset

    console = _console(as_json)
    started_s = time.monotonic()
    folder = str(files.located(out))
    resolved = apart.resolved(config, folder)
    sweep = resolved.sweep
    console.print(
        f"[bold]polyray[/] {sweep.n_neurons:,} neurons in {sweep.n_layers} layers, {sweep.n_items}, into {escape(out)}"
    )
    for note in resolved.notes:
        console.print(f"[bold yellow]note[/] {escape(note)}")
    bars = Bars(console)
    try:
        with logs.to_machines(log_json), service.cluster(config.execution), bars:
            outcome = service.run(resolved, bars.show, bars.say, stop)
    except StoreError as e:
        # Before the first unit a store that refuses has written nothing; after it, the run can be resumed.
        _leave(e, INCOMPLETE if bars.shown else REFUSED, as_json)
    dataset = open_dataset(out)
    told = _told_of_text(dataset) if isinstance(config, TextConfig) else _told_of_psi(dataset, config)
    seconds = time.monotonic() - started_s
    if as_json:
        figures = {"run_id": outcome.run_id, "out": out, "seconds": seconds, "stage_seconds": outcome.seconds}
        figures["device_seconds"] = asdict(outcome.device_s)
        figures |= {"pictures": [str(p) for p in told.pictures], "notes": resolved.notes}
        print(json.dumps(figures | told.figures))
    else:
        for table in told.tables:
            console.print(table)
        failed = dataset["failures"].to_table(["item", "item_id"])
        if n_failures := failed.group_by(["item", "item_id"]).aggregate([]).num_rows:  # units may name the same item
            console.print(
                f"[bold yellow]note[/] {n_failures} images, patches, neurons or documents failed; see table failures"
            )
        console.print(f"done in {duration(seconds)}; run_id {outcome.run_id}; {printed.device_line(outcome.device_s)}")
        shown = ", ".join(escape(str(p)) for p in told.pictures)
        console.print(f"at a glance: {shown}; the tables: polyray.open({escape(repr(out))})")
    return OK


class _Told(NamedTuple):
    """What is said of a finished sweep."""

    figures: dict[str, Any]
    """For machines."""
    tables: list[Any]
    """For people."""
    pictures: list[Path]


def _told_of_psi(dataset: Any, config: Config) -> _Told:
    from polyray.report import figure, planted, summary, swaps

    records = summary.layer_table(dataset)
    tables = printed.summary_tables(records, config)
    folder = files.folder_for_people(dataset.path)
    pictures = [figure.draw(dataset, folder / "summary.png")]
    truth = planted.records(dataset) if config.science.plant else []
    if truth:
        pictures.append(planted.draw(dataset, folder / "planted.png"))
        tables.append(printed.planted_table(truth))
    swapped = swaps.records(dataset) if config.science.swap else []
    if swapped:
        pictures.append(swaps.draw(dataset, folder / "swaps.png"))
        tables.append(printed.swaps_table(swapped))
    return _Told({"layers": records, "planted": truth, "swaps": swapped}, tables, pictures)


def _told_of_text(dataset: Any) -> _Told:
    from polyray.report import categorical

    records = categorical.records(dataset)
    pictures = [categorical.draw(dataset, files.folder_for_people(dataset.path) / "categorical.png")]
    return _Told({"layers": records}, [printed.categorical_table(records)], pictures)


@app.command()
def plan(config: ConfigPath, overrides: Set = None, address: Address = None, as_json: Json = False) -> None:
    """Say what a sweep would be and cost; run nothing. Exit 2 when it could not run."""
    _guarded(lambda: _plan(_config(config, overrides, address), as_json), as_json)


def _plan(config: AnyConfig, as_json: bool) -> int:
    if isinstance(config, TextConfig):
        return _plan_text(config, as_json)
    from polyray.cluster import estimate, psi_text_estimate, service
    from polyray.cluster.resolve import floor_note

    with _aside(as_json):
        e = psi_text_estimate.estimate(config) if isinstance(config, PsiTextConfig) else estimate.estimate(config)
    e.notes += floor_note(config, e.n_neurons, e.n_images or config.science.embed.n_pool)
    if config.execution.address is None:
        nodes, groups = [service.this_machine()], []
    else:
        with service.cluster(config.execution):
            nodes, groups = service.nodes(), service.groups()
    e.problems += service.lacks(config.execution, nodes, groups)
    if as_json:
        print(json.dumps({**asdict(e), "feasible": not e.problems}))
    else:
        printed.print_plan(_console(), e)
    return REFUSED if e.problems else OK


def _plan_text(config: TextConfig, as_json: bool) -> int:
    from polyray.cluster import service
    from polyray.cluster.text_estimate import estimate

    if config.execution.address is None:
        nodes, groups = [service.this_machine()], []
    else:
        with service.cluster(config.execution):
            nodes, groups = service.nodes(), service.groups()
    with _aside(as_json):
        e = estimate(config, service.room_of(config.execution, nodes, groups))
    e.problems += service.lacks(config.execution, nodes, groups)
    if as_json:
        print(json.dumps({**asdict(e), "feasible": not e.problems}))
    else:
        printed.print_text_plan(_console(), e)
    return REFUSED if e.problems else OK


@app.command()
def status(
    out: OutPath,
    watch: Annotated[bool, typer.Option("--watch", help="Show again every two seconds until the sweep ends.")] = False,
    as_json: Json = False,
) -> None:
    """Say how far a sweep is, from its commit records alone."""
    _guarded(lambda: _status(out, watch, as_json), as_json)


def _status(out: str, watch: bool, as_json: bool) -> int:
    from polyray.cluster.progress import progress

    console = _console(as_json)
    while True:
        report = progress(out)
        if as_json:
            print(json.dumps(report))
        else:
            table = Table("stage", "units", "of", "actor-hours", title=f"run {report['run_id']}", title_justify="left")
            for s in report["stages"]:
                total = "?" if s["n_units"] is None else str(s["n_units"])
                table.add_row(s["stage"], str(s["n_done"]), total, f"{s['seconds'] / 3600:.3f}")
            console.print(table)
            console.print("finished" if report["finished"] else f"{report['n_done']} units committed, not finished")
        if not watch or report["finished"]:
            return OK
        time.sleep(2.0)


@app.command()
def verify(out: OutPath, as_json: Json = False) -> None:
    """Read every byte of a dataset again. Exit 4 with the list when something is amiss."""
    _guarded(lambda: _verify(out, as_json), as_json)


def _verify(out: str, as_json: bool) -> int:
    from polyray.cluster.progress import expected_units
    from polyray.verify import verify as audit

    report = audit(out, expected_units(out))
    findings = {
        name: getattr(report, name)
        for name in ("missing_units", "missing_parts", "duplicates", "orphans", "mismatches", "unreadable")
    }
    if as_json:
        print(json.dumps({"ok": report.ok, "n_parts": report.n_parts, "n_rows": report.n_rows, **findings}))
        return OK if report.ok else DAMAGED
    console = _console()
    for name, lines in findings.items():
        for line in lines[:50]:
            console.print(f"[bold red]{name.replace('_', ' ')}[/] {escape(line)}")
        if len(lines) > 50:
            console.print(f"  … and {len(lines) - 50} more")
    n_rows = ", ".join(f"{name} {n:,}" for name, n in report.n_rows.items())
    console.print(f"{report.n_parts:,} parts read again; rows: {n_rows}")
    console.print("[bold green]whole[/]" if report.ok else "[bold red]not whole[/]")
    return OK if report.ok else DAMAGED


@app.command()
def report(
    out: OutPath,
    target: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Where it is written; by default OUT/report.html.")
    ] = None,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Markdown for a supplement, with its figures in a folder beside it.")
    ] = False,
    svg: Annotated[
        Path | None, typer.Option("--svg", metavar="FOLDER", help="Write every figure there as an SVG file as well.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write one page that tells what a sweep found, finished or not: it opens offline and in print."""
    _guarded(lambda: _report(out, target, as_markdown, svg, as_json), as_json)


def _report(out: str, target: Path | None, as_markdown: bool, svg: Path | None, as_json: bool) -> int:
    from polyray.report.command import said, write_report

    written = write_report(out, target, as_markdown, svg)
    if as_json:
        print(json.dumps(written))
    else:
        _console().print(escape(said(written)))
    return OK


@app.command()
def sensitivity(
    out: OutPath,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            "--vary",
            metavar="KEY=V,V",
            help="K=50,100; seed=1; k_range=2-4; prompts=builtin or a file; encoder=standin, open_clip, a YAML file or "
            "{kind: …}; or a key of cluster or calibrate. Several times for several keys.",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one key of execution.")
    ] = None,
    address: Address = None,
    log_json: LogJson = None,
    as_json: Json = False,
) -> None:
    """Score a finished sweep again with one thing changed, and say how well the scores agree."""
    stop = Stop()
    with stop.listening():
        _guarded(lambda: _sensitivity(out, vary or [], overrides or [], address, log_json, stop, as_json), as_json)


def _sensitivity(
    out: str,
    vary: list[str],
    overrides: list[str],
    address: str | None,
    log_json: str | None,
    stop: Stop,
    as_json: bool,
) -> int:
    from polyray.cluster import service
    from polyray.cluster.vary import resolve
    from polyray.dataset import open as open_dataset
    from polyray.report import sensitivity as report

    console = _console(as_json)
    with _aside(as_json):
        asked = resolve(out, vary, overrides, address, os.environ.get("RAY_ADDRESS") or None)
    for note in asked.notes:
        console.print(f"[bold yellow]note[/] {escape(note)}")
    if asked.remaining:
        bars = Bars(console)
        try:
            with logs.to_machines(log_json), service.cluster(asked.execution), bars:
                service.vary(asked, bars.show, bars.say, stop)
        except StoreError as e:
            _leave(e, INCOMPLETE if bars.shown else REFUSED, as_json)
    if not asked.base.is_finished:  # a comparison was cut short after it was committed
        with asked.base.acquire():
            asked.base.finish()
    dataset = open_dataset(out)
    records = report.variant_table(dataset)
    picture = report.draw(dataset, files.folder_for_people(dataset.path) / "sensitivity.png") if records else None
    if as_json:
        print(json.dumps({"out": out, "picture": picture and str(picture), "notes": asked.notes, "variants": records}))
        return OK
    table = Table(*report.COLUMNS, title="sensitivity", caption=report.CAPTION, caption_justify="left")
    table.columns[1].overflow = "fold"
    for record in records:
        table.add_row(*(escape(c) for c in report.cells(record)))
    console.print(table if records else "nothing is varied yet: give --vary, for instance --vary K=50,100")
    if picture:
        console.print(
            f"at a glance: {escape(str(picture))}; all figures: polyray.open({escape(repr(out))})['sensitivity']"
        )
    return OK


@app.command()
def export(
    out: OutPath,
    to: Annotated[str, typer.Option("--to", metavar="FOLDER", help="Empty, new, or an export of the same run.")],
    form: Annotated[str, typer.Option("--format", help="neuron-records: OpenAI's form, of language models.")],
    layers: Annotated[
        list[str] | None, typer.Option("--layer", metavar="LAYER", help="Only this layer: h.3 or 3. Several times.")
    ] = None,
    neurons: Annotated[str | None, typer.Option(metavar="I-J,K", help="Only these neurons of each layer.")] = None,
    as_json: Json = False,
) -> None:
    """Write a dataset's neurons in the form of other tools, from the dataset alone."""
    _guarded(lambda: _export(out, to, form, layers or [], neurons, as_json), as_json)


def _export(out: str, to: str, form: str, layers: list[str], neurons: str | None, as_json: bool) -> int:
    from polyray.export import neuron_records

    if form != neuron_records.FORM:
        raise ConfigError(f"--format {form!r} is not known; valid: {neuron_records.FORM!r}.")
    console = _console(as_json)
    with Bars(console) as bars:
        summary = neuron_records.export(out, to, layers, neurons, lambda step: bars.show("export", step))
    if as_json:
        print(json.dumps(summary))
    else:
        printed.print_export(console, summary)
    return OK


@app.command()
def submit(
    config: ConfigPath,
    out: Annotated[
        str, typer.Option("--out", metavar="OUT", help="Folder of the dataset, an absolute path of the cluster.")
    ],
    overrides: Set = None,
    address: Annotated[
        str | None, typer.Option(help="Dashboard of the cluster, http://HEAD:8265; by default RAY_ADDRESS.")
    ] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Leave once the job is submitted.")] = False,
    as_json: Json = False,
) -> None:
    """Run the sweep as a Ray job on a cluster, show its log, and exit as it does."""
    _guarded(lambda: _submit(config, out, overrides or [], address, no_wait, as_json), as_json)


def _submit(path: Path, out: str, overrides: list[str], address: str | None, no_wait: bool, as_json: bool) -> int:
    from polyray.cluster import submit as jobs

    console = _console(as_json)
    config = load_config(path, overrides)
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or ""
    package = jobs.gather(path, config)
    command = jobs.entrypoint(package, config, out, overrides, as_json)
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "package.zip"
        n_bytes = jobs.pack(package, archive)
        client = jobs.connect(address)
        job_id = jobs.submit(client, archive, command)
    for note in package.notes:
        console.print(f"[bold yellow]note[/] {escape(note)}")
    console.print(
        f"job {job_id}, with {len(package.members)} file(s) of {n_bytes / 1024**2:.2f} MiB: {escape(command)}"
    )
    figures: dict[str, Any] = {"job_id": job_id, "address": address, "out": out, "command": command}
    figures |= {"files": sorted(package.members), "package_bytes": n_bytes, "notes": package.notes}
    figures |= {"status": None, "exit": None, "run": None}
    code = OK
    if not no_wait:
        log_stream = sys.stderr if as_json else sys.stdout

        def show(text: str) -> None:
            log_stream.write(text)
            log_stream.flush()

        try:
            ended = jobs.follow(client, job_id, show)
        except KeyboardInterrupt:
            code = figures["exit"] = INTERRUPTED
            advice = f"no longer watched; the job goes on. ray job logs {job_id} --follow, ray job stop {job_id}"
            Console(stderr=True, highlight=False, soft_wrap=True).print(advice)
        else:
            code = ended.exit_code
            figures |= {"status": ended.status, "exit": code}
            figures["run"] = jobs.printed_object(ended.log) if as_json else None
            console.print(f"job {job_id} {ended.status.lower()}, exit code {code}")
    if as_json:
        print(json.dumps(figures))
    return code


@app.command()
def view(
    out: OutPath,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of 127.0.0.1; 0 for any free one.")] = 7870,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Show whole probe images, from where the run's config says.")
    ] = False,
    browser: Annotated[bool, typer.Option("--open/--no-open", help="Open a browser.")] = True,
) -> None:
    """Look at a dataset in a browser, until Ctrl-C; a running sweep is followed."""
    _guarded(lambda: _view(out, port, probe, browser), as_json=False)


def _view(out: str, port: int, probe: bool, browser: bool) -> int:
    from polyray.view import serve

    try:
        serve.view(
            out, port, probe, browser, lambda at: _console().print(f"viewing {escape(out)} at {at} (Ctrl-C ends)")
        )
    except KeyboardInterrupt:
        _console().print("ended")
    return OK


@app.command()
def serve(
    out: OutPath,
    host: Annotated[str, typer.Option(help="Address that is listened on; beyond loopback a token is needed.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for any free one.")] = 7871,
    address: Address = None,
    probe: Annotated[
        str | None, typer.Option(metavar="PATH", help="Where the probe set lies, if not where the run's config says.")
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, max=1000, help="Processes that hold the network.")] = 1,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token, readable by its owner alone; else POLYRAY_VIEW_TOKEN.")
    ] = None,
) -> None:
    """Serve a dataset to a group by Ray Serve, with its network at hand to try swaps, until Ctrl-C."""
    stop = Stop()
    with stop.listening():
        _guarded(lambda: _serve(out, host, port, address, probe, replicas, token_file), as_json=False)


def _serve(
    out: str, host: str, port: int, address: str | None, probe: str | None, replicas: int, token_file: Path | None
) -> int:
    from polyray.serving import gate, start

    console = _console()
    token = gate.token_of(os.environ, token_file, is_needed=not gate.is_loopback(host))
    if token is not None and token.is_new:
        console.print(f"token, shown this once: {token.text}", markup=False)
    address = address or os.environ.get("RAY_ADDRESS") or None
    try:
        start.serve_dataset(
            out,
            host,
            port,
            address,
            probe,
            replicas,
            token,
            lambda at: console.print(f"serving {escape(out)} at {at} (Ctrl-C ends)"),
        )
    except KeyboardInterrupt:
        console.print("ended")
    return OK


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine has: versions, devices, Ray, which weights and probe sets are reachable."""
    _guarded(lambda: _doctor(as_json), as_json)


def _doctor(as_json: bool) -> int:
    from polyray.doctor import examine

    findings = examine(os.environ)
    if as_json:
        print(json.dumps(findings))
        return OK
    console = _console()
    for title, facts in findings.items():
        table = Table("what", "found", title=title, title_justify="left")
        for name, value in facts.items():
            table.add_row(escape(str(name)), escape(str(value)))
        console.print(table)
    return OK


if __name__ == "__main__":
    main()
