"""Requests to remote stores through fsspec: each has a deadline, and is repeated after a failure that may pass.

A busy server, a broken or stalled connection, and a short or damaged body may pass. So may a host that does not answer,
if it has answered before; one that never has is given up after some seconds. Any other failure, such as a missing
object or a bad certificate, is reported at once. No message contains a query, a user or a password.
"""

import asyncio
import os
import re
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import fsspec
import fsspec.asyn
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    stop_after_delay,
    wait_exponential,
    wait_random,
)
from tenacity.stop import stop_base

from mae.data.store.errors import (
    DeniedError,
    MissingError,
    OutOfRangeError,
    RangesIgnoredError,
    TransientError,
    UnreachableError,
)
from mae.data.store.urls import PACKAGES, host_of, is_web, redacted, scheme_of
from mae.errors import UserError

ATTEMPTS = 8
FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 30.0
# Even with the longest single request, less than the ten minutes after which the loader gives up on a worker.
SECONDS_IN_ALL = 300.0
UNREACHABLE_SECONDS = 10.0
"""Time in which a host that has never answered must do so."""

_CANCEL_SECONDS = 30.0
_MAX_REASON_LENGTH = 200

_RETRY_LATER = (408, 425, 429)
_RANGE_OR_VERSION_MISMATCH = (412, 416)

_UNTRUSTED = ("CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER")
# Classes of aiohttp, httpx and botocore; the first for a name that DNS does not know.
_UNREACHABLE = ("ClientConnectorDNSError", "ConnectError", "EndpointConnectionError")
_IMPOSSIBLE = ("ParamValidationError", "ProfileNotFound")

# A fork copies the lock of fsspec's event loop. If another thread held it, the child could never acquire it.
os.register_at_fork(after_in_child=fsspec.asyn.reset_lock)

# Keyed by process and package. A child keeps its parent's file systems alive but neither uses nor closes them:
# closing would remove the parent's sockets from the event queue that a fork shares.
_filesystems: dict[tuple[int, str], Any] = {}
# Hosts that have answered, and that have not done so in time; a child knows those of its parent.
_answered: set[str] = set()
_given_up: set[str] = set()

T = TypeVar("T")


def request(url: str, method: str, *, seconds: float, **options: Any) -> Any:
    """Call the file system's `method` for `url`, and return its result within `seconds`.

    Raises:
        TransientError: if another attempt may succeed.
        UserError: if no attempt can succeed.
    """
    with _translate_errors(url):
        filesystem = filesystem_of(url)
        path = filesystem._strip_protocol(url)
        if filesystem.async_impl:
            found = run(filesystem, getattr(filesystem, f"_{method}")(path, **options), seconds)
        else:
            found = getattr(filesystem, method)(path, **options)
        _answered.add(host_of(url))
        return found


def retried(url: str, attempt: Callable[[], T]) -> T:
    """Return the result of `attempt`; repeat it after a `TransientError` while attempts and time are left.

    Raises:
        UserError: if no attempt succeeded; the message gives the last failure.
    """
    host = host_of(url)

    retrying = Retrying(
        stop=stop_after_attempt(ATTEMPTS) | stop_after_delay(SECONDS_IN_ALL) | _StopIfNeverAnswered(host),
        wait=wait_exponential(FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS) + wait_random(0, FIRST_WAIT_SECONDS),
        retry=retry_if_exception_type(TransientError),
        reraise=True,
    )
    try:
        return retrying(attempt)
    except TransientError as error:
        failed = f"{redacted(url)} cannot be read, {retrying.statistics['attempt_number']} attempts failed: {error}; "
        if isinstance(error, UnreachableError) and host not in _answered:
            _given_up.add(host)
            failed += f"this host has never answered and is tried for {UNREACHABLE_SECONDS:g} s only: check its name; "
        raise UserError(f"{failed}check the network and the server, or copy the shards to this machine") from None


class _StopIfNeverAnswered(stop_base):
    """Stop for a host that has never answered, and must have done so before the next attempt."""

    def __init__(self, host: str) -> None:
        self._host = host

    def __call__(self, retry_state: RetryCallState) -> bool:
        error = retry_state.outcome.exception() if retry_state.outcome else None
        if self._host in _answered or not isinstance(error, UnreachableError):
            return False
        seconds = (retry_state.seconds_since_start or 0.0) + retry_state.upcoming_sleep
        return self._host in _given_up or seconds > UNREACHABLE_SECONDS


def forget_listings(url: str) -> None:
    """Drop cached listings, so that the next request about `url` reaches the store."""
    filesystem_of(url).invalidate_cache()


def filesystem_of(url: str) -> Any:
    """Return this process's file system for `url`; fsspec reads credentials and endpoints from the environment.

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
        from mae.data.store.web import WebFileSystem  # noqa: PLC0415 (aiohttp is large, and few runs need it)

        return WebFileSystem
    return fsspec.get_filesystem_class(scheme_of(url))


def run(filesystem: Any, work: Awaitable[T], seconds: float) -> T:
    """Run `work` in the thread of the file system's event loop; cancel it after `seconds`."""
    future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, seconds), filesystem.loop)
    return future.result(seconds + _CANCEL_SECONDS)


def stream(url: str, seconds: float) -> Iterator[bytes]:
    """Yield a web object from front to back in chunks; each chunk must arrive within `seconds`.

    Raises:
        TransientError, UserError: see `request`.
    """
    with _translate_errors(url):
        filesystem = filesystem_of(url)
        chunks = filesystem.read_chunks(url)
        try:
            while chunk := run(filesystem, anext(chunks, b""), seconds):
                yield chunk
        finally:
            run(filesystem, chunks.aclose(), seconds)


@contextmanager
def _translate_errors(url: str) -> Iterator[None]:
    """Translate the errors of a store's package into ours; leave programming errors unchanged."""
    try:
        yield
    except (UserError, TransientError, RangesIgnoredError, TypeError, AttributeError):
        raise
    except Exception as error:
        raise _translate(url, error) from None


def _translate(url: str, error: Exception) -> Exception:
    status, reason = _status(error), _reason(error)
    if status is not None:
        _answered.add(host_of(url))
    if status in _RANGE_OR_VERSION_MISMATCH:
        return OutOfRangeError(reason)
    if (hopeless := _hopeless(redacted(url), error, status, reason)) is not None:
        return hopeless
    refused = isinstance(getattr(error, "os_error", error), ConnectionRefusedError | socket.gaierror)
    return UnreachableError(reason) if refused or type(error).__name__ in _UNREACHABLE else TransientError(reason)


def _hopeless(shown: str, error: Exception, status: int | None, reason: str) -> UserError | None:
    """Return the error for the user if no attempt can succeed, else None."""
    if status in (404, 410) or isinstance(error, FileNotFoundError):
        return MissingError(f"{shown} does not exist; check the name")
    is_denied = isinstance(error, PermissionError) or "Credentials" in type(error).__name__  # botocore
    if is_denied or status in (401, 403) or str(error).startswith("Forbidden"):  # gcsfs
        return DeniedError(
            f"{shown} cannot be read: access denied ({reason}); check the credentials and their permissions"
        )
    if any(word in str(error) for word in _UNTRUSTED):
        return UserError(
            f"{shown} cannot be read, because its certificate is not trusted ({reason}); check the URL, the clock of "
            "this machine and its list of certificates (SSL_CERT_FILE)"
        )
    if isinstance(error, TimeoutError) or status in _RETRY_LATER:
        return None
    is_refused = isinstance(error, ValueError) or type(error).__name__ in _IMPOSSIBLE
    if is_refused or (status is not None and 300 <= status < 500):
        return UserError(f"{shown} cannot be read ({reason}); check the URL")
    return None


def _status(error: BaseException) -> int | None:
    """Return the HTTP status of an error of aiohttp, gcsfs or huggingface_hub, or of its botocore cause; else None."""
    for link in (error, error.__cause__):
        botocore_response = getattr(link, "response", None)
        if isinstance(botocore_response, dict):
            return int(botocore_response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) or None
    for holder, name in ((error, "status"), (getattr(error, "response", None), "status_code"), (error, "code")):
        value = str(getattr(holder, name, ""))  # `code` only if the others are missing: aiohttp deprecates it
        if value.isdigit():
            return int(value)
    return None


def _reason(error: BaseException) -> str:
    """Describe an error in a few words, with the URLs in it redacted."""
    status = _status(error)
    text = str(getattr(error, "message", "") or error).partition("\n")[0]
    text = re.sub(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"]+", lambda url: redacted(url[0]), text)
    text = re.sub(r"\?[^\s'\"]*=[^\s'\"]*", "", text)[:_MAX_REASON_LENGTH]
    name = f"HTTP {status}" if status else type(error).__name__
    return f"{name}: {text}" if text else name
