"""Site: a dataset as the viewer holds it, looked at anew while its sweep goes on.

Place in the flow: between the requests and `index.py`. Whoever asks gets an index that is whole; a newer one is made
beside it, and takes its place.
"""

import threading
import time
from typing import TYPE_CHECKING, Any

from polyray.cluster.progress import progress
from polyray.errors import PolyrayError
from polyray.report.catalog import Catalog
from polyray.view import layers
from polyray.view.index import Index

if TYPE_CHECKING:
    from polyray.view.pictures import Pictures

REFRESH_S = 3.0
"""A running sweep is looked at again after so long at least."""
_SHARE = 10
"""… and after so many times what it took to look the last time, so that looking does not take all of the time."""
_AT_ONCE_S = 0.3
"""Where looking takes less, a request waits for it."""


class Site:
    """What all requests share.

    Args:
        catalog: the dataset.
        pictures: its probe images, where the viewer may show them.
    """

    def __init__(self, catalog: Catalog, pictures: "Pictures | None" = None) -> None:
        self.catalog, self.pictures = catalog, pictures
        self._lock = threading.Lock()
        self._old: Index | None = None
        self._told: tuple[float, dict[str, Any] | None] = (0.0, None)
        started_s = time.monotonic()
        self._index = Index(catalog)
        self._n_parts = catalog.dataset.n_parts
        self._overviews: dict[tuple[Index, str], dict[str, Any]] = {}
        # The first page that is asked for should not be the one that waits.
        self.overview(self._index, self._index.kind.presets[-1] if self._index.kind.presets else "")
        self._looked_s = time.monotonic()
        self._took_s = self._looked_s - started_s

    @property
    def is_finished(self) -> bool:
        """Whether the sweep had ended when it was looked at last."""
        return self.catalog.dataset.is_finished

    def index(self) -> Index:
        """What is sorted and searched, as of a moment ago."""
        if not self.is_finished and self._is_due() and self._lock.acquire(blocking=False):
            if self._took_s < _AT_ONCE_S:
                self._look()
            else:
                threading.Thread(target=self._look, daemon=True).start()
        return self._index

    def overview(self, index: Index, preset: str) -> dict[str, Any]:
        """What every layer comes to, counted once for each index and preset."""
        key = (index, preset)
        if key not in self._overviews:
            kept = {k: v for k, v in self._overviews.items() if k[0] is index}
            self._overviews = kept | {key: layers.overview(index, self.catalog, preset)}
        return self._overviews[key]

    def progress(self) -> dict[str, Any] | None:
        """Units done of every stage; None where the sweep has ended, or nobody can say."""
        if self.is_finished:
            return None
        at_s, told = self._told
        if time.monotonic() - at_s > REFRESH_S / 2:
            try:
                told = progress(str(self.catalog.dataset.path))
            except PolyrayError:
                told = None
            self._told = (time.monotonic(), told)
        return told

    def _is_due(self) -> bool:
        return time.monotonic() - self._looked_s > max(REFRESH_S, _SHARE * self._took_s)

    def _look(self) -> None:
        """Makes a new index where there is more; the lock is held by whoever calls it."""
        started_s = time.monotonic()
        try:
            dataset = self.catalog.refresh()
            if dataset.n_parts != self._n_parts:
                # Requests may still ask the index before; the one before that nobody has any more.
                if self._old is not None:
                    self._old.drop()
                new = Index(self.catalog)
                self._old, self._index, self._n_parts = self._index, new, dataset.n_parts
                self._took_s = time.monotonic() - started_s
        finally:
            self._looked_s = time.monotonic()
            self._lock.release()
