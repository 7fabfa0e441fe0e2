"""Errors of requests to a remote store."""

from mae.errors import UserError


class TransientError(Exception):
    """Failure that may pass if the request is repeated; its text is safe to print."""


class OutOfRangeError(TransientError):
    """Raised when an object has another length or version than the request expects."""


class RangesIgnoredError(Exception):
    """Raised when a server answers a request for a range with the whole object."""


class MissingError(UserError):
    """Object that does not exist."""


class DeniedError(UserError):
    """Object or listing that the store does not permit this user to read."""
