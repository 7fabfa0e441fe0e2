"""Runs of `mae pretrain` and their files, as the stages read them."""

import hashlib
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .results import FailedError, Figures


def records(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Return the records of a kind in a run's log; a line that a kill cut off is left out."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in found if record["kind"] == kind]


def last_loss(run: Path) -> float:
    """Return the last training loss."""
    return float(records(run)[-1]["loss"])


def checkpoints(run: Path) -> list[Path]:
    """Return the folders of the complete checkpoints, the oldest first."""
    return sorted(path.parent for path in run.glob("checkpoints/step-*/manifest.json"))


def speed(run: Path) -> Figures:
    """Return medians of what a run logs about its speed, without its first record, in which it warms up."""
    names = ("images_per_second", "step_seconds", "data_wait", "mfu", "peak_memory")
    return medians(records(run)[1:] or records(run), names)


def medians(rows: Sequence[Mapping[str, Any]], names: Iterable[str]) -> Figures:
    """Return the median of each figure that the rows have."""
    values = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: statistics.median(found) for name, found in values.items() if found}


def accuracies(evaluation: Path) -> Figures:
    """Return the mean accuracy of each row of an evaluation; the encoder that is judged is a path, and is left out."""
    rows = json.loads((evaluation / "results.json").read_text())["rows"]
    names = {row["encoder"]: "" if Path(row["encoder"]).exists() else f"{row['encoder']}, " for row in rows}
    return {f"{names[row['encoder']]}{row['protocol']}": row["top1"]["mean"] for row in rows}


def tensors_of(path: Path) -> dict[str, bytes]:
    """Return a hash of each tensor in a safetensors file, by name, with its type and shape."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start, found = file.tell(), {}
        for name, about in header.items():
            if name == "__metadata__":
                continue
            first, end = about["data_offsets"]
            file.seek(start + first)
            kind = f"{about['dtype']} {about['shape']}".encode()
            found[name] = hashlib.sha256(kind + file.read(end - first)).digest()
    return found


def different_tensors(one: Path, other: Path) -> list[str]:
    """Return the names of the tensors in which two safetensors files differ."""
    left, right = tensors_of(one), tensors_of(other)
    return sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))


def require_close(what: str, found: float, expected: float, tolerance: float) -> float:
    """Return the relative difference.

    Raises:
        FailedError: if it is above the tolerance, or a number is not finite.
    """
    difference = abs(found / expected - 1)
    if not difference <= tolerance:
        raise FailedError(f"{what} is {found:.6g}, but {expected:.6g} was expected, within {tolerance:.1%}")
    return difference
