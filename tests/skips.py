"""Every reason for which a test may be skipped, in one place."""

from typing import NoReturn

import pytest

SKIPS = {
    "mount": "needs root to hide a folder from a node",
    "small-disk": "needs root to mount a small file system",
    "object-store": "needs boto3 and moto's server (the extras s3 and dev)",
    "chromium": "needs Chromium on the path (Debian: apt-get install chromium)",
    "axe": "needs axe-core in the environment: npm install --no-save --prefix VENV/axe axe-core",
    "research-data": "needs the research data beside the project (../shared/data)",
}


def skip(key: str) -> NoReturn:
    """Skips the running test for a reason of the register."""
    pytest.skip(SKIPS[key])
