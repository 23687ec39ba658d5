"""Chain: shards of a language model in a row, through which the corpus flows.

Place in the flow: `service.py` hands it the stage mine of a categorical sweep. Batches are pipelined: while the second
shard works on one, the first works on the next. Hidden states pass as object references, which the driver never
fetches. A checkpoint is a consistent cut: every shard saves after the same batch, and one record commits them all.
When a shard is lost all go back to the last one, which costs at most an interval and changes no bit.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence

import ray
import ray.exceptions as rx
from torch import Tensor

from polyray.cluster.actors import actor_options, answer, reason_of
from polyray.cluster.dispatch import Progress
from polyray.cluster.plan import Work
from polyray.cluster.premises import Premises, Ready, mixed, premises_of
from polyray.cluster.shard import ShardWorker
from polyray.cluster.text_memory import n_shards_of
from polyray.cluster.text_plan import TextSweep, passes, shards
from polyray.cluster.text_rows import n_batches
from polyray.errors import StageError, StoreError
from polyray.models.blocks import layer_index
from polyray.records import PartInfo, Receipt
from polyray.store import Store

log = logging.getLogger(__name__)

MOST_LOSSES = 3
"""Times in a row that shards may be lost without a checkpoint in between."""
STAGE = "mine"
CUT = "cut"
"""Stage of the records of checkpoints, which are retired when their pass has ended."""

OnProgress = Callable[[str, Progress], None]
OnMessage = Callable[[str], None]


class ShardActor:
    """One shard in a process of its own."""

    def __init__(
        self, sweep: TextSweep, premises: Premises, blocks: range, layers: Sequence[str], cut: str | None
    ) -> None:
        self._ready = answer(premises)
        if self._ready.refusal is None:
            self._worker = ShardWorker(sweep, blocks, layers, cut)

    def ready(self) -> Ready:
        """Answers once the weights are loaded, or the shard knows that it must not."""
        return self._ready

    def step(self, batch: int, hidden: Tensor | None) -> Tensor | None:
        """One batch."""
        return self._worker.step(batch, hidden)

    def save(self, unit_key: str) -> list[PartInfo]:
        """A checkpoint."""
        return self._worker.save(unit_key)


def mine(
    sweep: TextSweep,
    store: Store,
    remaining: Sequence[Work],
    n_fit: int,
    on_progress: OnProgress,
    on_message: OnMessage,
) -> None:
    """Takes the corpus through the model, in as many passes as the statistics need, and commits every layer.

    Args:
        sweep: what the driver resolved.
        store: where results go.
        remaining: units of layers that are not committed yet.
        n_fit: shards that the cluster holds.
        on_progress: called with the stage and how far it is, in batches of all passes.
        on_message: called with a line worth a person's attention.

    Raises:
        StageError: shards are lost again and again.
    """
    execution = sweep.config.execution
    total = n_batches(store, sweep.science)
    n_tokens = len(store.read("tokens", columns=["token"]))
    layers = [w.of_layer for w in remaining]
    bytes_of = {layer: 8 * n_tokens * sweep.shape.n_neurons[layer] for layer in layers}
    n_shards = n_shards_of(execution, n_fit)
    planned = passes(layers, bytes_of, n_shards * execution.stats_gb * 1024**3)
    for i, chosen in enumerate(planned):

        def told(n_done: int, rate: float, before: int = i * total) -> None:
            n_left = len(planned) * total - before - n_done
            on_progress(STAGE, Progress(before + n_done, 0, 0, len(planned) * total, rate, n_left / rate))

        _Pass(sweep, store, chosen, total, n_shards, on_message).run(told)


class _Pass:
    """One pass of the corpus, for some layers."""

    def __init__(
        self,
        sweep: TextSweep,
        store: Store,
        layers: Sequence[str],
        total: int,
        n_shards: int,
        on_message: OnMessage,
    ) -> None:
        self._sweep, self._store, self._layers, self._total = sweep, store, list(layers), total
        self._sweep_ref = ray.put(sweep)
        self._premises = premises_of(store, sweep.science.numerics.device)
        n_blocks = max(layer_index(layer) for layer in layers) + 1
        self._blocks = shards(n_blocks, n_shards)
        self._name = f"{layer_index(layers[0])}-{layer_index(layers[-1])}x{len(layers)}"
        self._on_message = on_message

    def run(self, told: Callable[[int, float], None]) -> None:
        """To the end, from the last checkpoint of a pass of the same layers where there is one."""
        losses = 0
        while True:
            start = self._position()
            actors = [self._start(blocks, start) for blocks in self._blocks]
            try:
                refusals = [mixed(self._store, ready) for ready in ray.get([a.ready.remote() for a in actors])]
                for refusal in filter(None, refusals):
                    raise StoreError(refusal)
                self._flow(actors, start, told)
                return
            except rx.RayError as e:
                if isinstance(e, rx.RayTaskError) or getattr(e, "actor_init_failed", False):
                    # What a shard itself raises it would raise again.
                    raise StageError(f"mining stopped: {reason_of(e)}. What is committed stays; run again.") from e
                losses = 1 if self._position() > start else losses + 1
                if losses >= MOST_LOSSES:
                    raise StageError(
                        f"shards were lost {losses} times in a row without a checkpoint in between, the last time: "
                        f"{reason_of(e)}. Lower execution.stats_gb or checkpoint_s, and run again."
                    ) from e
                self._on_message(f"a shard was lost ({reason_of(e)}); all go back to batch {self._position()}")
            finally:
                for actor in actors:
                    ray.kill(actor)

    def _flow(self, actors: list[ray.actor.ActorHandle], start: int, told: Callable[[int, float], None]) -> None:
        waiting: deque[ray.ObjectRef] = deque()
        every_s = self._sweep.config.execution.checkpoint_s
        began_s = saved_s = time.monotonic()
        for batch in range(start, self._total):
            hidden: object = None
            for actor in actors:
                hidden = actor.step.remote(batch, hidden)
            waiting.append(hidden)
            while len(waiting) > (2 * len(actors) if batch + 1 < self._total else 0):
                ray.get(waiting.popleft())  # None, which the last shard returns, or what befell it
                n_done = batch + 1 - len(waiting)
                told(n_done, (n_done - start) / (time.monotonic() - began_s))
            if time.monotonic() - saved_s > every_s and batch + 1 < self._total:
                self._save(actors, batch + 1)
                saved_s = time.monotonic()
        began_s = time.monotonic()
        keys = {layer: Work(STAGE, layer).key for layer in self._layers}
        parts = [p for saved in ray.get([a.save.remote(STAGE) for a in actors]) for p in saved]
        for layer, key in keys.items():
            own = [p for p in parts if p.layer == layer]
            self._store.commit(Receipt(key, own, time.monotonic() - began_s, "", STAGE))
        self._retire(None)

    def _save(self, actors: list[ray.actor.ActorHandle], position: int) -> None:
        key = f"{CUT}/{self._name}/{position:07d}"
        started_s = time.monotonic()
        parts = [p for saved in ray.get([a.save.remote(key) for a in actors]) for p in saved]
        self._store.commit(Receipt(key, parts, time.monotonic() - started_s, "", CUT))
        self._retire(key)

    def _start(self, blocks: range, position: int) -> ray.actor.ActorHandle:
        execution, numerics = self._sweep.config.execution, self._sweep.science.numerics
        threads = str(numerics.threads)
        options = actor_options(execution.shard) | {
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}}
        }
        cut = f"{CUT}/{self._name}/{position:07d}" if position else None
        return (
            ray.remote(ShardActor).options(**options).remote(self._sweep_ref, self._premises, blocks, self._layers, cut)
        )

    def _cuts(self) -> list[str]:
        """Checkpoints of a pass of these layers, oldest first; of other layers they are no use."""
        return sorted(key for key in self._store.committed(CUT) if key.startswith(f"{CUT}/{self._name}/"))

    def _position(self) -> int:
        cuts = self._cuts()
        return int(cuts[-1].rpartition("/")[2]) if cuts else 0

    def _retire(self, but: str | None) -> None:
        for key in self._store.committed(CUT):
            if key != but:
                self._store.retire(key)
