"""Requests to remote stores through fsspec: each has a deadline, and is repeated after a failure that may pass.

A server that is busy, a connection that breaks or stalls, a body that is short or damaged may pass. What
cannot, such as a name that does not exist, is told at once. No message holds a query, a user or a password.
"""

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import fsspec
import fsspec.asyn
from tenacity import (
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    stop_after_delay,
    wait_exponential,
    wait_random,
)

from mae.data.store.errors import DeniedError, MissingError, OutOfRangeError, RangesIgnoredError, TransientError
from mae.data.store.urls import PACKAGES, is_web, redacted, scheme_of
from mae.errors import UserError

ATTEMPTS = 8
FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 30.0
# With the longest single request this stays below the ten minutes after which the loader gives a worker up.
SECONDS_IN_ALL = 300.0

_SECONDS_TO_CANCEL = 30.0
_LONGEST_REASON = 200

_TOO_SLOW_OR_TOO_MANY = (408, 425, 429)
_NO_SUCH_RANGE_OR_VERSION = (412, 416)

# fsspec leaves the lock of its event loop as it was at a fork, for ever closed if another thread held it.
os.register_at_fork(after_in_child=fsspec.asyn.reset_lock)

# By process: what a parent opened stays alive in its children but is never used or closed by them, because
# closing would take the parent's sockets off the event queue that a fork shares.
_filesystems: dict[tuple[int, str], Any] = {}

T = TypeVar("T")


def request(url: str, method: str, *, seconds: float, **options: Any) -> Any:
    """One call of the file system's `method` for `url`.

    Raises:
        TransientError: if another attempt may succeed.
        UserError: if none will.
    """
    with _translated(url):
        filesystem = filesystem_of(url)
        path = filesystem._strip_protocol(url)
        if filesystem.async_impl:
            return run(filesystem, getattr(filesystem, f"_{method}")(path, **options), seconds)
        return getattr(filesystem, method)(path, **options)


def retried(url: str, attempt: Callable[[], T]) -> T:
    """What `attempt` returns, made again after each `TransientError` until the attempts or the time are used up.

    Raises:
        UserError: naming the last failure.
    """
    retrying = Retrying(
        stop=stop_after_attempt(ATTEMPTS) | stop_after_delay(SECONDS_IN_ALL),
        wait=wait_exponential(FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS) + wait_random(0, FIRST_WAIT_SECONDS),
        retry=retry_if_exception_type(TransientError),
        reraise=True,
    )
    try:
        return retrying(attempt)
    except TransientError as error:
        raise UserError(
            f"{redacted(url)} cannot be read, {retrying.statistics['attempt_number']} attempts failed: {error}; "
            "check the network and the server, or copy the shards to this machine"
        ) from None


def forget_listings(url: str) -> None:
    """Let the next request about `url` go to the store itself."""
    filesystem_of(url).invalidate_cache()


def filesystem_of(url: str) -> Any:
    """This process's file system for `url`; credentials and end points come from the environment, as for fsspec.

    Raises:
        UserError: if the package that reads such URLs is not installed.
    """
    scheme = scheme_of(url)
    key = os.getpid(), PACKAGES[scheme]
    if key not in _filesystems:
        try:
            _filesystems.setdefault(key, _filesystem_class(url)(use_listings_cache=False))
        except ImportError as error:
            raise UserError(f"{scheme}:// needs another package: pip install {PACKAGES[scheme]} ({error})") from None
    return _filesystems[key]


def _filesystem_class(url: str) -> Any:
    if is_web(url):
        from mae.data.store.web import WebFileSystem  # noqa: PLC0415 (aiohttp is large, and few need it)

        return WebFileSystem
    return fsspec.get_filesystem_class(scheme_of(url))


def run(filesystem: Any, work: Awaitable[T], seconds: float) -> T:
    """Run `work` in the thread of the file system's event loop; it is cancelled when its time is up."""
    future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, seconds), filesystem.loop)
    return future.result(seconds + _SECONDS_TO_CANCEL)


def stream(url: str, seconds: float) -> Iterator[bytes]:
    """A web object from front to back, a piece at a time, each within `seconds`.

    Raises:
        TransientError, UserError: as `request`.
    """
    with _translated(url):
        filesystem = filesystem_of(url)
        pieces = filesystem.whole(url)
        try:
            while piece := run(filesystem, anext(pieces, b""), seconds):
                yield piece
        finally:
            run(filesystem, pieces.aclose(), seconds)


@contextmanager
def _translated(url: str) -> Iterator[None]:
    """Turn what a store's package raises into an error of ours; our own mistakes stay as they are."""
    try:
        yield
    except (UserError, TransientError, RangesIgnoredError, TypeError, AttributeError):
        raise
    except Exception as error:
        raise _translation(url, error) from None


def _translation(url: str, error: Exception) -> Exception:
    status, reason = _status(error), _reason(error)
    if status in (404, 410) or isinstance(error, FileNotFoundError):
        return MissingError(f"{redacted(url)} does not exist; check the name")
    is_denied = isinstance(error, PermissionError) or "Credentials" in type(error).__name__  # the latter of botocore
    if is_denied or status in (401, 403) or str(error).startswith("Forbidden"):  # the latter of gcsfs
        return DeniedError(f"{redacted(url)} may not be read ({reason}); check the credentials and what they permit")
    if status in _NO_SUCH_RANGE_OR_VERSION:
        return OutOfRangeError(reason)
    if isinstance(error, TimeoutError) or status in _TOO_SLOW_OR_TOO_MANY:
        return TransientError(reason)
    if isinstance(error, ValueError) or (status and 300 <= status < 500):
        return UserError(f"{redacted(url)} cannot be read ({reason}); check the URL")
    return TransientError(reason)


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error of aiohttp, gcsfs, huggingface_hub or, as its cause, botocore."""
    for link in (error, error.__cause__):
        from_botocore = getattr(link, "response", None)
        if isinstance(from_botocore, dict):
            return int(from_botocore.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) or None
    for holder, name in ((error, "status"), (getattr(error, "response", None), "status_code"), (error, "code")):
        value = str(getattr(holder, name, ""))  # one after the other: aiohttp warns of its `code`
        if value.isdigit():
            return int(value)
    return None


def _reason(error: BaseException) -> str:
    """An error in a few words, without what may be secret in the URLs that it mentions."""
    status = _status(error)
    text = str(getattr(error, "message", "") or error).partition("\n")[0]
    text = re.sub(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"]+", lambda url: redacted(url[0]), text)
    text = re.sub(r"\?[^\s'\"]*=[^\s'\"]*", "", text)[:_LONGEST_REASON]
    name = f"HTTP {status}" if status else type(error).__name__
    return f"{name}: {text}" if text else name
