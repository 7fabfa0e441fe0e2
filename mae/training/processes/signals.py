"""Requests to stop: SIGTERM from a scheduler, SIGUSR1 from a batch script, Ctrl-C, SIGHUP of a terminal that closes.

The first asks the run to save and exit; the next ends the process at once. Python only runs signal handlers between
two of its own instructions, never while the main thread waits inside a collective or a kernel. So the interpreter's C
handler passes each signal's number at once through a pipe to a thread, which decides.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from mae.errors import is_rank_zero, world_size
from mae.training.processes.first_error import is_in_trouble

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)

# The terminal or the scheduler may signal the whole process group, and the launcher then forwards the same signal.
_SECONDS_OF_ECHOES = 2.0

# Time to notice that the launcher sent SIGTERM because another process has failed.
_SECONDS_TO_FAIL = 0.5


class StopRequest:
    """Request to save and exit."""

    number: int = 0
    """Number of the first signal; 0 without a request."""

    @property
    def reason(self) -> str | None:
        """Name of the first signal; None without a request."""
        return signal.Signals(self.number).name if self.number else None


class StoppedError(BaseException):
    """End of a start by a signal; no `except Exception` on the way stops it."""


@contextmanager
def signals_end_a_start(is_last: bool = False) -> Iterator[None]:
    """Let SIGTERM, SIGUSR1 and SIGHUP raise a `StoppedError` with the signal's name, until the context ends.

    With several processes they end the process at once, as they do by default: the launcher sends SIGTERM to all when
    one has died, which is no preemption. But if this process `is_last`, the others are done. Outside the main thread
    nothing is changed.
    """
    is_alone = is_last or world_size() == 1
    if not is_alone or threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a forked worker, which is to end as by default
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        raise StoppedError(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in _heeded() if number != signal.SIGINT}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn SIGTERM, SIGUSR1, SIGINT and SIGHUP into requests to stop, until the context ends.

    A repeat within two seconds counts as the same signal. After that, any of them ends the process at once with exit
    code 128 + number, even while the main thread is stuck.

    Raises:
        RuntimeError: outside the main thread, or if the context is nested.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("stop_on_signal works in the main thread only")
    if signal.getsignal(signal.SIGTERM) is _leave_it_to_the_thread:
        raise RuntimeError("stop_on_signal is active already")
    request, ended = StopRequest(), threading.Event()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(target=_decide, args=(reader, request, ended), name="stop on signal", daemon=True)
    thread.start()
    wakeup_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    handlers_before = {number: signal.signal(number, _leave_it_to_the_thread) for number in _heeded()}
    try:
        yield request
    finally:
        ended.set()
        for number, handler in handlers_before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(wakeup_before)
        with suppress(BlockingIOError):  # a full pipe wakes the thread as well
            os.write(writer, b"\0")  # closing the pipe would not, for forked workers hold copies
        thread.join()
        os.close(writer)
        os.close(reader)


def _heeded() -> list[signal.Signals]:
    """Return the stop signals that this process heeds: under nohup, the end of the terminal is none."""
    is_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in STOP_SIGNALS if not (is_nohup and number == signal.SIGHUP)]


def _leave_it_to_the_thread(number: int, frame: FrameType | None) -> None:
    """Do nothing; without a Python handler, the number would not be written to the pipe."""


def _leave_the_pipe_to_the_parent() -> None:
    """Detach a forked process from the pipe, so that its signals do not look like the trainer's."""
    if signal.getsignal(signal.SIGTERM) is _leave_it_to_the_thread:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_leave_the_pipe_to_the_parent)


def _decide(reader: int, request: StopRequest, ended: threading.Event) -> None:
    began = 0.0
    while not ended.is_set():
        numbers = os.read(reader, 4096)
        for number in filter(STOP_SIGNALS.__contains__, numbers):  # other signals have other uses, as SIGCHLD in torch
            now = time.monotonic()
            if not request.number:
                request.number, began = number, now
                threading.Thread(target=_announce, args=(request.reason, ended), daemon=True).start()
            elif now - began > _SECONDS_OF_ECHOES:
                os._exit(128 + number)


def _announce(reason: str, ended: threading.Event) -> None:
    """Tell the user, on rank 0, unless a launcher only ends this process because another rank has failed."""
    if not is_rank_zero():
        return
    if world_size() > 1 and (ended.wait(_SECONDS_TO_FAIL) or is_in_trouble()):
        return
    with suppress(OSError, ValueError):  # a closed stderr does not matter
        sys.stderr.write(f"{reason}: the run saves and exits after this step; another signal ends it at once\n")
        sys.stderr.flush()
