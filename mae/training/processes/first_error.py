"""First error of a job of several processes, printed once.

When one process fails, its connections break, so the others fail soon after: their errors are only echoes. The first
process to fail therefore writes its rank into the store in which the processes met, and only that rank reports. A
process that has lost contact waits for a better explanation from another. If none comes, a rank was killed or is
frozen, and a roll call over the same store finds which.
"""

import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import NoReturn

from torch import distributed
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import DistError

from mae.data.loader import kill_workers, worker_failure
from mae.errors import INTERRUPTED_EXIT_CODE, first_of, is_alone, one_line_errors, user_error_of
from mae.output import one_line
from mae.training.processes.rendezvous import has_launchers_store, start_word

_SECONDS_TO_CONNECT = 5.0
# The process that keeps the store is there, but many ranks at once on few cores wait for its turn.
_SECONDS_TO_BE_ANSWERED = 30.0
# The connections of a dying rank break one after another, and the one to the store may be the last.
_SECONDS_TO_DIE = 0.3
# Ranks answer within a second, but many ranks on few cores wait for their turn: the roll call goes on as long as each
# part of it brings answers. Its end is before that of torchrun's patience, which is 30 seconds.
_SECONDS_OF_ROLL_CALL = 2.5
_LONGEST_ROLL_CALL = 20.0
_SECONDS_TO_REPORT = 15.0
_SECONDS_BEHIND_THE_REPORTER = 1.0
# For a main thread that is stuck in a collective after another rank has failed.
_SECONDS_LEFT_TO_THE_STUCK = 20.0
_POLL_SECONDS = 1.0
_FAST_POLL_SECONDS = 0.05

# Both libraries name themselves in their errors, which are not always `DistError`s.
_LOST_CONTACT = re.compile(r"\b([Gg]loo|NCCL)\b")


@dataclass(frozen=True)
class Failure:
    """End of this process by an error."""

    text: str
    """Message to print."""
    exit_code: int
    is_first: bool
    """Whether this process reports it, on stderr and in the run folder."""


@contextmanager
def errors_said_once() -> Iterator[None]:
    """Report errors as `one_line_errors` does, in a job of any number of processes, any of which may fail.

    Only the first process to fail reports, and all exit with its code. With several processes, the program ends here
    even without an error.
    """
    with one_line_errors():
        try:
            yield
        except SystemExit:
            raise
        except BaseException as error:
            if _can_meet():
                _leave(failure_of(error))
            mistake = worker_failure(error)
            if mistake is None:
                raise
            raise mistake from None
        if _can_meet():
            # Threads of gloo and of the roll call wait in C++, where a normal exit of the interpreter would abort.
            _exit(0)


def failure_of(error: BaseException) -> Failure:
    """Return the report of an error that ends this process, and whether this process is the one to print it.

    With several processes this may take some seconds. Later calls do not change which process reports.
    """
    outcome = _election.outcome(_is_echo(error))
    mistake = user_error_of(error) or worker_failure(error)
    if mistake is not None:
        text, exit_code = f"error: {one_line(str(mistake))}", mistake.exit_code
    elif isinstance(error, KeyboardInterrupt):
        text, exit_code = "interrupted", INTERRUPTED_EXIT_CODE
    elif outcome.missing is not None:
        text, exit_code = f"error: {_contact_lost(outcome.missing, error)}", 1
    else:
        trace = "".join(traceback.format_exception(error)).rstrip()
        return Failure(f"{_this_rank()}:\n{trace}" if _can_meet() else trace, 1, outcome.is_first)
    return Failure(f"{_this_rank()}: {text}" if outcome.is_alone else text, exit_code, outcome.is_first)


def is_in_trouble() -> bool:
    """Return whether any process of the job is known to have failed."""
    try:
        return _can_meet() and _meet().check(["failed"])
    except (DistError, OSError):
        return True


def answer_roll_calls() -> None:
    """Start a thread that answers roll calls for this process, even while its main thread is stuck.

    The thread also ends this process after another has reported why the job ends.
    """
    with suppress(DistError, OSError):
        store = _meet()
        store.set(f"host/{_rank()}", socket.gethostname())
        threading.Thread(target=_answer, args=(store,), name="answer roll calls", daemon=True).start()


def _answer(store: Store) -> None:
    try:
        _await(store, "failed")
        store.set(f"alive/{_rank()}", "")
        _await(store, "exit code")
        exit_code = int(store.get("exit code"))
    except (DistError, OSError):
        return  # the store has ended, and with it the job
    time.sleep(_SECONDS_LEFT_TO_THE_STUCK)
    _exit(exit_code)


def _await(store: Store, note: str) -> None:
    while not store.check([note]):
        time.sleep(_POLL_SECONDS)
        _require_store()


def _appears(store: Store, note: str, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not (found := store.check([note])) and time.monotonic() < until:
        time.sleep(_FAST_POLL_SECONDS)
    return found


@dataclass(frozen=True)
class _Outcome:
    is_first: bool
    missing: list[str] | None = None
    """Ranks that no longer answer, after a loss of contact; empty if unknown."""
    is_alone: bool = False
    """Whether the other ranks could not be reached."""


class _Election:
    """Choice of the rank that reports for the job; takes place once in each process."""

    def __init__(self) -> None:
        self._outcome: _Outcome | None = None

    def outcome(self, is_echo: bool) -> _Outcome:
        if not _can_meet():
            return _Outcome(is_first=True)
        if self._outcome is None:
            _ignore_stop_signals()
            if is_echo:
                time.sleep(_SECONDS_TO_DIE)
            try:
                store, me = _meet(), str(_rank())
                store.set("failed", "")
                store.set(f"alive/{me}", "")
                missing = _call_roll(store) if is_echo else None
                self._outcome = _Outcome(store.compare_set("reporter", "", me) == me.encode(), missing)
            except (DistError, OSError):  # better several reports than none
                self._outcome = _Outcome(is_first=True, missing=[] if is_echo else None, is_alone=True)
        return self._outcome


_election = _Election()


def _call_roll(store: Store) -> list[str]:
    """Return the ranks that do not answer; none if another process reports meanwhile."""
    until = time.monotonic() + _LONGEST_ROLL_CALL
    absent: Sequence[int] = range(int(os.environ["WORLD_SIZE"]))
    before: Sequence[int] = ()
    while absent != before and time.monotonic() < until:
        if _appears(store, "reporter", _SECONDS_OF_ROLL_CALL):
            return []
        absent, before = [rank for rank in absent if not store.check([f"alive/{rank}"])], absent
    return [f"{rank} on {_host(store, rank)}" for rank in absent]


def _host(store: Store, rank: int) -> str:
    return store.get(f"host/{rank}").decode() if store.check([f"host/{rank}"]) else "an unknown host"


def _is_echo(error: BaseException) -> bool:
    """Return whether the error is a lost contact, which another process has caused."""
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and bool(_LOST_CONTACT.search(str(error))))


def _contact_lost(missing: list[str], error: BaseException) -> str:
    if not missing:
        reason = str(error).splitlines()[0]
        return (
            f"rank {_rank()} lost contact with the others, none of which is known to be gone ({reason}): the network "
            "failed, or a rank took longer than the timeout (its stacks show where); "
            "the same command resumes from the last checkpoint"
        )
    ranks = f"rank{'s' if len(missing) > 1 else ''} {first_of(missing, separator=', ')}"
    return (
        f"{ranks} of {os.environ['WORLD_SIZE']} ranks stopped answering: killed, frozen, or cut off; look at the "
        "output there and at the kernel log (dmesg), which names what was killed for lack of memory; "
        "the same command resumes from the last checkpoint"
    )


def _this_rank() -> str:
    return f"rank {_rank()} of {os.environ['WORLD_SIZE']} on {socket.gethostname()}"


def _leave(failure: Failure) -> NoReturn:
    """End this process: the reporter at once, the others a little later, because the first exit alarms the launcher."""
    _ignore_stop_signals()  # with which the launcher ends the rest of the job
    exit_code = failure.exit_code
    if failure.is_first:
        _write(failure.text)
    with suppress(DistError, OSError):  # without a store there is no rank to wait for
        store = _meet()
        if failure.is_first:
            store.set("exit code", str(exit_code))
        else:
            exit_code = _exit_code_of_reporter(store, exit_code)
    _exit(exit_code)


def _exit_code_of_reporter(store: Store, default: int) -> int:
    if not _appears(store, "exit code", _SECONDS_TO_REPORT):
        return default
    time.sleep(_SECONDS_BEHIND_THE_REPORTER)
    return int(store.get("exit code"))


def _write(text: str) -> None:
    with suppress(OSError, ValueError):  # stderr is closed
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def _exit(code: int) -> NoReturn:
    """Exit without the clean-up of the interpreter, which would wait for unanswered collectives, pinned memory and
    stuck threads."""
    kill_workers()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _ignore_stop_signals() -> None:
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)


def _rank() -> int:
    return int(os.environ["RANK"])


def _can_meet() -> bool:
    """Return whether the processes share a store: the launcher's, or rank 0's while the process group exists.

    A job of one process has none.
    """
    if is_alone():
        return False
    return distributed.is_initialized() or has_launchers_store()


def _address() -> tuple[str, int]:
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def _require_store() -> None:
    """Raise an `OSError` if the store has ended, before TCPStore would write pages about it to stderr."""
    socket.create_connection(_address(), _SECONDS_TO_CONNECT).close()


def _meet() -> Store:
    """Return this start's part of the store, apart from other jobs and earlier starts.

    Raises:
        OSError, DistError: if the store has ended.
    """
    _require_store()
    # Before the processes have met, only the launcher's count of restarts is known, which differs between machines.
    start = start_word() or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"mae/{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{start}", _connection(os.getpid(), _address()))


@cache
def _connection(process: int, address: tuple[str, int]) -> Store:
    """Return the connection of this process to the store; all that is asked of it is answered at once."""
    timeout = timedelta(seconds=_SECONDS_TO_BE_ANSWERED)
    return TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timeout)
