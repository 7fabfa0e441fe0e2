"""Requests to stop: SIGTERM of a scheduler, SIGUSR1 of a batch script, Ctrl-C of a person.

The first asks the run to save and leave; the next ends the process at once. Python runs a signal's handler between
two of its own instructions, hence never while the main thread waits inside a collective or a kernel. So a thread
decides, to which the interpreter's C handler passes each signal's number at once, through a pipe.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from mae.errors import is_rank_zero
from mae.training.processes.first_error import is_in_trouble

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

# A launcher forwards what the whole process group has got from the terminal or the scheduler as well.
_SECONDS_OF_ECHOES = 2.0

# In which a process notices that it was sent SIGTERM by a launcher because another one has failed.
_SECONDS_TO_FAIL = 0.5


class StopRequest:
    """Whether, and by what, the run is asked to save and leave."""

    number: int = 0
    """Of the first signal; 0 while nobody asks."""

    @property
    def reason(self) -> str | None:
        """Name of the first signal; None while nobody asks."""
        return signal.Signals(self.number).name if self.number else None


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Let SIGTERM, SIGUSR1 and SIGINT ask for a stop instead of ending the process, until the context ends.

    A repeat within two seconds is an echo of the first; after that, any of them ends the process at once with exit
    code 128 + number, even while the main thread is stuck.

    Raises:
        RuntimeError: outside the main thread, or within itself.
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
    handlers_before = {number: signal.signal(number, _leave_it_to_the_thread) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        ended.set()
        for number, handler in handlers_before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(wakeup_before)
        with suppress(BlockingIOError):  # a full pipe wakes the thread as well
            os.write(writer, b"\0")  # forked workers hold copies of the pipe, so that closing it would not be its end
        thread.join()
        os.close(writer)
        os.close(reader)


def _leave_it_to_the_thread(number: int, frame: FrameType | None) -> None:
    """Without a handler of Python, the number would not be written to the pipe."""


def _leave_the_pipe_to_the_parent() -> None:
    """In a forked process: what it is sent must not look as if the trainer had been sent it."""
    if signal.getsignal(signal.SIGTERM) is _leave_it_to_the_thread:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_leave_the_pipe_to_the_parent)


def _decide(reader: int, request: StopRequest, ended: threading.Event) -> None:
    began = 0.0
    while not ended.is_set():
        numbers = os.read(reader, 4096)
        for number in filter(STOP_SIGNALS.__contains__, numbers):  # others are somebody else's, as SIGCHLD is torch's
            now = time.monotonic()
            if not request.number:
                request.number, began = number, now
                threading.Thread(target=_announce, args=(request.reason, ended), daemon=True).start()
            elif now - began > _SECONDS_OF_ECHOES:
                os._exit(128 + number)


def _announce(reason: str, ended: threading.Event) -> None:
    """Tell the user, on rank 0; but not when a launcher only clears away what an error on another rank has left."""
    if not is_rank_zero():
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and (ended.wait(_SECONDS_TO_FAIL) or is_in_trouble()):
        return
    with suppress(OSError, ValueError):  # a closed stderr changes nothing of what is to be done
        sys.stderr.write(f"{reason}: the run is saved and left after this step; another signal ends it at once\n")
        sys.stderr.flush()
