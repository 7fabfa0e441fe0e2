"""Names of the files of a run, and the records of its log, read as if anybody could have written them."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from mae.files import open_regular, unused_name, written_atomically

SETTINGS_FILE, METRICS_FILE, MANIFEST_FILE = "settings.yaml", "metrics.jsonl", "manifest.json"
"""Files of a run: its settings and its log, one JSON object a line; and the file that describes a checkpoint."""
CHECKPOINTS, PICTURES = "checkpoints", "pictures"
"""Folders in a run folder."""
UNFINISHED = ".tmp-"
"""Start of the names of checkpoint folders that are being written or removed."""
_MOST_BYTES_OF_A_LINE = 1 << 20
_LARGEST = 1e300
_MOST_STEPS = 1 << 53  # beyond it, a float does not hold each number


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file, without lines that are none; empty if there is no file."""
    return [record for _, record in _lines(path) if record is not None]


def keep_up_to(path: Path, step: int) -> tuple[int, Path] | None:
    """Remove the records of later steps, and lines that are no records, which go into a file beside it.

    Returns:
        The number of lines that are no records, and the file that keeps them; None if there are none.
    """
    bad = sum(record is None for _, record in _lines(path))
    kept = unused_name(path, ".damaged")
    if bad:
        with written_atomically(kept) as file:
            file.writelines(line for line, record in _lines(path) if record is None)
    with written_atomically(path) as file:
        file.writelines(line for line, record in _lines(path) if record is not None and record["step"] <= step)
    return (bad, kept) if bad else None


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Yield each line and its record, None if it is none; a last line that was cut off by a kill is passed over."""
    if not os.path.lexists(path):
        return
    with open_regular(path) as file:
        while line := file.readline(_MOST_BYTES_OF_A_LINE):
            if not line.endswith(b"\n") and len(line) < _MOST_BYTES_OF_A_LINE:
                return
            yield line, _record(line)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_record = isinstance(found, dict) and type(found.get("step")) is int and 0 <= found["step"] < _MOST_STEPS
    return found if is_record and isinstance(found.get("kind", ""), str) else None


def checkpoint_around(path: Path) -> Path | None:
    """Return the checkpoint folder that a path is in, or is; None outside of one. It may hold its own files only."""
    place = Path(os.path.realpath(path))
    folders = (folder for folder in (place, *place.parents) if (folder / MANIFEST_FILE).is_file())
    return next((folder for folder in folders if any(folder.glob("*.safetensors"))), None)


def beside(model: Path, name: str) -> Path:
    """Return the place for results of that name beside a model file.

    Those of a checkpoint are in the folder of its run, or else beside the checkpoint, and have its name.
    """
    folder = checkpoint_around(model)
    if folder is None:
        return model.parent / name
    return (folder.parent.parent if folder.parent.name == CHECKPOINTS else folder.parent) / f"{name}-{folder.name}"


def figures(records: list[dict[str, Any]], kind: str, *names: str) -> list[dict[str, Any]]:
    """Return the records of a kind in which every one of `names` is a number; a loss may be None, if not finite."""
    found = [{"loss": None} | record for record in records if record.get("kind") == kind]
    return [
        record
        for record in found
        if all(is_number(record.get(name)) or (name == "loss" and record[name] is None) for name in names)
    ]


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether a value from a file is a finite number, and no absurd one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST
