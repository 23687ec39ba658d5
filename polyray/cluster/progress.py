"""Progress: how far a sweep is, from its commit records alone.

Place in the flow: `polyray status` and `polyray verify`; needs OUT, no cluster, no model, no probe set.
"""

from typing import Any

from polyray.cluster.plan import Shape, Work, stages, works
from polyray.cluster.text_plan import TextShape, text_stages, text_works
from polyray.config import parse_any
from polyray.errors import ConfigError, StoreError
from polyray.overlay import Overlay, opened
from polyray.store import Store
from polyray.text_config import TextConfig


def _shape(store: Store) -> Shape | TextShape:
    run = store.run
    try:
        provenance = run["provenance"]
        config = parse_any(run["config"])
        if isinstance(config, TextConfig):
            swept = tuple(provenance["swept"])
            return TextShape(config.science, provenance["n_documents"], provenance["layers"], swept)
        return Shape(config.science, provenance["n_images"], provenance["layers"])
    except (KeyError, ValueError, ConfigError) as e:
        raise StoreError(
            f"run.json of {str(store.out)!r} does not describe a sweep that this version knows: {e}"
        ) from e


def _works(stage: str, shape: Shape | TextShape, store: Store) -> list[Work]:
    return text_works(stage, shape) if isinstance(shape, TextShape) else works(stage, shape, store)


def _steps(store: Store, shape: Shape | TextShape) -> tuple[str, ...]:
    """What the dataset consists of: all stages, or of a variant those that it does again."""
    if isinstance(shape, TextShape):
        return tuple(text_stages(shape.science))
    return store.steps if isinstance(store, Overlay) else tuple(stages(shape.science))


def progress(out: str) -> dict[str, Any]:
    """Units done and planned of every stage.

    Returns:
        run_id, finished, n_done and for each stage: stage, n_done, n_units (None while an earlier stage decides it),
        seconds (of actors' work).
    """
    store = opened(out)
    shape = _shape(store)
    listed = []
    known = True
    for stage in _steps(store, shape):
        done = store.committed(stage.partition("/")[0])
        n_units = len(_works(stage, shape, store)) if known else None
        known = known and n_units == len(done)
        listed.append({"stage": stage, "n_done": len(done), "n_units": n_units, "seconds": done.seconds})
    return {
        "run_id": store.run_id,
        "finished": store.is_finished,
        "n_done": sum(s["n_done"] for s in listed),
        "stages": listed,
    }


def expected_units(out: str) -> list[str]:
    """Keys of all units whose number is known: of a finished sweep, all; of another, up to the stage it is in.

    Where a part that decides which units come next is damaged, the units up to it.
    """
    store = opened(out)
    shape = _shape(store)
    expected: list[str] = []
    for stage in _steps(store, shape):
        try:
            units = {w.key for w in _works(stage, shape, store)}
            done = store.committed(stage.partition("/")[0]).keys()
        except StoreError:
            break  # the audit names the part, or the manifest
        expected += sorted(units)
        if not units <= done:
            break
    return expected
