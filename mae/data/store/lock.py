"""Lock files between processes, and between machines if their shared file system has locks."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

LOCKS_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of a file system that has no locks."""


@contextmanager
def lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Lock the file `path` inside the `with` block, and yield whether this process got the lock.

    If another process holds the lock, wait for it; without `wait`, yield False at once. The operating system
    releases the lock when its holder exits or is killed. Some cluster file systems have no locks: every process
    then gets True, so the code inside the block must be safe to run in several processes at once.
    """
    # Not blocking, because a pipe of this name would wait for a writer.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666)
    try:
        yield _is_locked(descriptor, wait)
    finally:
        os.close(descriptor)


@contextmanager
def lock_folder(folder: Path) -> Iterator[bool]:
    """Lock a folder itself inside the `with` block, and yield whether this process got the lock, as `lock` does.

    False is also yielded if the folder has meanwhile been renamed or removed, by the process that had the lock before.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        is_locked = _is_locked(descriptor, wait=False)
        is_there = os.path.lexists(folder) and os.path.samestat(os.lstat(folder), os.fstat(descriptor))
        yield is_locked and is_there
    finally:
        os.close(descriptor)


def lock_for_process(file: BinaryIO) -> bool:
    """Lock an open file until it is closed, and return whether this process got the lock.

    Unlike that of `lock`, this lock is not inherited by workers, which may outlive a killed process for a moment. A
    file system without locks gives it to every process.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in LOCKS_UNSUPPORTED
    return True


def _is_locked(descriptor: int, wait: bool) -> bool:
    """Lock an open file, and return whether this process has the lock now."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in LOCKS_UNSUPPORTED:
            raise
    return True
