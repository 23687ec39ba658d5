"""A sweep on a cluster that begins without a worker: `python -m elastic OUT --address A` prints one JSON object.

Its nodes are added by Ray's autoscaler because actors pend, and removed by it because they idle.
"""

import argparse
import json
import threading
import time

import ray
from sleepers import awake, sleepy

from polyray.cluster import room, service

LONGEST_S = 120.0


def n_workers() -> int:
    """Nodes that have a CPU."""
    return sum(node.get("CPU", 0) > 0 for node in room.nodes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--address", required=True)
    parser.add_argument("--units", type=int, default=60)
    given = parser.parse_args()
    made = sleepy(given.out, given.units, 0.5, address=given.address, num_cpus=1, autoscale=True, max=3)
    seen: list[int] = []
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.25):
            seen.append(n_workers())

    with service.cluster(made.sweep.config.execution):
        seen.append(n_workers())
        watcher = threading.Thread(target=look)
        watcher.start()
        messages: list[str] = []
        try:
            with awake():
                service.run(made, lambda stage, progress: None, messages.append)  # type: ignore[arg-type]
            n_at_end, began_s = n_workers(), time.monotonic()
            while n_workers() and time.monotonic() - began_s < LONGEST_S:
                time.sleep(0.5)
        finally:
            over.set()
            watcher.join()
        told = {"first": seen[0], "most": max(seen), "at_end": n_at_end, "last": n_workers(), "messages": messages}
        print(json.dumps(told))
    assert not ray.is_initialized()


if __name__ == "__main__":
    main()
