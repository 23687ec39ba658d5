"""Growth from nothing and back: Ray's autoscaler follows what the dispatcher asks for."""

import json
import subprocess
import sys
from pathlib import Path

from heads import started
from sweeps import committed

from polyray.store import Store


def test_a_cluster_without_workers_grows_with_the_backlog_and_shrinks_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with started(tmp_path, n_cpus=0, most_nodes=3) as head:
        done = subprocess.run(
            [sys.executable, "-m", "elastic", str(out), "--address", head.gcs],
            env=head.environment(),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=500,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('{"first"')]
    told = json.loads(line)
    assert (told["first"], told["most"], told["last"]) == (0, 3, 0), told
    assert Store(out).is_finished
    assert len(committed(out, "mine")) == 60
