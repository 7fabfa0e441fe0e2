"""Files of the range cache: complete ranges, and parts that the downloading process keeps locked."""

import fcntl
import os
from pathlib import Path

PART = ".part"


def part_of(path: Path) -> Path:
    """Return the path of the range `path` while it is being downloaded."""
    return path.with_name(path.name + PART)


def open_range(path: Path, size: int) -> int | None:
    """Open the complete range at `path`, mark it as just used, and return its descriptor; None if there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    if os.fstat(descriptor).st_size == size:
        os.utime(descriptor)
        return descriptor
    os.close(descriptor)
    path.unlink(missing_ok=True)
    return None


def lock_part(path: Path) -> int | None:
    """Create and lock the part of the range `path`, waiting for another process if necessary.

    Return its descriptor; None if the range is complete by then, or the folder has been removed.
    """
    part = part_of(path)
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
    except FileNotFoundError:  # eviction removed the folder
        return None
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    if _is_named(descriptor, part):
        if not path.exists():
            return descriptor
        part.unlink()
    unlock_and_close(descriptor)
    return None


def remove_if_abandoned(part: Path) -> bool:
    """Remove a part unless a living process has it locked; return whether it is gone."""
    try:
        descriptor = os.open(part, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    if _is_named(descriptor, part):
        part.unlink()
    unlock_and_close(descriptor)
    return True


def unlock_and_close(descriptor: int) -> None:
    """Unlock and close a file; closing alone would leave it locked if a forked process has the descriptor too."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _is_named(descriptor: int, path: Path) -> bool:
    """Return whether `path` is still the open file; another process may have renamed or removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
