"""Objects of a web server: fsspec's file system for http and https, made strict."""

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

import aiohttp
import yarl
from fsspec.implementations.http import HTTPFileSystem

from mae.data.store.errors import RangesIgnoredError, TransientError
from mae.data.store.urls import redacted
from mae.errors import UserError

_CHUNK = 1 << 20
_OK, _PARTIAL, _NO_SUCH_RANGE = 200, 206, 416
# Where a machine may ask a cloud for its own credentials.
_METADATA_NETWORKS = tuple(
    ipaddress.ip_network(text) for text in ("169.254.0.0/16", "fe80::/10", "fd00:ec2::254/128", "100.100.100.200/32")
)


class WebFileSystem(HTTPFileSystem):  # type: ignore[misc]  # fsspec has no types
    """As fsspec's, but a range is a range, bytes come as they are stored, and redirects are watched."""

    def __init__(self, **options: Any) -> None:
        super().__init__(get_client=_client, **options)

    async def _info(self, url: str, **_: object) -> dict[str, Any]:
        """Size and version, from the headers of a range of one byte: a signed URL may forbid HEAD."""
        async with await self._get(url, "bytes=0-0", allowed=(_OK, _PARTIAL, _NO_SUCH_RANGE)) as response:
            return {
                "name": url,
                "type": "file",
                "size": _whole_size(response),
                "ETag": response.headers.get("ETag"),
                "LastModified": response.headers.get("Last-Modified"),
            }

    async def _cat_file(self, url: str, start: int, end: int, **_: object) -> bytes:
        """Bytes start..end and at most one more, which tells that there are too many.

        Raises:
            RangesIgnoredError: before the body is read, if more than the range is in it.
        """
        async with await self._get(url, f"bytes={start}-{end - 1}") as response:
            is_whole = response.status == _OK and start == 0 and response.content_length == end
            if response.status == _OK and not is_whole:
                raise RangesIgnoredError
            sent = response.headers.get("Content-Range", "")
            if not is_whole and not sent.startswith(f"bytes {start}-"):
                raise TransientError("the server sent another range than was asked for")
            data = bytearray()
            async for chunk in response.content.iter_any():
                data += chunk[: end - start + 1 - len(data)]
                if len(data) > end - start:
                    break
            return bytes(data)

    async def whole(self, url: str) -> AsyncIterator[bytes]:
        """The object from front to back, a piece at a time."""
        async with await self._get(url) as response:
            async for chunk in response.content.iter_chunked(_CHUNK):
                yield chunk

    async def _get(
        self, url: str, span: str | None = None, allowed: Sequence[int] = (_OK, _PARTIAL)
    ) -> aiohttp.ClientResponse:
        options = {**self.kwargs, "auto_decompress": False}
        options["headers"] = {**self.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
        if span:
            options["headers"]["Range"] = span
        session = await self.set_session()
        response: aiohttp.ClientResponse = await session.get(self.encode_url(url), **options)
        if response.status not in allowed:
            response.close()
            raise aiohttp.ClientResponseError(
                response.request_info, (), status=response.status, message=response.reason or ""
            )
        return response


def _whole_size(response: aiohttp.ClientResponse) -> int | None:
    """Bytes of the object of which `response` holds all or a part; None if the server does not tell."""
    if response.status == _OK:
        return response.content_length
    total = response.headers.get("Content-Range", "").rpartition("/")[2]
    return int(total) if response.status in (_PARTIAL, _NO_SUCH_RANGE) and total.isdigit() else None


async def _client(**options: Any) -> aiohttp.ClientSession:
    """A session whose requests are limited by their callers' deadlines, and whose redirects are watched."""
    watch = aiohttp.TraceConfig()
    watch.on_request_redirect.append(_refuse_dangerous_redirect)
    options.setdefault("timeout", aiohttp.ClientTimeout(total=None))
    return aiohttp.ClientSession(**{**options, "trace_configs": [*options.get("trace_configs", ()), watch]})


async def _refuse_dangerous_redirect(
    _: aiohttp.ClientSession, __: SimpleNamespace, redirect: aiohttp.TraceRequestRedirectParams
) -> None:
    """No redirect leads from https to http, out of the web, or to a cloud's metadata."""
    headers = redirect.response.headers
    target = redirect.url.join(yarl.URL(headers.get("Location") or headers.get("URI") or ""))
    is_web = target.scheme in ("http", "https") and target.host
    if not is_web or (redirect.url.scheme, target.scheme) == ("https", "http") or await _is_metadata(target):
        raise UserError(
            f"{redacted(str(redirect.url))} redirects to {target.scheme}://{target.host or ''}, which is refused; "
            "allowed: http and https, not from https to http, not to a link-local address"
        )


async def _is_metadata(url: yarl.URL) -> bool:
    found = await asyncio.get_running_loop().getaddrinfo(url.host, url.port)
    addresses = [ipaddress.ip_address(str(address[4][0]).partition("%")[0]) for address in found]
    plain = [getattr(address, "ipv4_mapped", None) or address for address in addresses]
    return any(address in network for address in plain for network in _METADATA_NETWORKS)
