"""A real browser for the page: Debian's Chromium, driven by Playwright; a server with the bundled model.

LGNET_FAST_PAGE=required: no browser is a failure, not a skip. LGNET_FAST_SHOTS=FOLDER keeps the screenshots.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from ..serve_support import live_server

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--no-sandbox", "--disable-lcd-text", "--font-render-hinting=none"]


def _missing(reason: str) -> None:
    if os.environ.get("LGNET_FAST_PAGE") == "required":
        pytest.fail(f"LGNET_FAST_PAGE=required, but {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        _missing("playwright is not installed (make test-page installs it)")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        _missing("there is no Chromium (apt install chromium)")
    with sync_playwright() as driver:
        try:
            browser = driver.chromium.launch(executable_path=path, args=FLAGS)
        except Error as error:
            _missing(f"{path} does not start: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    with live_server() as address:
        yield address


@pytest.fixture
def new_page(browser: Any, server: str, request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """``new_page(path="/", init="", **context options)``: a page that is ready. At the end of the test no request has
    gone to another origin, and no script has failed."""
    contexts, foreign, errors = [], [], []

    def make(path: str = "/", init: str = "", address: str = server, **options: Any) -> Any:
        context = browser.new_context(
            **{"viewport": {"width": 1280, "height": 800}, "color_scheme": "dark"} | options
        )
        context.set_default_timeout(120_000)
        contexts.append(context)

        def check(route: Any) -> None:
            url = urlsplit(route.request.url)
            if url.scheme in ("blob", "data") or f"{url.scheme}://{url.netloc}" == address:
                route.fallback()
            else:
                foreign.append(route.request.url)
                route.abort()

        context.route("**", check)
        if init:
            context.add_init_script(init)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.extend([message.text] if message.type == "error" else []))
        page.expected_errors = []
        page.goto(address + path)
        page.wait_for_selector("html.ready", state="attached")
        return page

    yield make
    expected = [text for context in contexts for page in context.pages for text in page.expected_errors]
    for context in contexts:
        context.close()
    assert foreign == []
    assert [error for error in errors if not any(text in error for text in expected)] == []


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    """Where screenshots go."""
    folder = Path(os.environ.get("LGNET_FAST_SHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
