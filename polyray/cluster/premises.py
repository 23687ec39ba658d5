"""Premises: what must hold where an actor runs, so that what it does belongs to the run.

Which question it answers: *does this actor see the dataset, with the torch and the device that the run has?* Place in
the flow: actors of every kind ask before they load a model, and `ready` carries the answer: the driver hears it before
it sends the first unit. A folder that only the driver's machine has, and an image with another torch, cost a refusal
with the node's name, not a dataset whose rows differ in the last bits.
"""

import platform
from dataclasses import dataclass

from polyray import run_file
from polyray.errors import StoreError
from polyray.store import Store


@dataclass(frozen=True)
class Premises:
    """What the driver has, and an actor must have as well."""

    out: str
    run_id: str
    torch: str
    device: str
    """cpu or cuda."""

    def lacking(self) -> str | None:
        """What of it does not hold in this process; None where all does."""
        import torch  # here, since the driver makes these and should stay small

        node = platform.node()
        if torch.__version__ != self.torch:
            return (
                f"node {node!r} has torch {torch.__version__}, the run was begun with {self.torch}. Results of both "
                "would be mixed in one OUT; install the same on every node."
            )
        try:
            found = Store(self.out).run_id
        except StoreError as e:
            found = str(e)
        if found != self.run_id:
            return (
                f"node {node!r} does not see the run in {self.out!r} ({found}). OUT must be one folder for the driver "
                "and all workers: put it on storage that every node mounts at the same path, or in a bucket (s3://…)."
            )
        if self.device == "cuda" and not torch.cuda.is_available():
            return (
                f"torch finds no CUDA device on node {node!r}, though science.numerics.device is 'cuda'. Ask for GPUs "
                "(num_gpus in execution), or check the node's driver."
            )
        return None


def premises_of(store: Store, device: str) -> Premises:
    """Those of a run that was begun."""
    return Premises(str(store.out), store.run_id, str(store.run["provenance"]["torch"]), device)


@dataclass(frozen=True)
class Ready:
    """What an actor answers once it has started."""

    node: str
    """Id of its node."""
    refusal: str | None = None
    """Why it must not do a unit."""
    gpu: str | None = None
    """Model of its GPU, where the run needs one."""


def gpu_of(device: str) -> str | None:
    """Model of the GPU that this process computes on; None on a CPU."""
    if device != "cuda":
        return None
    import torch

    return torch.cuda.get_device_name()


def mixed(store: Store, ready: Ready) -> str | None:
    """What an actor must not do units for, as the driver sees it: its own refusal, or another GPU than the run's.

    The first GPU that a run meets becomes the run's.
    """
    if ready.refusal or ready.gpu is None:
        return ready.refusal
    first = run_file.settle_gpu(store.place, ready.gpu)
    if first == ready.gpu:
        return None
    return (
        f"an actor has a GPU {ready.gpu!r}, the run was begun on {first!r}. Results of both differ in the last bits; "
        "let the run see nodes of one kind, or choose another OUT."
    )
