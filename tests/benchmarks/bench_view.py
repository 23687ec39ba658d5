"""How long do the viewer's pages over a million neurons take, what does its server hold, and what takes a report?

Run by hand: `python tests/benchmarks/bench_view.py [--json] [--out FOLDER] [--neurons N]`. It makes a census (kept
where a folder is given), starts `polyray view` in a process of its own, and asks for every kind of page
with another filter or sort each time. Then it has `polyray report` write its page.
"""

import argparse
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

N_ASKED = 11
KEYS = ("log_psi", "p", "fdr_q", "S", "Q", "D", "k")
WORDS = ("zebra", "texture", "retriever", "a", "stripe", "surface", "van", "tench", "tie", "moss", "wood")


def questions() -> dict[str, list[str]]:
    """Paths of each kind, all different where that can be."""
    r = range(N_ASKED)
    return {
        "first page": ["/"] * N_ASKED,
        "table": ["/neurons"] * N_ASKED,
        "sort": [f"/neurons?preset={('paper', 'selective')[i % 2]}&sort={'-' * (i % 2)}{KEYS[i % 7]}" for i in r],
        "filter by range": [f"/neurons?min_S={0.1 + i / 100:.2f}&max_p=0.{9 - i % 5}" for i in r],
        "filter by layer and status": [f"/neurons?layer=blocks.{i}&status=excluded" for i in r],
        "filter by name": [f"/neurons?name={word}" for word in WORDS],
        "filter by name and range, sort": [f"/neurons?name={WORDS[i]}&min_Q=0.3&sort=-{KEYS[i % 7]}" for i in r],
        "page in the middle": [f"/neurons?sort=-{KEYS[i % 7]}&page={9000 + i}" for i in r],
        "search": [f"/search?q={word}" for word in WORDS],
        "neuron": [f"/neuron?layer=blocks.{i}&neuron={i % 3 * 37}" for i in r],
    }  # fmt: skip


@contextmanager
def server(out: Path) -> Iterator[tuple[subprocess.Popen[str], int, float]]:
    """`polyray view`, its port, and how long it took to answer."""
    started_s = time.perf_counter()
    command = [sys.executable, "-u", "-m", "polyray.cli", "view", str(out), "--port", "0", "--no-open"]
    env = os.environ | {"PYTHONPATH": str(TESTS.parent)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
        assert found, line
        yield process, int(found[1]), time.perf_counter() - started_s
    finally:
        process.terminate()
        process.wait(60)


def memory(process: subprocess.Popen[str], field: str) -> float:
    """MiB of a process."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]


def timed(port: int, path: str) -> float:
    """Milliseconds until the last byte."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    started_s = time.perf_counter()
    connection.request("GET", path)
    answer = connection.getresponse()
    while answer.read(2**20):
        pass
    seconds = time.perf_counter() - started_s
    assert answer.status == 200, (path, answer.status)
    connection.close()
    return seconds * 1000


def measure(out: Path) -> dict[str, object]:
    """Median and largest time of each kind of page in ms, of the exports in s, and memory in MiB."""
    with server(out) as (process, port, start_s):
        at_start = memory(process, "VmRSS")
        pages = {}
        for kind, paths in questions().items():
            ms = [timed(port, path) for path in paths]
            pages[kind] = {"median_ms": round(statistics.median(ms), 1), "max_ms": round(max(ms), 1)}
        before = memory(process, "VmRSS")
        exports = {name: round(timed(port, f"/neurons.{name}") / 1000, 1) for name in ("csv", "parquet")}
        return {
            "start_s": round(start_s, 1),
            "pages": pages,
            "export_s": exports,
            "rss_at_start_mib": round(at_start),
            "rss_after_pages_mib": round(before),
            "rss_after_exports_mib": round(memory(process, "VmRSS")),
            "peak_rss_mib": round(memory(process, "VmHWM")),
        }


def report(out: Path, target: Path) -> dict[str, float]:
    """Seconds that `polyray report` takes in a process of its own, MiB that it held at most, MB of its page."""
    started_s = time.perf_counter()
    command = [sys.executable, "-m", "polyray.cli", "report", str(out), "--out", str(target)]
    env = os.environ | {"PYTHONPATH": str(TESTS.parent)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env)
    _, status, used = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return {
        "report_s": round(time.perf_counter() - started_s, 1),
        "report_rss_mib": round(used.ru_maxrss / 1024),
        "report_mb": round(target.stat().st_size / 1e6, 2),
    }


def main() -> None:
    from censuses import census

    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--neurons", type=int, default=1_000_000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = asked.out or Path(folder) / "census"
        started_s = time.perf_counter()
        if not out.exists():
            census(out, asked.neurons)
        made_s = time.perf_counter() - started_s
        found = {"n_neurons": asked.neurons, "made_s": round(made_s, 1)} | measure(out)
        found |= report(out, Path(folder) / "report.html")
    if asked.json:
        print(json.dumps(found, indent=1))
        return
    for name, value in found.items():
        if name != "pages":
            print(f"{name:24} {value}")
    for kind, times in found["pages"].items():  # type: ignore[attr-defined]
        print(f"{kind:32} median {times['median_ms']:7.1f} ms, at most {times['max_ms']:7.1f} ms")


if __name__ == "__main__":
    main()
