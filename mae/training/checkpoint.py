"""Checkpoints that appear whole or not at all, and are verified before they are trusted.

`step-000000123/` holds `model.safetensors` (the layout of the final model), `optimizer.pt` and, written
last, `manifest.json` with the size and sha256 of both. It is made beside its place, flushed to the disk
file by file, and renamed; only then do older ones go.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mae.data.order import ORDER_VERSION
from mae.errors import UserError
from mae.files import sync, write_atomically
from mae.models.weights import read_weights

FORMAT_VERSION = 1
MODEL_FILE, OPTIMIZER_FILE, MANIFEST_FILE = "model.safetensors", "optimizer.pt", "manifest.json"
_HIDDEN = ".tmp-"
_LIBRARIES = ("torch", "timm", "accelerate", "numpy")


@dataclass(frozen=True)
class DataPosition:
    """All there is to know of where a run stands in its data."""

    samples: int
    """Samples consumed since the start of training."""
    fingerprint: str
    """Which samples, in which order of shards."""
    global_batch: int
    order_version: int = ORDER_VERSION


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest has been verified."""

    path: Path
    step: int
    position: DataPosition

    def model(self) -> dict[str, Tensor]:
        """The weights, in the layout of the final model."""
        return read_weights(self.path / MODEL_FILE)

    def optimizer(self) -> dict[str, Any]:
        """The optimiser's state, read without unpickling anything but tensors and plain values."""
        state: dict[str, Any] = torch.load(self.path / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
        return state


def step_folder(root: Path, step: int) -> Path:
    """`root/step-000000123`."""
    return root / f"step-{step:09d}"


def save(
    root: Path,
    step: int,
    weights: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    optimizer: Mapping[str, Any],
    position: DataPosition,
    keep: int,
) -> Path:
    """Write the checkpoint of `step` under `root`, then remove all but the `keep` newest."""
    root.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(root)
    hidden = root / f"{_HIDDEN}{step:09d}"
    hidden.mkdir()
    save_file(dict(weights), hidden / MODEL_FILE, metadata=dict(metadata))
    torch.save(dict(optimizer), hidden / OPTIMIZER_FILE)
    for name in (MODEL_FILE, OPTIMIZER_FILE):
        sync(hidden / name)
    manifest = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "position": asdict(position),
        "libraries": {name: version(name) for name in _LIBRARIES},
        "files": {name: _identity(hidden / name) for name in (MODEL_FILE, OPTIMIZER_FILE)},
    }
    write_atomically(hidden / MANIFEST_FILE, json.dumps(manifest, indent=2).encode())
    place = step_folder(root, step)
    if place.exists():  # a damaged one that the resume passed over
        place.rename(root / f"{_HIDDEN}replaced-{step:09d}")
    hidden.rename(place)
    sync(root)
    for old in sorted(root.glob("step-*"))[:-keep]:
        gone = old.rename(root / f"{_HIDDEN}old-{old.name}")
        shutil.rmtree(gone)
    _remove_leftovers(root)
    return place


def newest(root: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies; each newer one that does not is named to `report`.

    Raises:
        UserError: if there are checkpoints but none verifies. A run never starts from zero in silence.
    """
    rejected: list[str] = []
    for path in sorted(root.glob("step-*"), reverse=True):
        try:
            checkpoint = verify(path)
        except BadCheckpointError as error:
            rejected.append(f"checkpoint {path.name} is not used: {error}")
            report(rejected[-1])
            continue
        return checkpoint
    if rejected:
        raise UserError(
            f"no checkpoint in {root} is intact ({'; '.join(rejected)}); restore one, or start again in another run_dir"
        )
    return None


class BadCheckpointError(Exception):
    """What is wrong with a checkpoint."""


def verify(path: Path) -> Checkpoint:
    """Hold every file of a checkpoint against the manifest.

    Raises:
        BadCheckpointError: naming the first file that is missing, cut or changed, or an unknown format.
    """
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
        if manifest["format_version"] != FORMAT_VERSION:
            raise BadCheckpointError(
                f"its format version is {manifest['format_version']}, this program reads {FORMAT_VERSION}"
            )
        for name in (MODEL_FILE, OPTIMIZER_FILE):
            wanted, found = manifest["files"][name], _identity(path / name)
            if found != wanted:
                raise BadCheckpointError(
                    f"{name} is changed or cut ({found['bytes']} bytes, sha256 {found['sha256'][:12]}; "
                    f"written were {wanted['bytes']}, {wanted['sha256'][:12]})"
                )
        return Checkpoint(path, int(manifest["step"]), DataPosition(**manifest["position"]))
    except FileNotFoundError as error:
        raise BadCheckpointError(f"{Path(error.filename).name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadCheckpointError(f"{MANIFEST_FILE} cannot be read ({type(error).__name__}: {error})") from None


def require_same_data(checkpoint: Checkpoint, fingerprint: str, global_batch: int) -> None:
    """A run continues only on the samples, the order and the global batch it was started with.

    Raises:
        UserError: naming the old and the new value.
    """
    old = checkpoint.position
    for what, before, now in (
        ("data (fingerprint of the shards)", old.fingerprint[:16], fingerprint[:16]),
        ("global batch", old.global_batch, global_batch),
        ("order version", old.order_version, ORDER_VERSION),
    ):
        if before != now:
            raise UserError(
                f"{checkpoint.path} was trained with another {what}: {before}, now {now}; "
                "give the run its old data and settings, or another run_dir; --restart_data_order goes on all the same"
            )


def _identity(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _remove_leftovers(root: Path) -> None:
    """Folders of saves that were cut short; they were never a checkpoint."""
    for path in root.glob(f"{_HIDDEN}*"):
        shutil.rmtree(path)
