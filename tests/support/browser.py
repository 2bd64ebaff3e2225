"""A page in a real browser as wide as a phone, if there is one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

PHONE = {"width": 390, "height": 844}  # CSS pixels


@dataclass
class Opened:
    """A page, what it said to the console, and what it asked the network for besides itself."""

    page: Any
    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@contextmanager
def opened(path: Path) -> Iterator[Opened]:
    """Open a file; skips the test where there is no Chromium, or nothing to drive it with."""
    api = pytest.importorskip("playwright.sync_api")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("there is no Chromium")
    with api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=found, args=flags)
        page = browser.new_page(viewport=PHONE)
        seen = Opened(page)
        page.on("console", lambda message: seen.console.append(message.text))
        page.on("pageerror", lambda error: seen.console.append(str(error)))
        page.on("request", lambda request: seen.requests.append(request.url))
        page.goto(path.as_uri())
        seen.requests.remove(path.as_uri())
        yield seen
        browser.close()


def body_width(seen: Opened) -> int:
    """How wide the page is, in CSS pixels."""
    width: int = seen.page.evaluate("document.documentElement.scrollWidth")
    return width
