"""The page in a real browser: Chromium, headless. Without one, these tests are skipped with that reason."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mae.report.reading import read_run
from mae.report.run import report
from mae.training.run_folder.folder import RunFolder
from tests.browser import NAMES, Page, find_chromium, with_page
from tests.report.runs import log, make_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_chromium() is None,
        reason=f"none of {', '.join(NAMES)} is installed; Debian: apt-get install chromium",
    ),
]
SIZES = [(390, False), (390, True), (1400, False), (1400, True)]


def in_browser(path: Path, width: int, is_dark: bool, look: Callable[[Page], Any], media: str = "") -> Any:
    chromium = find_chromium()
    assert chromium is not None

    async def work(page: Page) -> Any:
        await page.open(path, width, is_dark, media)
        found = await look(page)
        assert page.messages == []
        assert {url.partition(":")[0] for url in page.requests} <= {"file", "data"}
        assert [url for url in page.requests if url.startswith("file")] == [path.resolve().as_uri()]
        return found

    return with_page(chromium, work)


def write(folders: list[RunFolder], path: Path) -> Path:
    path.write_text(report([read_run(folder.path) for folder in folders], torch.device("cpu")))
    return path


@pytest.fixture
def whole(pretrained: RunFolder) -> RunFolder:
    """A run with pictures and evaluations."""
    for step, color in ((100, "red"), (300, "lime"), (500, "blue")):
        Image.new("RGB", (500, 700), color).save(pretrained.pictures / f"step-{step:09d}.png")
        record = {"step": step, "epoch": step / 10, "loss": 1 - step / 1000, "samples": 10, "share_of_time": 0.01}
        log(pretrained, kind="evaluation", **record, knn=0.5, few_shot=0.4, rank=3.0)
    return pretrained


@pytest.mark.parametrize(("width", "is_dark"), SIZES)
def test_a_page_is_whole_at_any_size_in_light_and_dark(
    whole: RunFolder, tmp_path: Path, width: int, is_dark: bool
) -> None:
    async def look(page: Page) -> Any:
        await page.screenshot(tmp_path / "page.png", whole=False)
        return await page.evaluate(
            "({width: document.documentElement.scrollWidth, images: [...document.images].map((i) => i.naturalWidth),"
            " lines: [...document.querySelectorAll('.plot .line')].map((p) => p.getBoundingClientRect().width),"
            " small: [...document.querySelectorAll('p, li, td, .y')].filter((e) => e.offsetParent)"
            "   .map((e) => parseFloat(getComputedStyle(e).fontSize)).filter((size) => size < 10).length,"
            " background: getComputedStyle(document.body).backgroundColor,"
            " nav: document.querySelectorAll('nav a').length,"
            " unnamed: [...document.querySelectorAll('img')].filter((i) => !i.alt).length})"
        )

    found = in_browser(write([whole], tmp_path / "page.html"), width, is_dark, look)
    assert found["width"] <= width
    assert len(found["images"]) > 100
    assert min(found["images"]) > 0
    assert len(found["lines"]) >= 7
    assert min(found["lines"]) > 200
    assert found["small"] == found["unnamed"] == 0
    brightness = np.mean([int(part) for part in found["background"].strip("rgb()").split(",")])
    assert brightness < 50 if is_dark else brightness > 200
    shown = np.asarray(Image.open(io.BytesIO((tmp_path / "page.png").read_bytes())).convert("L"))
    assert shown.std() > 10


def test_the_slider_changes_the_picture_by_keyboard_and_plays(whole: RunFolder, tmp_path: Path) -> None:
    shown = (
        "(() => { const [image, ...more] = [...document.querySelectorAll('.frames img')].filter((i) => i.offsetParent);"
        " const canvas = document.createElement('canvas'); canvas.width = canvas.height = 1;"
        " const context = canvas.getContext('2d'); context.drawImage(image, 0, 0, 1, 1);"
        " return [more.length, document.querySelector('.slider output').textContent,"
        "   ['red', 'lime', 'blue'][[...context.getImageData(0, 0, 1, 1).data].slice(0, 3)"
        "     .reduce((best, v, at, all) => (v > all[best] ? at : best), 0)]]; })()"
    )

    async def look(page: Page) -> list[Any]:
        found = [await page.evaluate(shown)]
        await page.evaluate("document.querySelector('.slider input').focus()")
        for name, code in (("ArrowLeft", 37), ("Home", 36), ("ArrowRight", 39)):
            await page.key(name, code)
            found.append(await page.evaluate(shown))
        await page.evaluate("document.querySelector('.slider button').click()")
        found.append(await page.evaluate("document.querySelector('.slider button').textContent"))
        await page.evaluate("new Promise((done) => setTimeout(done, 1500))")
        return [*found, await page.evaluate(shown)]

    assert in_browser(write([whole], tmp_path / "page.html"), 1400, False, look) == [
        [0, "step 500", "blue"],
        [0, "step 300", "lime"],
        [0, "step 100", "red"],
        [0, "step 300", "lime"],
        "Stop",
        [0, "step 500", "blue"],
    ]


def test_figures_under_the_pointer_and_hidden_lines(tmp_path: Path) -> None:
    name = os.fsdecode(b"<img src=x onerror=alert(1)>\xff")
    runs = [make_run(tmp_path / name, [0.6, 0.5, 0.4]), make_run(tmp_path / "other", [0.7, 0.6])]
    tip = "[...document.querySelectorAll('.tip')].filter((t) => !t.hidden).map((t) => t.innerText)"

    async def look(page: Page) -> list[Any]:
        found = [await page.evaluate(tip)]
        await page.evaluate("document.querySelector('.plot').focus()")
        await page.key("ArrowRight", 39)
        found.append(await page.evaluate(tip))
        await page.evaluate("document.querySelector('.legend button').click()")
        await page.key("Home", 36)
        await page.evaluate("document.querySelector('.plot').focus()")
        await page.key("End", 35)
        found.append(await page.evaluate(tip))
        found.append(await page.evaluate("document.querySelector('.plot g').getBoundingClientRect().width"))
        return found

    before, both, one, width = in_browser(write(runs, tmp_path / "page.html"), 1400, True, look)
    assert before == []
    (text,) = both
    assert text.splitlines()[0] == "epoch 3"
    assert "<img src=x onerror=alert(1)>\\xff 0.4" in text
    assert "other 0.6" in text
    (text,) = one
    assert "onerror" not in text
    assert width == 0


def test_in_print_the_last_picture_and_all_curves_are_there(whole: RunFolder, tmp_path: Path) -> None:
    async def look(page: Page) -> Any:
        return await page.evaluate(
            "[getComputedStyle(document.querySelector('nav')).display, document.querySelectorAll('.plot .line').length,"
            " [...document.querySelectorAll('.frames img')].filter((i) => i.offsetParent).length,"
            " getComputedStyle(document.body).backgroundColor]"
        )

    found = in_browser(write([whole], tmp_path / "page.html"), 800, True, look, media="print")
    assert found[0] == "none"
    assert found[1] >= 7
    assert found[2] == 1
    assert found[3] == "rgb(255, 255, 255)"
