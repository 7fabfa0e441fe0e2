"""Mistakes a user can mend: one line on stderr, an exit code that says which kind, no traceback."""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

USER_ERROR_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 130

# Long enough for rank 0 to import torch and print before a launcher, alarmed by this rank's exit, kills it.
_SECONDS_LEFT_TO_RANK_ZERO = 20


class UserError(Exception):
    """What was found, what is allowed and what to do, in one line."""

    exit_code: ClassVar[int] = USER_ERROR_EXIT_CODE


class BadDataError(UserError):
    """Data that are lost, damaged, or no longer what was indexed."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint that cannot be read, or cannot be written."""

    exit_code = 4


class PreemptedError(UserError):
    """A run that was asked to stop, and has saved where it stands: the same command goes on."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


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
    """Turn a `UserError` into one line on stderr and its exit code.

    For what every rank meets: rank 0 speaks, the others wait for it, because the launcher ends the whole job as soon
    as the first of them exits. One that is not ended by then has met an error of its own, and says so. What happens
    once the processes can meet is for `mae.training.processes.first_error.errors_said_once`.
    """
    try:
        yield
    except UserError as error:
        if not is_rank_zero():
            time.sleep(_SECONDS_LEFT_TO_RANK_ZERO)
        who = "" if is_rank_zero() else f"rank {os.environ['RANK']}: "
        sys.stderr.write(f"{who}error: {error}\n")
        sys.stderr.flush()
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(INTERRUPTED_EXIT_CODE)
