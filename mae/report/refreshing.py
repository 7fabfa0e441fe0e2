"""Report of a run that goes on: refreshed at intervals that cost next to nothing, and never the reason for an end."""

import time
from collections.abc import Callable

from mae.output import warn
from mae.report.run import write_run_report
from mae.training.job import Job

_MOST_SHARE = 0.01
_LEAST_SECONDS = 120.0


def report_refresher(job: Job, clock: Callable[[], float] = time.perf_counter) -> Callable[[], None]:
    """Return a function to call after each step; now and then it writes the report, on the main process only.

    The first report is due after two minutes. Each of the others is due when the time since the last one is a hundred
    times what that one took, so that reports take at most 1 % of the time.
    """
    due = clock() + _LEAST_SECONDS

    def refresh() -> None:
        nonlocal due
        began = clock()
        if not job.accelerator.is_main_process or began < due:
            return
        write_report(job, is_running=True)
        due = clock() + max(_LEAST_SECONDS, (clock() - began) / _MOST_SHARE)

    return refresh


def write_report(job: Job, is_running: bool = False) -> None:
    """Write the report of a run on the main process; if that fails, for whatever reason, warn and go on."""
    if not job.accelerator.is_main_process:
        return
    try:
        write_run_report(job.folder, job.accelerator.device, None if is_running else job.ending)
    except Exception as error:
        warn(f"{job.folder.report} is not written: {type(error).__name__}: {error}; `mae report` tries again")
