"""Units: one unit of work after the other, from a call to receipts.

Which question it answers: *what becomes of a unit that an actor is given?* Place in the flow: under the workers of
every kind of sweep; knows no Ray, so that a unit can be done by hand.
"""

import platform
import time
import traceback
from collections.abc import Sequence

import pyarrow as pa
import torch

from polyray import columns
from polyray.cluster.plan import Work
from polyray.errors import StoreError
from polyray.overlay import opened
from polyray.psi.mine import Failure
from polyray.records import Failed, PartInfo, Receipt
from polyray.settings import NumericsConfig


class UnitWorker:
    """Does units of work for one dataset; stateless between calls.

    Args:
        out: where the dataset lies.
        numerics: threads and device.
    """

    def __init__(self, out: str, numerics: NumericsConfig) -> None:
        torch.set_num_threads(numerics.threads)
        torch.use_deterministic_algorithms(numerics.device == "cuda", warn_only=True)
        self.store = opened(out)

    def run(self, units: Sequence[Work]) -> list[Receipt | Failed]:
        """Does units one after the other; a unit that raises is reported and costs only itself."""
        results: list[Receipt | Failed] = []
        for work in units:
            started_s = time.monotonic()
            try:
                parts = self.parts(work)
                seconds = time.monotonic() - started_s
                results.append(Receipt(work.key, parts, seconds, platform.node(), work.stage))
            except Exception as e:  # whatever a unit does costs that unit a row, never the sweep
                where = traceback.format_exc(limit=-4)
                results.append(Failed(work.key, f"{type(e).__name__}: {e}", where, isinstance(e, StoreError)))
        return results

    def parts(self, work: Work) -> list[PartInfo]:
        """Writes a unit's rows and says which parts they are."""
        raise NotImplementedError

    def write(
        self, work: Work, rows: dict[str, pa.Table | dict[str, pa.Table]], failed: Sequence[Failure] = ()
    ) -> list[PartInfo]:
        """Writes tables (by name, or by name and layer) and the failures beside them; empty ones are left out."""
        parts = []
        for name, value in rows.items():
            by_layer = value.items() if isinstance(value, dict) else [(work.layer, value)]
            parts += [self.store.write_part(name, work.key, t, layer) for layer, t in by_layer if len(t)]
        if failed:
            parts.append(
                self.store.write_part("failures", work.key, columns.failures(work.stage, work.key, failed), None)
            )
        return parts
