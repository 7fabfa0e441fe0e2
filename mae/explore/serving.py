"""Serve the page, to this machine only unless told otherwise, and without a request to anywhere else."""

import os
import signal
import socket
import tempfile
from ipaddress import ip_address
from threading import Event

from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mae.errors import UserError
from mae.explore.models import RunModels
from mae.explore.page import THEME, asset, build
from mae.explore.picture_set import PictureSet
from mae.output import say

_FIRST_PORT, _PORTS = 7860, 100
# The browser itself then asks no other server for anything, whatever a name may hold or Gradio may want. The scripts of
# Gradio need `eval`, and its image editor blobs.
_POLICY = (
    b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    b"img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; connect-src 'self' data: blob:; "
    b"frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)


class _Policy:
    """Middleware that adds the rules of the page to each answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    (b"content-security-policy", _POLICY),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        await self._app(scope, receive, with_policy)


def serve(
    models: RunModels, pictures: PictureSet | None, title: str, host: str, port: int | None, most_bytes: int
) -> None:
    """Serve the page until Ctrl-C or SIGTERM; uploads are in a folder of their own, which is then removed.

    Raises:
        UserError: if the port is taken, or the host is no address of this machine.
    """
    # Variables of Gradio would share the page, open folders or send figures, whatever is asked for below.
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    end = Event()
    with tempfile.TemporaryDirectory(prefix="mae-explore-") as folder:
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}
        page = build(models, pictures, title)  # the folder is asked for when the page is built
        _, url, _ = page.launch(
            server_name=host,
            server_port=_free_port(host, port),
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            inbrowser=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            run_history=False,
            enable_monitoring=False,
            footer_links=[],
            max_file_size=most_bytes,
            theme=THEME,
            css=asset("explore.css"),
            app_kwargs={"middleware": _middleware(host), "docs_url": None, "redoc_url": None, "openapi_url": None},
        )
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: end.set())
        say(f"explore {url}: Ctrl-C ends it", is_result=True)
        end.wait()
        page.close(verbose=False)


def _middleware(host: str) -> list[Middleware]:
    names = ["127.0.0.1", "localhost", "[::1]"] if _is_loopback(host) else ["*"]
    # A page elsewhere whose name leads to this machine is refused.
    return [Middleware(TrustedHostMiddleware, allowed_hosts=names), Middleware(_Policy)]


def _is_loopback(host: str) -> bool:
    return host == "localhost" or ip_address(socket.gethostbyname(host)).is_loopback


def _free_port(host: str, port: int | None) -> int:
    """Return the port, or the first free one from `_FIRST_PORT` on.

    Raises:
        UserError: if it is taken, all are, or the host is no address of this machine.
    """
    reason = ""
    for candidate in range(_FIRST_PORT, _FIRST_PORT + _PORTS) if port is None else [port]:
        try:
            with socket.create_server((host, candidate)):
                return candidate
        except OSError as error:
            reason = error.strerror or str(error)
    what = f"port {port}" if port is not None else f"none of the ports from {_FIRST_PORT} to {_FIRST_PORT + _PORTS - 1}"
    raise UserError(f"{what} of {host} can be used: {reason}; give another --port or --host")
