"""The page in a real browser; skipped where Gradio or Chromium is not installed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest

from tests.browser import NAMES as BROWSERS
from tests.browser import Page, find_chromium, with_page
from tests.conftest import write_shards
from tests.explore.runs import NAMES, image_file, noise, write_classifier, write_run

pytestmark = [
    pytest.mark.skipif(find_spec("gradio") is None, reason="Gradio is not installed: pip install '.[explore]'"),
    pytest.mark.skipif(
        find_chromium() is None,
        reason=f"none of {', '.join(BROWSERS)} is installed; Debian: apt-get install chromium",
    ),
]
CAPTIONS = "[...document.querySelectorAll('.flow figcaption')].map((each) => each.textContent)"
FILLED = "[...document.querySelectorAll('.flow img')].slice(0, 5).map((each) => each.src).join()"
TEXT = "document.body.innerText"


# Python runs a module of this name at its start.
WATCH = """
import sys
def watch(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        with open({path!r}, "a") as file:
            file.write(f"{{arguments[1][0]}}\\n")
sys.addaudithook(watch)
"""


class Served(NamedTuple):
    """A page that another process serves."""

    url: str
    process: subprocess.Popen[str]
    temporary: Path
    """Where that process keeps its temporary files."""
    hosts: Path
    """Hosts to which it has connected, one a line."""


def serve(folder: Path, run: Path, *words: str) -> Iterator[Served]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    temporary, watching, hosts = folder / "temporary", folder / "watching", folder / "hosts"
    temporary.mkdir()
    watching.mkdir()
    (watching / "sitecustomize.py").write_text(WATCH.format(path=str(hosts)))
    command = [sys.executable, "-m", "mae", "explore", str(run), *words, "--port", str(port), "--workers", "0"]
    # Settings of Gradio that would share the page and open the disk must not matter.
    wrong = {"GRADIO_SHARE": "True", "GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_ALLOWED_PATHS": "/"}
    own = {"TMPDIR": str(temporary), "GRADIO_TEMP_DIR": str(folder), "PYTHONPATH": str(watching)}
    environment = {**os.environ, **wrong, **own}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("explore http://127.0.0.1:"):
                break
        assert process.poll() is None, "".join(said)
        yield Served(f"http://127.0.0.1:{port}/", process, temporary, hosts)
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("explore")
    shards = write_shards(folder / "shards", [8], size=(8, 12), mode="RGB")
    (shards / "classes.txt").write_text("\n".join(NAMES))
    yield from serve(folder, write_run(folder / "<i>run"), str(shards))


def in_browser(served: Served, look: Callable[[Page], Any], width: int = 1400, is_dark: bool = False) -> Any:
    chromium = find_chromium()
    assert chromium is not None

    async def work(page: Page) -> Any:
        await page.open(served.url, width, is_dark)
        await page.wait_for("document.querySelectorAll('.flow img').length >= 15")
        found = await look(page)
        assert messages(page) == []
        outside = [url for url in page.requests if not url.startswith((served.url, "data:", "blob:"))]
        assert outside == []
        return found

    return with_page(chromium, work)


def messages(page: Page) -> list[str]:
    """What the console says, but for a warning of Gradio's own when it closes a stream of events."""
    return [text for text in page.messages if "Method not implemented." not in text]


async def set_slider(page: Page, label: str, value: int) -> None:
    await page.evaluate(
        f"(() => {{ const input = document.querySelector('input[type=range][aria-label*=\"{label}\"]');"
        f" input.value = {value}; for (const kind of ['input', 'change', 'pointerup'])"
        " input.dispatchEvent(new Event(kind, {bubbles: true})); })()"
    )


async def place_of_patch(page: Page, row: int, column: int) -> tuple[float, float]:
    x, y, width, height = await page.evaluate(
        "(() => { const patches = document.querySelector('.brush .patches'); patches.scrollIntoView({block: 'center'});"
        " const box = patches.getBoundingClientRect(); return [box.x, box.y, box.width, box.height]; })()"
    )
    return x + width * (column + 0.5) / 3, y + height * (row + 0.5) / 2


@pytest.mark.parametrize(("width", "is_dark"), [(390, False), (390, True), (1400, False), (1400, True)])
def test_the_page_is_whole_at_any_size_in_light_and_dark(served: Served, width: int, is_dark: bool) -> None:
    async def look(page: Page) -> Any:
        return await page.evaluate(
            "({width: document.documentElement.scrollWidth, text: document.body.innerText, title: document.title,"
            " images: [...document.images].map((each) => each.naturalWidth),"
            " unnamed: [...document.images].filter((each) => !each.alt).length,"
            " background: getComputedStyle(document.body).backgroundColor})"
        )

    found = in_browser(served, look, width, is_dark)
    assert found["width"] <= width
    assert min(found["images"]) > 0
    assert found["unnamed"] == 0
    assert found["title"] == "<i>run"
    for text in ("<i>run", "end of the run", "3 of 6 patches hidden", "Sought among 8 of the 8 images"):
        assert text in found["text"]
    assert "${1+1} {{value}}" in found["text"]  # the class of a neighbour: no template runs in what is shown
    brightness = np.mean([int(part) for part in found["background"].strip("rgb()").split(",")[:3]])
    assert brightness < 50 if is_dark else brightness > 200


def test_sliders_change_the_pictures(served: Served) -> None:
    async def look(page: Page) -> None:
        shown = await page.evaluate(FILLED)
        for label, value, text in (
            ("Checkpoint", 1, "step 10"),
            ("Hidden", 10, "1 of 6 patches hidden"),
            ("Another random mask", 5, "1 of 6 patches hidden"),
            ("Image of the set", 3, "000002.png"),
        ):
            await set_slider(page, label, value)
            await page.wait_for(f"{TEXT}.includes('{text}') && {FILLED} !== `{shown}`")
            shown = await page.evaluate(FILLED)
        heads = "[...document.querySelectorAll('.flow img')].slice(5, 8).map((each) => each.src).join()"
        before = await page.evaluate(heads)
        await set_slider(page, "Block", 1)
        await page.wait_for(f"{heads} !== `{before}`")

    in_browser(served, look)


@pytest.mark.parametrize("width", [390, 1400])
def test_the_brush_hides_and_shows_patches(served: Served, width: int) -> None:
    async def look(page: Page) -> list[str]:
        before = await page.evaluate(FILLED)
        first, second = await place_of_patch(page, 0, 0), await place_of_patch(page, 0, 1)
        await page.drag(first, second)
        await page.wait_for(f"{TEXT}.includes('2 of 6 patches hidden') && {FILLED} !== `{before}`")
        await page.drag(first)
        await page.wait_for(f"{TEXT}.includes('1 of 6 patches hidden')")
        painted = await page.evaluate("[...document.querySelectorAll('.brush i')].map((each) => each.className).join()")
        await set_slider(page, "Image of the set", 4)
        await page.wait_for(f"{TEXT}.includes('000003.png')")
        assert "1 of 6 patches hidden" in await page.evaluate(TEXT)  # the paint stays
        await page.evaluate("[...document.querySelectorAll('button')].find((b) => /paint/.test(b.textContent)).click()")
        await page.wait_for(f"{TEXT}.includes('nothing is painted yet')")
        return str(painted).split(",")

    assert in_browser(served, look, width) == ["", "hidden", "", "", "", ""]


def test_an_upload_takes_the_place_of_the_sample_and_a_bad_one_is_a_sentence(served: Served, tmp_path: Path) -> None:
    good, bad = tmp_path / "<b>own.png", tmp_path / "none.png"
    good.write_bytes(image_file(noise(9, (80, 70))))
    bad.write_text("<script>alert(1)</script>")

    async def look(page: Page) -> None:
        before = await page.evaluate(FILLED)
        await page.choose_file("input[type=file]", good)
        await page.wait_for(f"{TEXT}.includes('your picture') && {FILLED} !== `{before}`")
        await page.evaluate("document.querySelector('[aria-label=Clear], [aria-label=\"Remove this file\"]').click()")
        await page.wait_for(f"{TEXT}.includes('000000.png') && {FILLED} === `{before}`")
        await page.choose_file("input[type=file]", bad)
        await page.wait_for(f"{TEXT}.includes('The picture cannot be used: it is not a valid image')")

    in_browser(served, look)


def refused(url: str, **headers: str) -> int:
    try:
        with urlopen(Request(url, headers=headers), timeout=20) as answer:
            return int(answer.status)
    except HTTPError as error:
        return error.code


def test_the_disk_is_not_served_and_other_names_of_this_machine_are_refused(served: Served, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    for path in (secret, Path(__file__), Path("/etc/passwd")):
        assert refused(f"{served.url}gradio_api/file={path}") in (403, 404)
    assert refused(served.url) == 200
    assert refused(served.url, Host="attacker.example") == 400
    with urlopen(served.url, timeout=20) as answer:
        assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
        assert b"googleapis" not in answer.read()
    with socket.socket() as other, pytest.raises(OSError, match="refused"):
        other.connect(("127.0.0.2", int(served.url.rsplit(":", 1)[1].strip("/"))))


def test_the_server_itself_connects_to_nothing_but_itself(served: Served) -> None:
    in_browser(served, lambda page: page.evaluate("1"))
    assert set(served.hosts.read_text().split()) == {"127.0.0.1"}  # Gradio looks whether it answers


@pytest.mark.parametrize(
    ("place", "answer"),
    [("http://example.com/a.png", "not fetched from an address"), (__file__, '"success":false')],
    ids=["address", "file"],
)
def test_a_request_made_by_hand_names_no_address_and_no_file(served: Served, place: str, answer: str) -> None:
    with urlopen(f"{served.url}config", timeout=20) as config:
        found = json.load(config)["dependencies"]
    (number,) = (each["id"] for each in found if each["api_name"] == "choose")
    data = [{"path": place, "meta": {"_type": "gradio.FileData"}}, 1]
    body = json.dumps({"data": data, "fn_index": number, "session_hash": "hand"}).encode()
    request = Request(f"{served.url}gradio_api/queue/join", body, {"Content-Type": "application/json"})
    with urlopen(request, timeout=20) as joined:
        assert joined.status == 200
    with urlopen(f"{served.url}gradio_api/queue/data?session_hash=hand", timeout=20) as events:
        done = next(line.decode() for line in events if b"process_completed" in line)
    assert answer in done
    assert '"success":false' in done


def test_a_classifier_without_a_set_says_what_it_lacks_and_ends_cleanly(tmp_path: Path) -> None:
    picture = tmp_path / "own.png"
    picture.write_bytes(image_file(noise(3)))
    chromium = find_chromium()
    assert chromium is not None
    for served in serve(tmp_path, write_classifier(tmp_path / "tuned"), "--most_megabytes", "0.01"):

        async def work(page: Page, served: Served = served) -> None:
            await page.open(served.url, 1400)
            await page.wait_for(f"{TEXT}.includes('choose a picture of your own')")
            await page.choose_file("input[type=file]", picture)
            await page.wait_for(f"{TEXT}.includes('has no decoder')")
            await page.wait_for(f"{TEXT}.includes('there is no set to search')")
            await page.wait_for(f"{TEXT}.includes('<b>bee</b>')")
            assert messages(page) == []
            too_large = tmp_path / "large.png"
            too_large.write_bytes(bytes(20_000))
            await page.evaluate(
                "document.querySelector('[aria-label=Clear], [aria-label=\"Remove this file\"]').click()"
            )
            await page.wait_for(f"{TEXT}.includes('choose a picture of your own')")
            await page.choose_file("input[type=file]", too_large)
            await page.wait_for(f"{TEXT}.includes('maximum')")

        with_page(chromium, work)
        assert any(served.temporary.iterdir())
        served.process.send_signal(signal.SIGINT)
        until = time.monotonic() + 30
        while served.process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.1)
        assert served.process.returncode == 0
        assert served.process.stdout is not None
        assert served.process.stdout.read() == ""
        assert list(served.temporary.iterdir()) == []
