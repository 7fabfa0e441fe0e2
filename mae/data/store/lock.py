"""Lock files between processes, and between machines if their shared file system has locks."""

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LOCKS_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Lock the file `path` inside the `with` block, and yield whether this process got the lock.

    If another process holds the lock, wait for it; without `wait`, yield False at once. The operating system
    releases the lock when its holder exits or is killed. Some cluster file systems have no locks: every process
    then gets True, so the code inside the block must be safe to run in several processes at once.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            if error.errno not in _LOCKS_UNSUPPORTED:
                raise
        yield True
