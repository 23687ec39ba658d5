"""The checks of `browser.py` themselves: each can fail."""

from pathlib import Path

import pytest
from browser import Visits, grave_violations
from playwright.sync_api import Browser

GOOD = "<!doctype html><html lang=en><head><title>t</title></head><body><main><h1>t</h1></main></body></html>"
PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACw="


def test_axe_finds_an_image_without_a_text(visit: Visits, tmp_path: Path) -> None:
    for name, html in (("good", GOOD), ("bad", GOOD.replace("<h1>", f"<img src='{PIXEL}'><h1>"))):
        (tmp_path / f"{name}.html").write_text(html)
    assert grave_violations(visit((tmp_path / "good.html").as_uri())) == []
    assert [v.split(":")[0] for v in grave_violations(visit((tmp_path / "bad.html").as_uri()))] == ["image-alt"]


@pytest.mark.parametrize(
    "body", ["<script>nothing()</script>", "<img src=other.png>", "<script>console.error('no')</script>"]
)
def test_a_page_with_an_error_is_told(chromium: Browser, tmp_path: Path, body: str) -> None:
    (tmp_path / "page.html").write_text(GOOD.replace("</main>", body + "</main>"))
    visits = Visits(chromium)
    visits((tmp_path / "page.html").as_uri())
    visits.close()
    assert visits.problems
