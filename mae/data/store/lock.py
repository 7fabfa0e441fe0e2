"""A lock between processes, also of several machines where the file system knows locks."""

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NOT_KNOWN_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock that dies with its holder; tells whether it was to be had, which it is where one waits.

    Some cluster file systems have no locks: there it is had at once, and whoever uses it must come to no harm.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            if error.errno not in _NOT_KNOWN_HERE:
                raise
        yield True
