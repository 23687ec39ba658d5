"""What may import what: the method, the models and the decisions know no Ray, and reading a dataset needs no torch."""

import subprocess
import sys

import pytest

WALLED = ["polyray.kernels", "polyray.psi", "polyray.categorical", "polyray.models", "polyray.probes"]
DECISIONS = [
    "polyray.cluster.plan", "polyray.cluster.dispatch", "polyray.cluster.work", "polyray.cluster.text_memory",
    "polyray.cluster.text_score",
]  # fmt: skip

IMPORT_ALL = """
import importlib, pkgutil, sys
for name in sys.argv[1:]:
    package = importlib.import_module(name)
    inside = [m.name for m in pkgutil.walk_packages(getattr(package, "__path__", []), name + ".")]
    for module in inside:
        importlib.import_module(module)
    print(name, len(inside), "ray" in sys.modules)
"""


def printed(code: str, *args: str) -> str:
    """Standard output of code in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_lies_below_the_cluster_leaves_ray_out() -> None:
    lines = [line.split() for line in printed(IMPORT_ALL, *WALLED, *DECISIONS).splitlines()]
    assert [name for name, _, _ in lines] == WALLED + DECISIONS
    assert all(int(n) > 0 for name, n, _ in lines if name in WALLED)
    assert [name for name, _, with_ray in lines if with_ray != "False"] == []


def test_the_wall_can_be_seen_to_break() -> None:
    assert printed(IMPORT_ALL, "polyray.cluster.actors").split() == ["polyray.cluster.actors", "0", "True"]


def test_a_driver_needs_no_torch() -> None:
    code = "import sys, polyray.cluster.service, polyray.cluster.apart; print('torch' in sys.modules)"
    assert printed(code) == "False\n"


@pytest.mark.parametrize(
    "module",
    [
        "polyray",
        "polyray.cli",
        "polyray.cluster.progress",
        "polyray.report.summary",
        "polyray.view.serve",
        "polyray.export.neuron_records",
    ],
)
def test_reading_a_dataset_needs_neither_torch_nor_ray(module: str) -> None:
    heavy = printed(f"import sys, {module}; print(sorted({{'torch', 'ray', 'transformers'}} & sys.modules.keys()))")
    assert heavy.strip() == "[]"
