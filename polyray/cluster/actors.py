"""Actors: Ray's side of the workers, as thin as can be.

Place in the flow: the service starts them, each pins one model, does the units that the dispatcher picked, and
returns receipts, never tensors.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import ray

from polyray.cluster.plan import Sweep, Work
from polyray.cluster.premises import Premises, Ready, gpu_of
from polyray.cluster.text_plan import TextSweep
from polyray.config import PoolConfig
from polyray.records import Failed, Receipt

if TYPE_CHECKING:
    from polyray.cluster.units import UnitWorker

_GIB = 1024**3


AnySweep = Sweep | TextSweep


def _worker(kind: str, sweep: AnySweep) -> "UnitWorker":
    # Imported here: the driver starts actors, and stays small without torch and what the workers need.
    if isinstance(sweep, TextSweep):
        from polyray.cluster.text_score import TextScorer

        return TextScorer(sweep)
    from polyray.cluster.psi_text_work import workers_of

    return workers_of(sweep)[kind](sweep)


class WorkerActor:
    """One worker in a process of its own."""

    def __init__(self, kind: str, sweep: AnySweep, premises: Premises) -> None:
        self._ready = answer(premises)
        if self._ready.refusal is None:
            self._worker = _worker(kind, sweep)

    def ready(self) -> Ready:
        """Answers once the model is loaded and checked, or the actor knows that it must not."""
        return self._ready

    def run(self, units: Sequence[Work]) -> list[Receipt | Failed]:
        """Does the units of one call."""
        return self._worker.run(units)


def answer(premises: Premises) -> Ready:
    """What an actor of any kind says of itself, before it loads a model."""
    node, refusal = ray.get_runtime_context().get_node_id(), premises.lacking()
    return Ready(node, refusal, gpu_of(premises.device) if refusal is None else None)


def start(
    kind: str, sweep_ref: ray.ObjectRef, premises: Premises, pool: PoolConfig, env: dict[str, str]
) -> ray.actor.ActorHandle:
    """Asks Ray for an actor; it never restarts by itself, since the dispatcher decides what a death means."""
    options = actor_options(pool) | {"runtime_env": {"env_vars": env}}
    return ray.remote(WorkerActor).options(**options).remote(kind, sweep_ref, premises)


def actor_options(pool: PoolConfig) -> dict[str, object]:
    """What Ray is asked to set aside for an actor that never restarts by itself."""
    options: dict[str, object] = {
        "num_cpus": pool.num_cpus,
        "num_gpus": pool.num_gpus,
        "max_restarts": 0,
        "max_task_retries": 0,
        "max_concurrency": 1,
    }
    return options | ({} if pool.memory_gb is None else {"memory": int(pool.memory_gb * _GIB)})


def reason_of(error: Exception) -> str:
    """The last line of an error that says something: Ray wraps causes in pages of text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "Error:" in line]
    return (told or lines or [type(error).__name__])[-1][:500]
