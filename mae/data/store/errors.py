"""Errors of requests to a remote store, and what to do about those of the operating system."""

import errno

from mae.errors import UserError


class TransientError(Exception):
    """Failure that may pass if the request is repeated; its text is safe to print."""


class UnreachableError(TransientError):
    """Raised when no server answers: its name is unknown, or it refuses connections."""


class OutOfRangeError(TransientError):
    """Raised when an object has another length or version than the request expects."""


class RangesIgnoredError(Exception):
    """Raised when a server answers a request for a range with the whole object."""


class MissingError(UserError):
    """Object that does not exist."""


class DeniedError(UserError):
    """Object or listing that the store does not permit this user to read."""


def remedy_for(error: OSError, otherwise: str) -> str:
    """Return what to do about an error of the operating system that is known here, else `otherwise`."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "raise the limit of open files in the shell that starts the program: ulimit -n 65536"
    return "make it readable for this user" if error.errno in (errno.EACCES, errno.EPERM) else otherwise
