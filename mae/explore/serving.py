"""Serve the page, to this machine only unless told otherwise, and without a request to anywhere else."""

import os
import signal
import tempfile
from threading import Event

from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mae.explore.address import Address
from mae.explore.models import RunModels
from mae.explore.page import THEME, asset, build
from mae.explore.picture_set import PictureSet
from mae.output import say

# The browser itself then asks no other server for anything, whatever a name may hold or Gradio may want. Gradio needs
# `eval` for components with a script of their own, such as the brush.
_POLICY = (
    b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    b"img-src 'self' data:; font-src 'self' data:; frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
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


def serve(models: RunModels, pictures: PictureSet | None, title: str, address: Address, most_bytes: int) -> None:
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
            server_name=address.host,
            server_port=address.free_port(),
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
            state_session_capacity=100,  # pictures of so many visitors are remembered
            theme=THEME,
            css=asset("explore.css"),
            app_kwargs={"middleware": _middleware(address), "docs_url": None, "redoc_url": None, "openapi_url": None},
        )
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: end.set())
        say(f"explore {url}: Ctrl-C ends it", is_result=True)
        end.wait()
        page.close(verbose=False)


def _middleware(address: Address) -> list[Middleware]:
    # A page elsewhere whose name leads to this machine is refused.
    names = ["127.0.0.1", "localhost", address.host] if address.is_local else ["*"]
    return [Middleware(TrustedHostMiddleware, allowed_hosts=names), Middleware(_Policy)]
