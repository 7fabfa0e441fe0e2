"""Reading of checkpoints: the newest one that is whole.

`step-000000123/` holds `model.safetensors` (in the layout of the final model), `optimizer.safetensors`,
`ema.safetensors` for a run with an average of the weights, and, written last, `manifest.json`. Nothing in it is used
before it is verified, and nothing in it can run.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mae.data.order import ORDER_VERSION
from mae.errors import CheckpointError, UserError, first_of
from mae.files import read_bounded
from mae.run_files import MANIFEST_FILE
from mae.training.checkpoints.manifest import (
    BadCheckpointError,
    DataPosition,
    FileIdentity,
    Manifest,
    RunPosition,
    is_set_aside,
    step_of,
)
from mae.training.checkpoints.tensor_files import DamagedFileError, files_of, groups_of, read_tensors, require_whole

_MOST_BYTES_OF_MANIFEST = 1 << 26


@dataclass(frozen=True)
class Checkpoint:
    """Checkpoint of which every file has been verified."""

    path: Path
    run_position: RunPosition
    libraries: dict[str, str]
    """Versions of the libraries that wrote it."""
    files: tuple[str, ...]
    """Names of its tensor files."""

    @property
    def step(self) -> int:
        """Number of optimiser steps done."""
        return self.run_position.step

    @property
    def position(self) -> DataPosition:
        """Position of the run in its data."""
        return self.run_position.position

    def tensors(self, group: str) -> dict[str, Tensor]:
        """Return the whole tensors of `model`, `optimizer` or `ema`, on the CPU, however many ranks saved them.

        A group that was not saved is empty.

        Raises:
            BadCheckpointError: if the files were damaged after they were verified.
        """
        try:
            return read_tensors(self.path, files_of(group, self.files))
        except DamagedFileError as error:
            raise BadCheckpointError(self.path, str(error)) from None


def newest_checkpoint(root: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest intact checkpoint, None if there are none; report each newer one that is damaged.

    Raises:
        CheckpointError: if there are checkpoints but none is intact, or the folder cannot be read. A run must not
            silently start from zero.
    """
    rejected: list[str] = []
    for path in _checkpoints(root):
        try:
            checkpoint = verify_checkpoint(path)
            if checkpoint.step != step_of(path):
                raise BadCheckpointError(path, f"its manifest belongs to step {checkpoint.step}")
        except BadCheckpointError as error:
            rejected.append(f"checkpoint {path.name} is not used: {error.reason}")
            report(rejected[-1])
        else:
            return checkpoint
    if rejected:
        raise CheckpointError(
            f"no checkpoint in {root} is intact ({first_of(rejected)}); restore one, or start again in another run_dir"
        )
    return None


def verify_checkpoint(path: Path) -> Checkpoint:
    """Compare every file of a checkpoint with the manifest.

    Raises:
        BadCheckpointError: naming an unknown format, or the first file that is missing, truncated, changed or unknown.
    """
    try:
        return _verified(path)
    except DamagedFileError as error:
        raise BadCheckpointError(path, str(error)) from None
    except FileNotFoundError as error:
        raise BadCheckpointError(path, f"{Path(error.filename).name} is missing") from None
    except OSError as error:
        raise BadCheckpointError(path, f"{error.filename} cannot be read ({error.strerror})") from None


def require_same_data(checkpoint: Checkpoint, fingerprint: str, global_batch: int) -> None:
    """Raise an error unless samples, order and global batch equal the checkpoint's.

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
                "give the run its old data and settings, or another run_dir; --restart_data_order resumes all the same"
            )


def _checkpoints(root: Path) -> list[Path]:
    """Return everything named like a checkpoint, newest first."""
    if not os.path.lexists(root):
        return []
    try:
        found = [path for path in root.iterdir() if path.name.startswith("step-")]
    except OSError as error:
        raise CheckpointError(f"checkpoint folder {root} cannot be read: {error.strerror}") from None
    return sorted(found, key=_age, reverse=True)


def _age(path: Path) -> tuple[int, bool]:
    """Return a key that is greater for newer checkpoints; one set aside is older than the one that replaces it."""
    step = step_of(path)
    return (-1 if step is None else step, not is_set_aside(path))


def _verified(path: Path) -> Checkpoint:
    """Verify a checkpoint: names and sizes first, so that nothing is read for long that cannot be right."""
    if not path.exists():
        raise DamagedFileError("the folder does not exist")
    try:
        manifest = Manifest.from_json(read_bounded(path / MANIFEST_FILE, _MOST_BYTES_OF_MANIFEST))
    except ValueError as error:
        raise DamagedFileError(f"{MANIFEST_FILE} cannot be used ({error})") from None
    groups = groups_of(manifest.files)
    extra = {entry.name for entry in path.iterdir()} - {*manifest.files, MANIFEST_FILE}
    if extra:
        raise DamagedFileError(f"{min(extra)} does not belong to it")
    for name, wanted in manifest.files.items():
        size = (path / name).stat().st_size
        found = FileIdentity.of(path / name) if size == wanted.bytes else FileIdentity(size, "not computed")
        if found != wanted:
            raise DamagedFileError(
                f"{name} was changed or truncated: it has {found.bytes} bytes and sha256 {found.sha256[:12]}, "
                f"but was written with {wanted.bytes} and {wanted.sha256[:12]}"
            )
    for group in groups:
        require_whole(path, files_of(group, manifest.files))
    return Checkpoint(path, manifest.run_position, dict(manifest.libraries), tuple(manifest.files))
