"""Stacks of a step that is stuck."""

import faulthandler
import sys
import time


class StackWatchdog:
    """Writes the stacks of all threads to stderr when a step takes nearly as long as the timeout of the collectives:
    where it is stuck.

    A watch in C does so, even if the interpreter itself is stuck. Setting it takes a thread, so it is set once a
    second at most.
    """

    def __init__(self, timeout: float) -> None:
        # Not later than the collectives of those who wait for this rank, and end the job.
        self._seconds = 0.9 * timeout
        self._next_time = 0.0

    def reset(self) -> None:
        """Begin to count again; to be called in each step."""
        now = time.monotonic()
        if now >= self._next_time:
            self._next_time = now + min(1.0, self._seconds / 10)
            faulthandler.dump_traceback_later(self._seconds, file=sys.__stderr__ or sys.stderr)

    def stop(self) -> None:
        """Watch no longer."""
        self._next_time = 0.0
        faulthandler.cancel_dump_traceback_later()
