"""Files: writes that are atomic and durable, and reads that nothing can make endless.

A written file appears complete or not at all, and then survives a power cut.
"""

import errno
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO


@contextmanager
def written_atomically(path: Path, shared: bool = False) -> Iterator[BinaryIO]:
    """Yield an open file beside `path`, which at the end is flushed to disk and renamed to `path`.

    With `shared`, other processes may write the same file at the same time. What a process leaves behind that is killed
    meanwhile is then not replaced by the next one.

    Raises:
        OSError: if it cannot be written; it names `path`, and nothing is left behind.
    """
    part = path.with_name(f".{path.name}{f'.{secrets.token_hex(4)}' if shared else ''}.part")
    try:
        with part.open("wb") as file:
            yield file
            flush(file)
        part.rename(path)
        sync(path.parent)
    except BaseException as error:
        with suppress(OSError):
            part.unlink()
        if isinstance(error, OSError):
            error.filename = str(path)  # a failed write names no file
            del error.filename2  # where a rename would have led
        raise


def write_atomically(path: Path, data: bytes, shared: bool = False) -> None:
    """Write a file beside `path`, flush it to disk and rename it to `path`; see `written_atomically`."""
    with written_atomically(path, shared) as file:
        file.write(data)


def try_to_write(folder: Path) -> None:
    """Write a nameless file, and raise an `OSError` if that fails: permissions say nothing about quotas and servers."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"\0")
        file.flush()


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading.

    Raises:
        OSError: if it cannot be opened, or is no regular file: one may wait for ever on a pipe.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_bounded(path: Path, most_bytes: int) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: if it cannot be read, is no regular file, or holds more than `most_bytes`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most_bytes:
            raise OSError(errno.EFBIG, f"it holds more than {most_bytes:,} bytes", str(path))
        return file.read(size)


def unused_name(path: Path, suffix: str) -> Path:
    """Return `path` with `suffix`, and a number if that name is taken."""
    place, number = path.with_name(f"{path.name}{suffix}"), 1
    while os.path.lexists(place):
        number += 1
        place = path.with_name(f"{path.name}{suffix}-{number}")
    return place


def flush(file: BinaryIO) -> None:
    """Flush an open file to disk."""
    file.flush()
    os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Flush a file or a folder to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
