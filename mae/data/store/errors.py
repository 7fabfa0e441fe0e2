"""What can go wrong with a request to a remote store."""

from mae.errors import UserError


class TransientError(Exception):
    """A failure that may pass; its text is fit for messages."""


class OutOfRangeError(TransientError):
    """The object has another length, or another version, than was asked for."""


class RangesIgnoredError(Exception):
    """The server answers a request for a range with the whole object."""


class MissingError(UserError):
    """There is no object of this name."""


class DeniedError(UserError):
    """The object, or the listing, may not be read."""
