"""`lgnet-fast serve`: time from the release of the pointer to the drawn fill, many clients, memory.

python -m pytest bench/bench_serve.py --bench-full -s      minutes, on an otherwise idle machine

Every figure is written as a line of JSON to bench/results/MACHINE_serve.jsonl, or to the folder of --bench-results.
The browser is Chromium by Playwright (`make test-page` installs both); without them its bench is skipped.
"""

from __future__ import annotations

import io
import itertools
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from bench.regression import RESULTS, machine_class
from bench.timing import environment
from lgnet_fast import Inpainter
from lgnet_fast.reference import create_model
from tests.page.conftest import BROWSERS, FLAGS
from tests.serve_support import Server, base64_of, file_of, hole, photo, pixels_of

pytestmark = pytest.mark.full

STROKES = 20
CLIENTS, REQUESTS = 8, 50
SIZES = [(96, 120), (200, 180), (256, 256), (300, 420), (512, 512)]
PICTURES, SESSIONS = 300, 50


def metric(text: str, name: str) -> float:
    """The value of a metric in /metrics."""
    found = re.search(rf"^{name} (\S+)", text, re.MULTILINE)
    assert found is not None, name
    return float(found[1])


def percentiles(values: list[float]) -> dict[str, float]:
    p50, p95, p99 = np.percentile(values, [50, 95, 99])
    return {"p50": round(p50, 2), "p95": round(p95, 2), "p99": round(p99, 2), "max": round(max(values), 2)}


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``report(name, **figures)``: prints and stores figures."""
    folder = request.config.getoption("--bench-results") or RESULTS

    def write(name: str, **figures: Any) -> None:
        info = environment()
        line = {"bench": name, **figures, "date": info["date"], "commit": info["commit"]}
        print(json.dumps(line))
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"{machine_class('cpu')}_serve.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    return write


@pytest.fixture(scope="module")
def lgnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an LGNet of the paper's width, n = 64. It is untrained; training does not change its speed."""
    folder = tmp_path_factory.mktemp("models") / "lgnet"
    create_model("lgnet").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(lgnet: Path) -> Iterator[Server]:
    one = Server("--model", "bundled", "--model", f"lgnet={lgnet}")
    yield one
    one.end()


def test_from_release_to_drawn(server: Server, report: Callable[..., None], tmp_path: Path) -> None:
    """Strokes of 100x100 pixels in a photo of 12 megapixels; the page's load until its first picture."""
    playwright = pytest.importorskip("playwright.sync_api")
    browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser_path is None:
        pytest.skip("no Chromium here")
    picture = tmp_path / "photo.jpg"
    picture.write_bytes(file_of(photo(3000, 4000), "JPEG", quality=92))
    report("cold start", seconds=round(server.seconds, 2))
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=FLAGS)
        page = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
        start = time.perf_counter()
        page.goto(server.address)
        page.click("[aria-label='Open the sample chelsea']")
        page.wait_for_selector("body.editing")
        page.wait_for_selector("#status:not([data-kind=busy])")
        first = time.perf_counter() - start
        report("page load to first picture", seconds=round(first, 2))
        p95 = {}
        for model in ("bundled", "lgnet"):
            page.goto(server.address)
            page.wait_for_selector("html.ready", state="attached")
            page.set_input_files("#file", picture)
            page.wait_for_selector("body.editing")
            page.wait_for_selector("#status:not([data-kind=busy])", timeout=60_000)
            page.click("#settings")
            page.select_option("#model", model)
            page.click("#panel-close")
            where = "() => { const l = Konva.stages[0].getLayers()[0]; return [l.x(), l.y(), l.scaleX()]; }"
            x, y, scale = page.evaluate(where)
            page.keyboard.press("r")  # a rectangle is exactly 100x100 pixels
            count = "() => performance.getEntriesByName('lgnet-fill').length"
            for number in range(STROKES + 2):
                left, top = 300 + 600 * (number % 6), 300 + 700 * (number // 6)
                page.mouse.move(x + left * scale, y + top * scale)
                page.mouse.down()
                page.mouse.move(x + (left + 100) * scale, y + (top + 100) * scale, steps=4)
                page.mouse.up()
                while page.evaluate(count) <= number:
                    page.wait_for_timeout(20)
            taken = page.evaluate("() => performance.getEntriesByName('lgnet-fill').map((one) => one.duration)")
            last = page.evaluate("() => document.querySelector('#phases').innerText")
            figures = percentiles(taken[2:])  # without the first two, which include planning
            report(f"release to drawn, {model}", milliseconds=figures, strokes=STROKES, last=last.split("\n"))
            p95[model] = figures["p95"]
        browser.close()
    assert first < 3
    assert p95["bundled"] < 300


def test_many_clients(server: Server, report: Callable[..., None]) -> None:
    """Every answer equals that of the same call made alone, none is lost, and /v2/health/live keeps answering."""
    pipe = Inpainter.from_pretrained(None)
    cases = []
    for number, (height, width) in enumerate(SIZES):
        for box in ((30, 50, 40, 70), (60, 90, 20, 60), (10, 40, 80, 110)):
            picture, mask = photo(height, width, number), hole(height, width, box)
            body = {"image": base64_of(file_of(picture)), "mask": base64_of(file_of(mask))}
            cases.append((body, np.asarray(pipe(picture, mask))))
    taken: list[float] = []
    wrong: list[str] = []

    def client(number: int) -> None:
        with httpx.Client(base_url=server.address, timeout=300) as calls:
            for turn in range(REQUESTS):
                body, expected = cases[(7 * number + 11 * turn) % len(cases)]
                start = time.perf_counter()
                answer = calls.post("/api/v1/inpaint", json=body)
                taken.append(1e3 * (time.perf_counter() - start))
                if answer.status_code != 200 or not np.array_equal(pixels_of(answer.content), expected):
                    wrong.append(f"{number}, {turn}: {answer.status_code}")

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    health: list[float] = []
    with httpx.Client(base_url=server.address) as calls:
        while any(thread.is_alive() for thread in threads):
            asked = time.perf_counter()
            assert calls.get("/v2/health/live").status_code == 200
            health.append(1e3 * (time.perf_counter() - asked))
            time.sleep(0.02)
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    text = httpx.get(f"{server.address}/metrics").text
    windows, runs = (metric(text, f"lgnet_batch_windows_{name}") for name in ("sum", "count"))
    report(
        "eight clients",
        requests=len(taken),
        wrong=len(wrong),
        requests_per_second=round(len(taken) / seconds, 2),
        milliseconds=percentiles(taken),
        health_milliseconds=percentiles(health),
        windows_per_run=round(windows / runs, 2),
    )
    assert wrong == []
    assert len(taken) == CLIENTS * REQUESTS
    assert np.percentile(health, 99) < 50


def test_memory_stays(report: Callable[..., None]) -> None:
    """Pictures of several sizes, each opened and filled; no more than SESSIONS stay open."""
    server = Server("--max-sessions", str(SESSIONS))
    process = psutil.Process(server.process.pid)
    sizes = itertools.cycle([(600, 800), (768, 1024), (500, 900)])
    mask = io.BytesIO()
    Image.new("1", (60, 40), 1).save(mask, "PNG")
    resident: list[float] = []
    with httpx.Client(base_url=server.address, timeout=120) as calls:
        for number in range(PICTURES):
            height, width = next(sizes)
            told = calls.post("/api/v1/pictures", content=file_of(photo(height, width, number % 7), "JPEG")).json()
            answer = calls.post(f"/api/v1/pictures/{told['id']}/fill?x=100&y=100", content=mask.getvalue())
            assert answer.status_code == 200
            assert calls.get(f"/api/v1/pictures/{told['id']}/result").status_code == 200
            if number % 25 == 24:
                resident.append(process.memory_info().rss / 2**20)
        text = calls.get("/metrics").text
    opened = int(metric(text, "lgnet_pictures"))
    report("memory", pictures=PICTURES, open=opened, resident_mib=[round(value) for value in resident])
    assert opened == SESSIONS
    assert resident[-1] < 1.05 * resident[3] + 32  # the first hundred pictures fill the sessions and the heap
    assert server.end() == 0
