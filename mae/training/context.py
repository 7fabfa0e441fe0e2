"""Context of a training: signals, display, trackers, and the record of how it ended."""

from collections.abc import Iterator
from contextlib import contextmanager

from mae.errors import PreemptedError
from mae.training.job import Job
from mae.training.loop import Loop
from mae.training.processes.signals import stop_on_signal
from mae.training.processes.watchdog import StackWatchdog
from mae.training.run_folder.ending import FAILED, FINISHED, NOT_EXPORTED, PREEMPTED, record_failure
from mae.training.trackers.handing_on import END_TIMEOUT, STOP_TIMEOUT, open_trackers


@contextmanager
def training(job: Job) -> Iterator[Iterator[int]]:
    """Take the remaining steps: yield an iterator that yields the number of steps done, before each checkpoint.

    What the caller does in between (a picture, an evaluation) thus becomes part of the next checkpoint, and is repeated
    if the run dies before it. Until the context ends, signals request a checkpoint and an exit. The run folder records
    how the run ended.
    """
    watchdog, trackers, wait = StackWatchdog(job.settings.timeout), None, STOP_TIMEOUT
    try:
        # A launcher repeats signals: they must not end this process before the record of the end is written.
        with stop_on_signal() as stop, _end_recorded(job):
            trackers = open_trackers(job)
            with _shown(job):
                yield Loop(job, stop, watchdog).steps()
        wait = END_TIMEOUT
    except BaseException as error:
        if not isinstance(error, PreemptedError):
            record_failure(job.folder, error)
        raise
    finally:
        watchdog.stop()
        if job.writer is not None:
            job.writer.close()
        if trackers is not None:
            trackers.finish(wait)
        job.folder.unlock()


@contextmanager
def _end_recorded(job: Job) -> Iterator[None]:
    """Record that the run has taken its last step, or was stopped from outside."""
    is_main, export = job.accelerator.is_main_process, job.settings.export.targets
    try:
        yield
    except PreemptedError as end:
        if is_main:
            job.folder.record_exit(PREEMPTED, str(end))
        # As soon as one rank has left, the launcher ends the others.
        job.accelerator.wait_for_everyone()
        raise
    if is_main:
        job.log_lost_output(job.last_step)
        job.folder.record_exit(*((FAILED, NOT_EXPORTED) if export else (FINISHED, job.ending)))


@contextmanager
def _shown(job: Job) -> Iterator[None]:
    """Show the progress of the run, and the checkpoints that are written, while the context lasts."""
    if job.writer is not None:
        job.writer.on_commit.append(job.progress.checkpoint)
    records = job.folder.metrics() if job.accelerator.is_main_process else ()
    with job.progress.running(job.start.step, job.total, records):
        yield
