"""How much memory tensors take."""

from collections.abc import Callable

import numpy as np
import torch


def peak_bytes(work: Callable[[], object]) -> int:
    """Most memory that tensors made meanwhile held at once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns())])
    return int(held.max())
