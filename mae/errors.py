"""Mistakes a user can mend: one line on stderr, exit code 2, no traceback."""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

USER_ERROR_EXIT_CODE = 2

# Long enough for rank 0 to import torch and print before a launcher, alarmed by this rank's exit, kills it.
_SECONDS_LEFT_TO_RANK_ZERO = 20


class UserError(Exception):
    """What was found, what is allowed and what to do, in one line."""


class BadImageError(Exception):
    """Why the bytes of one image are of no use; whoever knows the image's name adds it and counts it."""


def first_of(names: Sequence[str], most: int = 5, separator: str = "; ") -> str:
    """The first `most` names, and how many more there are: a message stays one line of readable length."""
    more = len(names) - most
    return separator.join(names[:most]) + (f" and {more} more" if more > 0 else "")


def is_rank_zero() -> bool:
    """Whether this process speaks for the job; known from the launcher before anything is initialised."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a `UserError` into one line on stderr and exit code 2, printed by rank 0 alone.

    Every rank must raise the same error: the others hold their tongue and wait for rank 0 to speak,
    because the launcher ends the whole job as soon as the first of them exits.
    """
    try:
        yield
    except UserError as error:
        if is_rank_zero():
            sys.stderr.write(f"error: {error}\n")
            sys.stderr.flush()
        else:
            time.sleep(_SECONDS_LEFT_TO_RANK_ZERO)
        sys.exit(USER_ERROR_EXIT_CODE)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
