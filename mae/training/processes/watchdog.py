"""Watchdog: shows where a step is stuck."""

import faulthandler
import sys
import time


class StackWatchdog:
    """Writes the stacks of all threads to stderr when a step takes nearly as long as the timeout of the collectives.

    A timer in C does so, even if the interpreter itself is stuck. Setting it starts a thread, so it is set at most once
    a second.
    """

    def __init__(self, timeout: float) -> None:
        # Before the collectives of the ranks that wait for this one time out and end the job.
        self._seconds = 0.9 * timeout
        self._next_time = 0.0

    def reset(self) -> None:
        """Restart the timer; call this in each step."""
        now = time.monotonic()
        if now >= self._next_time:
            self._next_time = now + min(1.0, self._seconds / 10)
            faulthandler.dump_traceback_later(self._seconds, file=sys.__stderr__ or sys.stderr)

    def stop(self) -> None:
        """Stop the timer."""
        self._next_time = 0.0
        faulthandler.cancel_dump_traceback_later()
