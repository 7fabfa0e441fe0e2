"""Atomic, durable file writes: a file appears complete or not at all, and then survives a power cut."""

import os
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file beside `path`, flush it to disk and rename it to `path`."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    sync(part)
    part.rename(path)
    sync(path.parent)


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
