"""Of a job of several processes, the first error is shown, once.

When one process fails, the others fail soon after: their connections to it break. They may do so at the same moment,
and what they would say is but an echo. So whoever fails first writes its rank into the store where the processes met,
and only that one speaks. A process that has lost contact waits whether another has something better to say; if nobody
has, one was killed or is frozen, and a roll call over the same store tells which.
"""

import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

from torch import distributed
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import DistError

from mae.data.loader import kill_workers, worker_failure
from mae.errors import INTERRUPTED_EXIT_CODE, UserError, first_of, one_line_errors
from mae.training.processes.rendezvous import has_launchers_store, start_word

_SECONDS_TO_CONNECT = 5.0
# Of a rank that is gone, some connections break earlier than others; it may be the one with the store.
_SECONDS_TO_DIE = 0.3
_SECONDS_OF_ROLL_CALL = 5.0
_SECONDS_TO_SPEAK = 15.0
_SECONDS_BEHIND_THE_SPEAKER = 1.0
# For a process whose main thread waits in a collective that the first to fail has left.
_SECONDS_LEFT_TO_THE_STUCK = 20.0
_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_BETWEEN_LOOKS_IN_HASTE = 0.05

# Both libraries name themselves in their errors, which are not always `DistError`s.
_LOST_CONTACT = re.compile(r"\b([Gg]loo|NCCL)\b")


@dataclass(frozen=True)
class Failure:
    """How this process ends."""

    text: str
    """What there is to say."""
    exit_code: int
    is_first: bool
    """Whether this process is the one to say it, on stderr and in the run folder."""


@contextmanager
def errors_said_once() -> Iterator[None]:
    """As `one_line_errors`, for a job of any number of processes, of which any may fail.

    The first to fail speaks, and all leave with its exit code. A job of several ends here, however it went.
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
            # Threads of gloo and of roll calls wait in C++, and the interpreter's end would abort the process there.
            _exit(0)


def failure_of(error: BaseException) -> Failure:
    """What to say of an error that ends this process, and whether this process is the one to say it.

    In a job of several this may take some seconds, and later calls do not change who speaks.
    """
    outcome = _election.held(_is_echo(error))
    mistake = error if isinstance(error, UserError) else worker_failure(error)
    if mistake is not None:
        text, exit_code = f"error: {mistake}", mistake.exit_code
    elif isinstance(error, KeyboardInterrupt):
        text, exit_code = "interrupted", INTERRUPTED_EXIT_CODE
    elif outcome.missing is not None:
        text, exit_code = f"error: {_contact_lost(outcome.missing, error)}", 1
    else:
        trace = "".join(traceback.format_exception(error)).rstrip()
        return Failure(f"{_this_rank()}:\n{trace}" if _can_meet() else trace, 1, outcome.is_first)
    return Failure(f"{_this_rank()}: {text}" if outcome.is_alone else text, exit_code, outcome.is_first)


def is_in_trouble() -> bool:
    """Whether any process of the job has failed, as far as can be known."""
    try:
        return _can_meet() and _meet().check(["trouble"])
    except (DistError, OSError):
        return True


def answer_roll_calls() -> None:
    """Let a thread answer for this process, whatever its main thread waits for, until the job ends.

    When another process has said why the job ends, this one follows, even if its main thread is stuck.
    """
    threading.Thread(target=_answer, name="answer roll calls", daemon=True).start()


def _answer() -> None:
    try:
        store = _meet()
        store.set(f"host/{_rank()}", socket.gethostname())
        _await(store, "trouble")
        store.set(f"here/{_rank()}", "")
        _await(store, "said")
        exit_code = int(store.get("said"))
    except (DistError, OSError):
        return  # the store has ended, and with it the job
    time.sleep(_SECONDS_LEFT_TO_THE_STUCK)
    _exit(exit_code)


def _await(store: Store, note: str) -> None:
    while not store.check([note]):
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        _require_store()


def _appears(store: Store, note: str, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not (found := store.check([note])) and time.monotonic() < until:
        time.sleep(_SECONDS_BETWEEN_LOOKS_IN_HASTE)
    return found


@dataclass(frozen=True)
class _Outcome:
    is_first: bool
    missing: list[str] | None = None
    """After a loss of contact, the ranks that answer no more; none if that is not known."""
    is_alone: bool = False
    """Whether the others could not be asked."""


class _Election:
    """Who speaks for the job; held once in each process."""

    def __init__(self) -> None:
        self._outcome: _Outcome | None = None

    def held(self, is_echo: bool) -> _Outcome:
        if not _can_meet():
            return _Outcome(is_first=True)
        if self._outcome is None:
            _ignore_stop_signals()
            if is_echo:
                time.sleep(_SECONDS_TO_DIE)
            try:
                self._outcome = _elect(is_echo)
            except (DistError, OSError):  # better many voices than none
                self._outcome = _Outcome(is_first=True, missing=[] if is_echo else None, is_alone=True)
        return self._outcome


_election = _Election()


def _elect(is_echo: bool) -> _Outcome:
    store = _meet()
    me = str(_rank())
    store.set("trouble", "")
    store.set(f"here/{me}", "")
    missing = _call_roll(store) if is_echo else None
    return _Outcome(store.compare_set("speaker", "", me) == me.encode(), missing)


def _call_roll(store: Store) -> list[str]:
    """The ranks that do not answer; none if another process comes to speak meanwhile."""
    if _appears(store, "speaker", _SECONDS_OF_ROLL_CALL):
        return []
    absent = [rank for rank in range(int(os.environ["WORLD_SIZE"])) if not store.check([f"here/{rank}"])]
    return [f"{rank} on {_host(store, rank)}" for rank in absent]


def _host(store: Store, rank: int) -> str:
    return store.get(f"host/{rank}").decode() if store.check([f"host/{rank}"]) else "an unknown host"


def _is_echo(error: BaseException) -> bool:
    is_connection = isinstance(error, RuntimeError) and _LOST_CONTACT.search(str(error)) is not None
    return isinstance(error, DistError) or is_connection


def _contact_lost(missing: list[str], error: BaseException) -> str:
    if not missing:
        reason = str(error).splitlines()[0]
        return (
            f"rank {_rank()} lost contact with the others, none of which is known to be gone ({reason}): the network "
            "failed, or a rank took longer than the timeout (its stacks tell where); "
            "the same command goes on from the last checkpoint"
        )
    ranks = f"rank{'s' if len(missing) > 1 else ''} {first_of(missing, separator=', ')}"
    return (
        f"{ranks} of {os.environ['WORLD_SIZE']} ranks answered no more: killed, frozen, or cut off; look at the output "
        "there and at the kernel log (dmesg), which names what was killed for lack of memory; "
        "the same command goes on from the last checkpoint"
    )


def _this_rank() -> str:
    return f"rank {_rank()} of {os.environ['WORLD_SIZE']} on {socket.gethostname()}"


def _leave(failure: Failure) -> NoReturn:
    """End this process: the speaker at once, the others a little later, for the first exit alarms the launcher."""
    _ignore_stop_signals()  # by which the launcher clears away the rest of the job
    exit_code = failure.exit_code
    if failure.is_first:
        _write(failure.text)
    with suppress(DistError, OSError):  # without a store there is nobody to wait for
        store = _meet()
        if failure.is_first:
            store.set("said", str(exit_code))
        else:
            exit_code = _code_of_the_speaker(store, exit_code)
    _exit(exit_code)


def _code_of_the_speaker(store: Store, otherwise: int) -> int:
    if not _appears(store, "said", _SECONDS_TO_SPEAK):
        return otherwise
    time.sleep(_SECONDS_BEHIND_THE_SPEAKER)
    return int(store.get("said"))


def _write(text: str) -> None:
    with suppress(OSError, ValueError):  # nobody listens any more
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def _exit(code: int) -> NoReturn:
    """Leave without the interpreter's own end, which waits for collectives that will never be answered: the
    destructors of process groups, of pinned memory, and threads that are stuck."""
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
    """Whether there is a store in which the processes can leave notes for each other: that of the launcher, or that of
    rank 0 while the process group exists. Never in a job of one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return False
    return distributed.is_initialized() or has_launchers_store()


def _address() -> tuple[str, int]:
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def _require_store() -> None:
    """Raise an `OSError` if the store has ended; asked for anything then, TCPStore itself writes pages to stderr."""
    socket.create_connection(_address(), _SECONDS_TO_CONNECT).close()


def _meet() -> Store:
    """A connection of one's own to the store; notes of other jobs and of earlier starts lie elsewhere in it.

    Raises:
        OSError, DistError: if it has ended.
    """
    _require_store()
    timeout = timedelta(seconds=_SECONDS_TO_CONNECT)
    store = TCPStore(*_address(), is_master=False, wait_for_workers=False, timeout=timeout)
    # Before they have met there is only the launcher's count of starts, which is not the same on all machines.
    start = start_word() or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"mae/{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{start}", store)
