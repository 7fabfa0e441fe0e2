"""Export at the end of a run: refused at its start if it cannot succeed, made when the model is published."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mae.errors import PreemptedError, UserError, first_of, user_error_of
from mae.export.exporting import choose_targets, export_model
from mae.export.publish import VERIFICATION_FILE
from mae.export.trained_model import TrainedModel, read_trained_model
from mae.files import read_bounded
from mae.models.description import MODEL_FILE
from mae.models.weights import file_tensors
from mae.training.job import Job
from mae.training.processes.signals import StoppedError, signals_end_a_start
from mae.training.run_folder.ending import FAILED, FINISHED, PREEMPTED
from mae.training.settings import SCRATCH
from mae.training.task import Task

_SETTING = "export.targets"
_MOST_BYTES = 1 << 24


def require_exports(task: Task, say: Callable[[str], None]) -> None:
    """Check that the model of a run can be exported to the targets of its settings.

    Raises:
        UserError: if a target is unknown, cannot hold such a model, or needs a package that is not installed.
    """
    settings = task.settings
    if not settings.export.targets:
        return
    from_scratch: Any = task  # a dataclass, which `Task` does not say
    with torch.device("meta"):  # without memory: only names and shapes are looked at
        network = replace(from_scratch, settings=replace(settings, init=SCRATCH)).build_model()
    model = TrainedModel(settings.run_dir / MODEL_FILE, task.description, file_tensors(network))
    choose_targets(model, settings.export.targets, say, _SETTING)


def export_at_end(job: Job) -> None:
    """Export the published model of a finished run, on rank 0, to folders `export-TARGET` in the run folder.

    An export of this very model that is there stays as it is. Of a fine-tuning that measured its accuracy, the best
    model is exported. `exit.json` says `finished` only when all is exported; until then, it has what `training` left.

    Raises:
        UserError: if an export fails; the others are made, and the model stays.
        PreemptedError: after a signal.
    """
    if not job.settings.export.targets or not job.accelerator.is_main_process:
        return
    folder = job.folder
    folder.lock()
    try:
        with signals_end_a_start(is_last=True):
            _export(job)
        folder.record_exit(FINISHED, job.ending)
    except StoppedError as stop:
        text = f"{stop}: stopped while the model was exported; the same command exports it again"
        folder.record_exit(PREEMPTED, text)
        raise PreemptedError(text) from None
    except UserError as error:
        folder.record_exit(FAILED, f"error: {error}")
        raise
    finally:
        folder.unlock()


def _export(job: Job) -> None:
    run, say = job.folder.path, job.progress.say
    model = read_trained_model(run)
    failures, failed = [], []
    for target in choose_targets(model, job.settings.export.targets, say, _SETTING):
        out = run / f"export-{target.name}"
        if _is_export_of(out, model.sha256):
            say(f"{out} holds {model.path.name} already")
            continue
        try:
            export_model(model, [target.name], out, say)
        except Exception as error:
            failures.append(str(user_error_of(error) or _first_line(error)))
            failed.append(target.name)
    if failed:
        raise UserError(_failure(run, model.path, failures, failed))


def _first_line(error: Exception) -> str:
    """Return the kind of an error and the first of its lines, which may be pages; `mae export` shows them."""
    return f"{type(error).__name__}: {first_of(str(error).splitlines(), most=1)}"


def _failure(run: Path, model: Path, failures: Sequence[str], failed: Sequence[str]) -> str:
    return (
        f"the run is finished and its model is {model}, but it was not exported to {', '.join(failed)}: "
        f"{first_of(failures)}; to try again: mae export {run} --to {' '.join(failed)}"
    )


def _is_export_of(folder: Path, sha256: str) -> bool:
    """Return whether a folder holds an export of the model file with this hash."""
    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        return bool(json.loads(read_bounded(folder / VERIFICATION_FILE, _MOST_BYTES))["model"]["sha256"] == sha256)
    return False
