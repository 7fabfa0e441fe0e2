"""The site that `make docs` has built, in headless Chromium; skipped where there is no browser or no site."""

import asyncio
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from docs.pages import ROOT
from tests.browser import Page, find_chromium, with_page

SITE = ROOT / "build" / "site"
PAGES = ("index", "api", "data", "guides/quickstart", "guides/journey", "guides/comparison", "repository/index")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium"),
    pytest.mark.skipif(not SITE.exists(), reason="no site: make docs"),
]


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *words: Any) -> None:
        """Print nothing."""


@pytest.fixture
def address() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(SITE))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


async def open_page(page: Page, address: str, width: int, is_dark: bool) -> None:
    """Open a page of the server; the settings of the screen are those of an empty page opened before."""
    blank = Path(__file__).parent / "__init__.py"
    await page.open(blank, width, is_dark)
    page.requests.clear()
    page.messages.clear()
    await page.call("Page.navigate", url=address)
    while not await page.evaluate(f"document.readyState == 'complete' && location.href == '{address}'"):
        await asyncio.sleep(0.05)
    await page.evaluate("Promise.all([...document.images].map((image) => image.decode().catch(() => null)))")


def test_pages_ask_nobody_and_fit_the_screen_light_and_dark(address: str) -> None:
    async def look(page: Page) -> None:
        for name in PAGES:
            for width in (390, 1400):
                for is_dark in (False, True):
                    await open_page(page, f"{address}/{name}.html", width, is_dark)
                    assert [url for url in page.requests if not url.startswith((address, "data:", "blob:"))] == []
                    assert page.messages == []
                    assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
                    assert await page.evaluate("[...document.images].every((image) => image.naturalWidth)")
                    scheme = await page.evaluate("document.body.getAttribute('data-md-color-scheme')")
                    assert scheme == ("slate" if is_dark else "default")

    with_page(find_chromium() or "", look)
