"""Errors that a user can correct: one line on stderr and an exit code for the kind of error, without a traceback."""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

USER_ERROR_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 130

# Long enough for rank 0 to import torch and print before the launcher kills it because this rank has exited.
_SECONDS_FOR_RANK_ZERO = 20


class UserError(Exception):
    """Error whose one-line message says what was found, what is allowed and what to do."""

    exit_code: ClassVar[int] = USER_ERROR_EXIT_CODE


class BadDataError(UserError):
    """Error for data that are missing, damaged, or changed since they were indexed."""

    exit_code = 3


class CheckpointError(UserError):
    """Error for a checkpoint that cannot be read or written."""

    exit_code = 4


class PreemptedError(UserError):
    """Exit of a run that was told to stop and has saved a checkpoint; the same command resumes it."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


class BadImageError(Exception):
    """Reason why one image cannot be used. The caller adds the name of the image and counts it."""


def first_of(names: Sequence[str], most: int = 5, separator: str = "; ") -> str:
    """Join the first `most` names and the number of the others, to keep a message on one readable line."""
    more = len(names) - most
    return separator.join(names[:most]) + (f" and {more} more" if more > 0 else "")


def is_rank_zero() -> bool:
    """Return whether this process has rank 0, by the launcher's `RANK`; works before torch is initialised."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a `UserError` into one line on stderr and its exit code.

    This is for errors that all ranks meet. Rank 0 prints and the others wait, because the launcher ends the whole job
    when the first rank exits. A rank that is still alive after the wait prints: rank 0 did not have its error. Once
    the ranks can communicate, use `mae.training.processes.first_error.errors_said_once` instead.
    """
    try:
        yield
    except UserError as error:
        if not is_rank_zero():
            time.sleep(_SECONDS_FOR_RANK_ZERO)
        who = "" if is_rank_zero() else f"rank {os.environ['RANK']}: "
        sys.stderr.write(f"{who}error: {error}\n")
        sys.stderr.flush()
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(INTERRUPTED_EXIT_CODE)
