"""Files of the range cache: a whole range has its name, and a part is locked by the process that downloads it."""

import fcntl
import os
from pathlib import Path

PART = ".part"


def open_whole(path: Path, size: int) -> int | None:
    """A descriptor of the range at `path`, marked as just used; None if there is none."""
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


def claim(path: Path) -> int | None:
    """A locked descriptor of the part of `path`; None if meanwhile the whole is there, or everything is gone."""
    part = part_of(path)
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
    except FileNotFoundError:  # making room took the folder away
        return None
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    if _is_named(descriptor, part):
        if not path.exists():
            return descriptor
        part.unlink()
    unlock_and_close(descriptor)
    return None


def remove_if_abandoned(part: Path) -> bool:
    """Remove a part whose holder is dead; False if it lives."""
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
    """To close is not enough: a process forked meanwhile has the descriptor too, and with it the lock."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _is_named(descriptor: int, path: Path) -> bool:
    """Whether the open file still has this name: another process may have renamed or removed it before the lock."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def part_of(path: Path) -> Path:
    """Return where the range at `path` is until it is whole."""
    return path.with_name(path.name + PART)
