"""Objects on a web server, read through a stricter version of fsspec's file system for http and https."""

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
# Addresses at which a cloud gives a machine its credentials.
_METADATA_NETWORKS = tuple(
    ipaddress.ip_network(text) for text in ("169.254.0.0/16", "fe80::/10", "fd00:ec2::254/128", "100.100.100.200/32")
)


class WebFileSystem(HTTPFileSystem):  # type: ignore[misc]  # fsspec has no types
    """HTTP file system with exact ranges, bytes as they are stored, and checked redirects."""

    def __init__(self, **options: Any) -> None:
        super().__init__(get_client=_client, **options)

    async def _info(self, url: str, **_: object) -> dict[str, Any]:
        """Return size and version, from the headers of a one-byte range: a signed URL may forbid HEAD."""
        async with await self._get(url, "bytes=0-0", allowed=(_OK, _PARTIAL, _NO_SUCH_RANGE)) as response:
            return {
                "name": url,
                "type": "file",
                "size": _whole_size(response),
                "ETag": response.headers.get("ETag"),
                "LastModified": response.headers.get("Last-Modified"),
            }

    async def _cat_file(self, url: str, start: int, end: int, **_: object) -> bytes:
        """Return bytes start..end, and one more if the server sends too many.

        Raises:
            RangesIgnoredError: before the body is read, if it holds more than the range.
        """
        async with await self._get(url, f"bytes={start}-{end - 1}") as response:
            is_whole = response.status == _OK and start == 0 and response.content_length == end
            if response.status == _OK and not is_whole:
                raise RangesIgnoredError
            sent = response.headers.get("Content-Range", "")
            if not is_whole and not sent.startswith(f"bytes {start}-"):
                raise TransientError("the server sent a different range than requested")
            data = bytearray()
            async for chunk in response.content.iter_any():
                data += chunk[: end - start + 1 - len(data)]
                if len(data) > end - start:
                    break
            return bytes(data)

    async def read_chunks(self, url: str) -> AsyncIterator[bytes]:
        """Yield the object from front to back in chunks."""
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
    """Return the size in bytes of the object that `response` is about; None if the server does not report it."""
    if response.status == _OK:
        return response.content_length
    total = response.headers.get("Content-Range", "").rpartition("/")[2]
    return int(total) if response.status in (_PARTIAL, _NO_SUCH_RANGE) and total.isdigit() else None


async def _client(**options: Any) -> aiohttp.ClientSession:
    """Return a session that checks redirects and leaves deadlines to its callers."""
    tracing = aiohttp.TraceConfig()
    tracing.on_request_redirect.append(_refuse_dangerous_redirect)
    options.setdefault("timeout", aiohttp.ClientTimeout(total=None))
    return aiohttp.ClientSession(**{**options, "trace_configs": [*options.get("trace_configs", ()), tracing]})


async def _refuse_dangerous_redirect(
    _: aiohttp.ClientSession, __: SimpleNamespace, redirect: aiohttp.TraceRequestRedirectParams
) -> None:
    """Refuse a redirect from https to http, to another scheme, or to a cloud's metadata service."""
    headers = redirect.response.headers
    target = redirect.url.join(yarl.URL(headers.get("Location") or headers.get("URI") or ""))
    is_web = target.scheme in ("http", "https") and target.host
    if not is_web or (redirect.url.scheme, target.scheme) == ("https", "http") or await _is_metadata(target):
        raise UserError(
            f"{redacted(str(redirect.url))} redirects to {target.scheme}://{target.host or ''}, which is refused; "
            "allowed: http and https, but not from https to http or to a link-local address"
        )


async def _is_metadata(url: yarl.URL) -> bool:
    found = await asyncio.get_running_loop().getaddrinfo(url.host, url.port)
    addresses = [ipaddress.ip_address(str(address[4][0]).partition("%")[0]) for address in found]
    plain = [getattr(address, "ipv4_mapped", None) or address for address in addresses]
    return any(address in network for address in plain for network in _METADATA_NETWORKS)
