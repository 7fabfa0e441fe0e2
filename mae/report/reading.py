"""What the folder of a run holds, read as if anybody could have written it: what cannot be read is named."""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open

from mae.errors import UserError
from mae.evaluation.online import KIND
from mae.files import read_bounded
from mae.models.description import BEST_FILE, MODEL_FILE
from mae.models.network import head_of
from mae.run_files import METRICS_FILE, SETTINGS_FILE, figures, read_records
from mae.settings import flatten
from mae.tasks.baselines import Baselines, logged_baselines
from mae.training.checkpoints.manifest import step_of
from mae.training.run_folder.folder import EXIT_FILE, SKIPPED_FILE, RunFolder
from mae.training.run_folder.history import read_history
from mae.yaml_files import load_yaml

PRETRAINING, FINETUNING, MODEL_ONLY = "pretraining", "fine-tuning", "model"
_TRAIN = ("epoch", "lr", "loss", "images_per_second", "step_seconds", "data_wait", "tflops", "peak_memory", "seconds")
_EVAL = ("epoch", "accuracy", "loss", "samples")
_ONLINE = ("epoch", "loss", "samples", "share_of_time")
_FIGURES = {*_TRAIN, *_EVAL, *_ONLINE, "knn", "few_shot", "rank"} - {"samples"}
_MOST_BYTES = 1 << 16
# A log that has not changed for longer belongs to a run that was killed.
_SILENCE, _SILENT_LINES = 300.0, 5
_LARGEST = 1e300

T = TypeVar("T")


@dataclass(frozen=True)
class RunFiles:
    """One run, as its folder tells it. All lists are in the order of the log."""

    path: Path
    kind: str
    """`PRETRAINING`, `FINETUNING`, or `MODEL_ONLY` for a folder without settings."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings as they were saved, by full name."""
    train: Sequence[dict[str, Any]] = ()
    """Lines of training, with loss, speed and memory."""
    online: Sequence[dict[str, Any]] = ()
    """Evaluations while pretraining."""
    accuracies: Sequence[dict[str, Any]] = ()
    """Evaluations while fine-tuning."""
    baselines: Baselines | None = None
    ending: dict[str, Any] = field(default_factory=dict)
    """How the last start ended: `reason`, `message`, `time`; empty if nothing is recorded."""
    is_running: bool = False
    history: Sequence[dict[str, Any]] = ()
    """Starts and ends."""
    skipped: Sequence[int] = ()
    """Steps that were skipped, because loss or gradient was not finite."""
    rollback: int | None = None
    """Step to which the run returned once."""
    bad_samples: Sequence[str] = ()
    checkpoints: Sequence[int] = ()
    """Steps of the checkpoints that are kept."""
    pictures: Sequence[Path] = ()
    model: Path | None = None
    """The best model, else the last; None before the end of the run."""
    classes: int | None = None
    """Number of classes of the model; None if it has no head, or is not there."""
    unreadable: Sequence[str] = ()
    """Sentences about files that cannot be read."""

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.name or str(self.path)

    @property
    def evaluations(self) -> Sequence[dict[str, Any]]:
        """Records of the evaluations while training."""
        return self.online if self.kind == PRETRAINING else self.accuracies

    @property
    def total(self) -> int | None:
        """Number of steps of the whole run; None before the first line of the log."""
        epochs = self.number("epochs")
        if epochs is None or not self.train or not self.train[-1]["epoch"] > 0:
            return None
        steps = epochs * float(self.train[-1]["step"]) / float(self.train[-1]["epoch"])
        return math.ceil(steps - 1e-6) if steps < _LARGEST else None

    def number(self, name: str) -> float | None:
        """Return a setting that is a number, else None."""
        value = self.settings.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        return float(value) if abs(value) < _LARGEST else None

    def texts(self, name: str) -> tuple[str, ...]:
        """Return a setting that is a list of texts; empty if it is not."""
        value = self.settings.get(name)
        return tuple(map(str, value)) if isinstance(value, list) else ()


def read_run(path: Path, is_running: bool | None = None) -> RunFiles:
    """Read the folder of a run. Whether it `is_running` is told from the age of its log, unless it is given.

    Raises:
        UserError: if there is no run, no log and no model.
    """
    if not path.is_dir():
        raise UserError(f"{path} {'is a file' if path.exists() else 'does not exist'}; give the folder of a run")
    model = next((path / name for name in (BEST_FILE, MODEL_FILE) if (path / name).is_file()), None)
    if model is None and not any((path / name).exists() for name in (SETTINGS_FILE, METRICS_FILE)):
        raise UserError(
            f"{path} holds no run ({SETTINGS_FILE}, {METRICS_FILE} and {MODEL_FILE} are missing); give the folder of a "
            "run, which mae pretrain and mae finetune call run_dir"
        )
    folder, unreadable = RunFolder(path), list[str]()

    def attempt(read: Callable[[], T]) -> T | None:
        try:
            return read()
        except (UserError, OSError, ValueError) as error:
            unreadable.append(str(error))
            return None

    settings = attempt(lambda: flatten(_yaml(path / SETTINGS_FILE, model))) or {}
    records = attempt(folder.metrics) or []
    if damaged := attempt(lambda: _lines_that_are_no_records(path / METRICS_FILE, len(records))):
        unreadable.append(f"{damaged:,} lines of {METRICS_FILE} are no records; they are left out")
    train = training_lines(records)
    ending = attempt(lambda: _ending(path / EXIT_FILE)) or {}
    rollback = attempt(folder.rollback)
    return RunFiles(
        path=path,
        kind=_kind(settings, records),
        settings=settings,
        train=train,
        online=_evaluations(records, KIND, *_ONLINE),
        accuracies=_evaluations(records, "eval", *_EVAL),
        baselines=logged_baselines(records),
        ending=ending,
        is_running=_seems_running(path / METRICS_FILE, ending, train) if is_running is None else is_running,
        history=attempt(lambda: read_history(path)) or [],
        skipped=sorted({record["step"] for record in attempt(lambda: read_records(path / SKIPPED_FILE)) or []}),
        rollback=None if rollback is None else rollback.step,
        bad_samples=sorted(attempt(folder.bad_samples) or []),
        checkpoints=attempt(lambda: sorted(_steps(folder.checkpoints))) or [],
        pictures=attempt(lambda: sorted(folder.pictures.glob("step-*.png"))) or [],
        model=model,
        classes=None if model is None else attempt(lambda: _classes(model)),
        unreadable=unreadable,
    )


def training_lines(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines of training in which nothing is missing, of the records of a log."""
    return list(map(_with_floats, figures(records, "train", *_TRAIN)))


def _evaluations(records: list[dict[str, Any]], kind: str, *names: str) -> list[dict[str, Any]]:
    return [_with_floats(_only_numbers(record)) for record in figures(records, kind, *names)]


def _with_floats(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record in which each figure that is shown is a float, however it was written; steps stay integers."""
    known = {name: record[name] for name in _FIGURES if isinstance(record.get(name), int | float)}
    return record | {name: float(value) for name, value in known.items() if abs(value) < _LARGEST}


def _kind(settings: dict[str, Any], records: list[dict[str, Any]]) -> str:
    if "head" in settings or "eval_every" in settings or any(record.get("kind") == "eval" for record in records):
        return FINETUNING
    return PRETRAINING if settings or records else MODEL_ONLY


def _only_numbers(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record without figures that are no numbers, since anybody could have written it."""
    return {name: value for name, value in record.items() if figures([record], record["kind"], name)}


def _yaml(path: Path, model: Path | None) -> dict[str, Any]:
    """Return the settings; {} for a model that lies alone in its folder.

    Raises:
        UserError: if they are missing or cannot be read.
    """
    if path.exists():
        return load_yaml(path)
    if model is None or path.with_name(METRICS_FILE).exists():
        raise UserError(f"{path.name} does not exist in the folder")
    return {}


def _lines_that_are_no_records(path: Path, records: int) -> int:
    if not path.exists():
        return 0  # another sentence says so
    with path.open("rb") as file:
        return max(0, sum(line.endswith(b"\n") for line in file) - records)


def _classes(model: Path) -> int | None:
    """Return the number of outputs of a model's head; None if it has none."""
    try:
        with safe_open(model, "pt") as file:
            head = head_of({name: file.get_tensor(name) for name in file.keys() if name.startswith("head.")})  # noqa: SIM118
            return head[1] if head else None
    except SafetensorError as error:
        raise ValueError(f"{model} is damaged: {error}") from None


def _ending(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    found = None
    with suppress(ValueError, RecursionError):
        found = json.loads(read_bounded(path, _MOST_BYTES))
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no record of an end")
    return {name: str(found.get(name, "")) for name in ("reason", "message", "time")}


def _seems_running(log: Path, ending: dict[str, Any], train: Sequence[dict[str, Any]]) -> bool:
    """Return whether no end is recorded and the log has changed a short time ago."""
    if ending or not log.is_file():
        return False
    silence = _SILENCE
    if len(train) > 1:
        silence += _SILENT_LINES * (train[-1]["step"] - train[-2]["step"]) * train[-1]["step_seconds"]
    return time.time() - log.stat().st_mtime < silence


def _steps(checkpoints: Path) -> Iterator[int]:
    for path in checkpoints.iterdir() if checkpoints.is_dir() else ():
        if (step := step_of(path)) is not None:
            yield step
