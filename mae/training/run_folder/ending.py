"""Record of how a start of a run ended, for the script that decides about the next; launchers hide exit codes."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from mae.errors import PreemptedError, UserError
from mae.training.processes.first_error import failure_of
from mae.training.processes.signals import StoppedError, signals_end_a_start
from mae.training.run_folder.compare import differences
from mae.training.run_folder.folder import RunFolder
from mae.training.settings import TrainSettings

FINISHED, PREEMPTED, FAILED = "finished", "preempted", "error"
NOT_EXPORTED = "the run ended before its model was exported; the same command exports it"


def record_failure(folder: RunFolder, error: BaseException) -> None:
    """Record an error that ends a start, if this process is the one that reports it."""
    failure = failure_of(error)
    if failure.is_first:
        folder.record_exit(FAILED, failure.text)


@contextmanager
def failed_start_recorded(settings: TrainSettings) -> Iterator[None]:
    """Record an error that ends a start: a script must not take it for a preemption; a signal that ends it is one.

    Nothing is written into a folder that is not there, that holds no run, or that a run is using. A start that is
    refused because the run has other settings may be a mistake about the folder: it does not change "finished".
    """
    try:
        with signals_end_a_start():
            yield
    except StoppedError as stop:
        text = f"{stop}: stopped before training began; the same command starts again"
        _record(settings, PREEMPTED, text)
        raise PreemptedError(text) from None
    except BaseException as error:
        failure = failure_of(error)
        if failure.is_first:
            _record(settings, FAILED, failure.text)
        raise


def _record(settings: TrainSettings, reason: str, text: str) -> None:
    folder = RunFolder(settings.run_dir)
    with suppress(OSError, UserError):
        if folder.path.is_dir() and (folder.is_begun() or folder.is_new()):
            folder.lock()
            if folder.last_exit() != FINISHED or _is_of(folder, settings):
                folder.record_exit(reason, text)
            folder.unlock()


def _is_of(folder: RunFolder, settings: TrainSettings) -> bool:
    """Return whether the run in the folder has these settings."""
    try:
        asked = folder.with_its_micro_batch(settings)
        return not differences(folder.begun_with(), replace(asked, data=folder.with_its_statistics(asked.data)))
    except UserError:  # its settings cannot be read
        return False
