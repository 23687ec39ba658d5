"""Networks that make trouble in the worker that runs them, when and as often as a test asks for it."""

import errno
import os
import signal
from pathlib import Path
from typing import Any

import torch
from networks import EdgeNet, edge_net
from torch import Tensor, nn

from polyray import files
from polyray.cluster.chain import ShardActor
from polyray.cluster.text_plan import TextSweep

MICRO_BATCH = 32


class Troubled(EdgeNet):
    """`EdgeNet` that looks for files in a folder at every forward of mining.

    `die` holds a number: at that forward of this process the file is removed and the process kills itself. While
    `full` exists, from the forward with its number on, nothing can be written: a mock of a full disk.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self._folder = Path(folder)
        self._n_forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == MICRO_BATCH and not torch.is_grad_enabled():
            self._n_forwards += 1
            self._make_trouble()
        return super().forward(x)

    def _make_trouble(self) -> None:
        if self._asked("die"):
            (self._folder / "die").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if self._asked("full"):
            files._write = self._write_on_full_disk

    def _asked(self, name: str) -> bool:
        path = self._folder / name
        return path.exists() and self._n_forwards >= int(path.read_text())

    def _write_on_full_disk(self, path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def edge_net_in(folder: str) -> nn.Module:
    """The network of `networks.edge_net`, tensor by tensor, with trouble."""
    net = Troubled(folder)
    net.load_state_dict(edge_net().state_dict())
    return net.eval()


def unbuildable(pid: int) -> nn.Module:
    """A network that can be built in one process alone, as one whose package the workers lack."""
    if os.getpid() != pid:
        raise RuntimeError("this network cannot be built here")
    return edge_net()


class DyingShard(ShardActor):
    """A shard whose process ends, once, at the batch that the file `die_at` beside OUT names."""

    def __init__(self, sweep: TextSweep, *more: Any) -> None:
        super().__init__(sweep, *more)
        self._at = Path(sweep.out).parent / "die_at"

    def step(self, batch: int, hidden: Tensor | None) -> Tensor | None:
        if self._at.exists() and batch == int(self._at.read_text()):
            self._at.unlink()
            os._exit(1)
        return super().step(batch, hidden)
