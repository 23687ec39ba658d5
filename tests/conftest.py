"""Shapes and types in the kernels' signatures are executed in every test run."""

from jaxtyping import install_import_hook

install_import_hook("polyray.kernels", "beartype.beartype")

pytest_plugins = ["sweeps", "buckets", "browser"]
