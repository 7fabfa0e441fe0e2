"""A page in headless Chromium, driven through its DevTools protocol."""

import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_SECONDS = 60.0


def find_chromium() -> str | None:
    """The path of a Chromium, if this machine has one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """A page, and what the browser said and asked for while it was open."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._number = socket, 0
        self.messages: list[str] = []
        self.requests: list[str] = []

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            answer = await self._socket.receive_json(timeout=_SECONDS)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        method, parameters = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.messages.append(str(parameters["exceptionDetails"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.messages.append(parameters["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.messages.append(str(parameters["args"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])

    async def open(self, place: Path | str, width: int, is_dark: bool = False, media: str = "") -> None:
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        await self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        url = place if isinstance(place, str) else place.resolve().as_uri()
        await self.call("Page.navigate", url=url)
        until = time.monotonic() + _SECONDS
        while await self.evaluate("document.readyState") != "complete" or not await self.evaluate("!!document.body"):
            assert time.monotonic() < until
            await asyncio.sleep(0.05)
        await self.evaluate("Promise.all([...document.images].map((image) => image.decode().catch(() => null)))")

    async def evaluate(self, expression: str) -> Any:
        found = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    async def key(self, name: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            await self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code)

    async def wait_for(self, expression: str) -> Any:
        """Return the value of an expression once it is true."""
        until = time.monotonic() + _SECONDS
        while not (found := await self.evaluate(expression)):
            assert time.monotonic() < until, f"never true: {expression}"
            await asyncio.sleep(0.1)
        return found

    async def drag(self, *places: tuple[float, float]) -> None:
        """Press the mouse at the first place, move it over the others, and let it go at the last."""
        for number, (x, y) in enumerate(places):
            kind = "mousePressed" if number == 0 else "mouseMoved"
            await self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)
        x, y = places[-1]
        await self.call("Input.dispatchMouseEvent", type="mouseReleased", x=x, y=y, button="left", clickCount=1)

    async def choose_file(self, selector: str, path: Path) -> None:
        """Choose a file in the file input that a selector finds."""
        root = await self.call("DOM.getDocument")
        node = await self.call("DOM.querySelector", nodeId=root["root"]["nodeId"], selector=selector)
        await self.call("DOM.setFileInputFiles", nodeId=node["nodeId"], files=[str(path)])

    async def screenshot(self, path: Path, whole: bool = True, kind: str = "png") -> None:
        found = await self.call("Page.captureScreenshot", format=kind, captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))


def with_page(chromium: str, work: Any) -> Any:
    """Return what the coroutine function `work` returns for a new page of a browser that is started for it."""

    async def run(port: int) -> Any:
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                (target, *_) = [each for each in await answer.json(content_type=None) if each["type"] == "page"]
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                coroutine: Coroutine[Any, Any, Any] = work(Page(socket))
                return await coroutine

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [
            chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--hide-scrollbars", "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank",
        ]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port_file, until = Path(folder) / "DevToolsActivePort", time.monotonic() + _SECONDS
            while not (port_file.exists() and port_file.read_text().count("\n")):
                assert process.poll() is None, f"{chromium} ended with exit code {process.returncode}"
                assert time.monotonic() < until, f"{chromium} does not answer"
                time.sleep(0.05)
            return asyncio.run(run(int(port_file.read_text().split()[0])))
        finally:
            process.kill()
            process.wait()


def as_json(value: object) -> str:
    """A value as an expression of the page's script."""
    return json.dumps(value)
