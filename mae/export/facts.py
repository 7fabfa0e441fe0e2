"""Facts about a model that the files of its run tell: settings, data, results, a picture.

All that is missing, or cannot be read, is left out: an export does not depend on it.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mae.errors import UserError
from mae.export.results import THIS_MODEL, Result, evaluated, measured_in_run
from mae.export.trained_model import TrainedModel
from mae.files import read_bounded
from mae.formats.config_values import mapping
from mae.models.description import BEST_FILE
from mae.models.selection import Selection, read_selection
from mae.run_files import CHECKPOINTS, MANIFEST_FILE, METRICS_FILE, PICTURES, SETTINGS_FILE, figures, read_records
from mae.settings import flatten
from mae.yaml_files import load_yaml

_RESULTS = "results.json"
_MOST_BYTES = 1 << 26
_LARGEST = 1 << 60


@dataclass(frozen=True)
class Facts:
    """What is known about the training of a model; None or empty where it is not."""

    settings: Mapping[str, Any]
    """Settings of the run by full name."""
    step: int | None = None
    """Number of optimiser steps after which the weights were saved."""
    epoch: float | None = None
    """Number of epochs after these steps."""
    samples: int | None = None
    """Number of samples in an epoch."""
    fingerprint: str | None = None
    """Hash of the training samples."""
    results: tuple[Result, ...] = ()
    picture: Path | None = None
    """Newest picture of reconstructions that was drawn until then."""


def facts_of(exported: TrainedModel) -> Facts:
    """Return what the run of a model tells, whose file is in the folder of the run, or in one of its checkpoints."""
    model = exported.path
    run = _run_of(model)
    if run is None:
        return Facts({}, results=_results(exported, None, [], None, {}))
    settings = _settings(run / SETTINGS_FILE)
    selection = _selection(model)
    manifest = _manifest(run, model, selection)
    step = selection.step if selection else _whole(manifest.get("step"))
    records = [record for record in _records(run) if step is None or record["step"] <= step]
    trained = [each for each in figures(records, "train", "epoch") if each["step"] > 0 and each["epoch"] > 0]
    batch = _whole(settings.get("batch_size"))
    fingerprint = mapping(manifest.get("position")).get("fingerprint")
    samples = _samples(trained[-1], batch) if trained and batch else None
    return Facts(
        settings,
        step,
        step * batch / samples if step and batch and samples else None,
        samples,
        fingerprint if isinstance(fingerprint, str) else None,
        _results(exported, run, records, selection, manifest),
        _picture(run, step),
    )


def _samples(record: Mapping[str, Any], batch: int) -> int | None:
    """Return the number of samples in an epoch, by a line of the log."""
    samples = record["step"] * batch / record["epoch"]
    return round(samples) if samples < _LARGEST else None


def _run_of(model: Path) -> Path | None:
    """Return the folder of the run that a model file is from; None if it is from none."""
    folder = model.absolute().parent
    run = folder.parent.parent if folder.parent.name == CHECKPOINTS else folder
    return run if (run / SETTINGS_FILE).is_file() else None


def _settings(path: Path) -> dict[str, Any]:
    with suppress(UserError):
        return flatten(load_yaml(path))
    return {}


def _selection(model: Path) -> Selection | None:
    with suppress(UserError):
        return read_selection(model)
    return None


def _manifest(run: Path, model: Path, selection: Selection | None) -> dict[str, Any]:
    """Return the manifest of the checkpoint that a model is in, else of the run's newest, which has its data."""
    newest = sorted((run / CHECKPOINTS).glob(f"step-*/{MANIFEST_FILE}"))
    own = model.with_name(MANIFEST_FILE)
    for path in [own] if own.is_file() else newest[-1:]:
        with suppress(OSError, ValueError, RecursionError):
            found = json.loads(read_bounded(path, _MOST_BYTES))
            return found if isinstance(found, dict) else {}
    return {}


def _records(run: Path) -> list[dict[str, Any]]:
    with suppress(OSError):
        return read_records(run / METRICS_FILE)
    return []


def _results(
    model: TrainedModel,
    run: Path | None,
    records: list[dict[str, Any]],
    selection: Selection | None,
    manifest: Mapping[str, Any],
) -> tuple[Result, ...]:
    """Return the results of `mae evaluate` for this very file; without any, what the run has measured."""
    found: dict[tuple[str, ...], Result] = {}
    for content in _evaluations(model.path.absolute().parent if run is None else run):
        for result in evaluated(content, model.sha256, selection):
            found.setdefault((result.encoder, result.protocol, result.samples), result)
    if found:
        return tuple(sorted(found.values(), key=lambda result: result.encoder != THIS_MODEL))
    pipeline = mapping(mapping(manifest.get("notes")).get("pipeline"))
    ended_early = "early_end" in pipeline and model.path.name != BEST_FILE
    return measured_in_run(records, selection, ended_early)


def _evaluations(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the content of each evaluation in a folder, in a folder there, or beside it."""
    places = [folder / _RESULTS, *sorted(folder.glob(f"*/{_RESULTS}")), *sorted(folder.parent.glob(f"*/{_RESULTS}"))]
    for path in dict.fromkeys(places):
        with suppress(OSError, ValueError, RecursionError):
            content = json.loads(read_bounded(path, _MOST_BYTES))
            if isinstance(content, dict):
                yield content


def _picture(run: Path, step: int | None) -> Path | None:
    """Return the newest picture that was drawn at `step` or before; names of steps have leading zeros."""
    drawn = [path for path in sorted((run / PICTURES).glob("step-*.png")) if path.is_file()]
    numbered = [path for path in drawn if path.stem[5:].isdecimal() and (step is None or int(path.stem[5:]) <= step)]
    return numbered[-1] if numbered else None


def _whole(value: object) -> int | None:
    """Return a value that is a whole number above 0, and no absurd one; None for any other."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < _LARGEST else None
