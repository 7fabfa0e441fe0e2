"""Errors that a user can correct: one line on stderr and an exit code for the kind of error, without a traceback."""

import errno
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

from mae.output import make_output_safe, one_line

USER_ERROR_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 130

# Long enough for rank 0 to import torch and print before the launcher kills it because this rank has exited.
_SECONDS_FOR_RANK_ZERO = 20

_ROOM = "make room there, or in your quota"
_ALLOWED = "make it readable and writable for this user, or give another place"
_PROCESSES = "raise the number of processes (ulimit -u; docker run --pids-limit), or lower the number of workers"
MACHINE_REMEDIES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f), or give another disk",
    errno.EROFS: "mount it writable, or give another place",
    errno.EACCES: _ALLOWED,
    errno.EPERM: _ALLOWED,
    errno.EAGAIN: _PROCESSES,
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "its links lead round in a circle; mend them, or give another place",
    errno.ENOTDIR: "a part of the path is a file; give another place",
    errno.EISDIR: "a file should be in its place; rename the folder, or give another place",
    errno.EMFILE: "raise the number of open files (ulimit -n)",
    errno.ENFILE: "the machine has too many open files; end other programs",
    errno.EIO: "look at the disk and at the kernel log (dmesg)",
    errno.ESTALE: "the folder has vanished; mount it again",
}
"""What to do about an error of the operating system that no program can help."""
# Words of torch's allocators, of the driver, and of libraries such as cuBLAS, whose errors are of different types.
_MEMORY_IS_FULL = re.compile(r"[^.\n]*(?:out of memory|ALLOC_FAILED|can't allocate memory)[^.\n]*")
_NO_THREAD = "can't start new thread"  # of Python's threading


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


def user_error_of(error: BaseException) -> UserError | None:
    """Return an error that the user can correct, as such; None for any other, which may be a fault of the program."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.errno in MACHINE_REMEDIES:
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        return UserError(f"{where}{what_to_do(error)}")
    if is_out_of_memory(error):
        reason = _MEMORY_IS_FULL.findall(str(error))[0].strip()
        return UserError(
            f"{reason}; end other programs that use the device. "
            "pretrain and finetune: --micro_batch_size auto takes as many images at a time as fit (a run that has "
            "begun keeps its own, so give another run_dir); evaluate: give a smaller --batch_size"
        )
    if isinstance(error, RuntimeError) and str(error) == _NO_THREAD:
        return UserError(f"{error}; {_PROCESSES}")
    if isinstance(error, UnicodeEncodeError):
        name = error.object[max(0, error.start - 20) : error.end + 20]
        return UserError(
            f"the name {name!a} cannot be written in {error.encoding}; "
            "rename it in UTF-8, and start with LC_ALL=C.UTF-8 or PYTHONUTF8=1"
        )
    return None


def what_to_do(error: OSError) -> str:
    """Return what an error of the operating system says, and what to do about it."""
    return f"{error.strerror}; {MACHINE_REMEDIES.get(error.errno or 0, 'look at the disk')}"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether torch, the driver of the device, or one of their libraries found no memory."""
    return isinstance(error, RuntimeError) and bool(_MEMORY_IS_FULL.search(str(error)))


def first_of(names: Sequence[str], most: int = 5, separator: str = "; ") -> str:
    """Join the first `most` names and the number of the others, to keep a message on one readable line."""
    more = len(names) - most
    return separator.join(names[:most]) + (f" and {more} more" if more > 0 else "")


def is_rank_zero() -> bool:
    """Return whether this process has rank 0, by the launcher's `RANK`; works before torch is initialised.

    A process without others has rank 0, whatever is left in `RANK`.
    """
    return is_alone() or os.environ.get("RANK", "0").strip() in ("", "0")


def is_alone() -> bool:
    """Return whether the launcher's `WORLD_SIZE` speaks of one process, or is not set."""
    return os.environ.get("WORLD_SIZE", "1") == "1"


def world_size() -> int:
    """Return the number of processes, by the launcher's `WORLD_SIZE`; works before torch is initialised.

    Raises:
        UserError: if it is no number.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"WORLD_SIZE is {text!r}; allowed: a number of processes, as a launcher sets; unset it")
    return int(text)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a `UserError` into one line on stderr and its exit code; what is printed meanwhile cannot fail.

    This is for errors that all ranks meet. Rank 0 prints and the others wait, because the launcher ends the whole job
    when the first rank exits. A rank that is still alive after the wait prints: rank 0 did not have its error. Once
    the ranks can communicate, use `mae.training.processes.first_error.errors_said_once` instead.
    """
    make_output_safe()
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(INTERRUPTED_EXIT_CODE)
    except Exception as error:
        mistake = user_error_of(error)
        if mistake is None:
            raise
        if not is_rank_zero():
            time.sleep(_SECONDS_FOR_RANK_ZERO)
        who = "" if is_rank_zero() else f"rank {os.environ['RANK']}: "
        sys.stderr.write(f"{who}error: {one_line(str(mistake))}\n")
        sys.stderr.flush()
        sys.exit(mistake.exit_code)
