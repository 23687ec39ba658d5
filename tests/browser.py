"""Pages in a real browser: headless Chromium, with axe-core for accessibility.

`.ci/run` installs both; where one is missing, the tests that need it skip.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright
from skips import skip

AXE = Path(os.environ.get("POLYRAY_AXE", Path(sys.prefix) / "axe/node_modules/axe-core/axe.min.js"))
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


class Visits:
    """Pages opened in fresh profiles, and whatever they did that a page should not.

    Args:
        browser: that opens them.
    """

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self._contexts: list[BrowserContext] = []
        self.problems: list[str] = []

    def __call__(self, address: str, **settings: Any) -> Page:
        """Opens an address; `settings` are those of a browser context (color_scheme, viewport, …)."""
        context = self._browser.new_context(**settings)
        self._contexts.append(context)
        page = context.new_page()
        origin = address if address.startswith("file:") else "/".join(address.split("/")[:3])
        allowed = (origin, "data:", "blob:", "about:")
        told = self.problems.append
        page.on("pageerror", lambda error: told(f"error: {error}"))
        page.on("console", lambda m: told(f"{m.type}: {m.text}") if m.type in ("error", "warning") else None)
        page.on("request", lambda r: None if r.url.startswith(allowed) else told(f"asked for {r.url}"))
        page.goto(address)
        return page

    def close(self) -> None:
        for context in self._contexts:
            context.close()


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """One browser for the whole test run."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        skip("chromium")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Visits]:
    """Opens addresses; the test fails in the end where a page had an error, logged one or a warning, or asked for
    anything beyond the origin (or the file) that was visited."""
    visits = Visits(chromium)
    yield visits
    visits.close()
    assert visits.problems == []


def grave_violations(page: Page) -> list[str]:
    """What axe-core finds of severity serious or critical: rule, and the elements."""
    if not AXE.is_file():
        skip("axe")
    page.evaluate(AXE.read_text())
    found = page.evaluate("() => axe.run()")["violations"]
    return [f"{v['id']}: {[n['target'] for n in v['nodes']]}" for v in found if v["impact"] in ("serious", "critical")]
