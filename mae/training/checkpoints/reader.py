"""Checkpoints: finding the newest one that is whole, and reading it.

`step-000000123/` holds `model.safetensors` (the layout of the final model), `optimizer.safetensors`,
`ema.safetensors` where there is an average, and, written last, `manifest.json`. `checkpoint_writer` makes such
folders; nothing in them is trusted before it is verified, and nothing in them can run.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mae.data.order import ORDER_VERSION
from mae.errors import CheckpointError, UserError, first_of
from mae.training.checkpoints.manifest import (
    MANIFEST_FILE,
    BadCheckpointError,
    DataPosition,
    FileIdentity,
    Manifest,
    RunPosition,
    is_set_aside,
    step_of,
)
from mae.training.checkpoints.tensor_files import DamagedFileError, files_of, groups_of, read_tensors, require_whole


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every file has been verified."""

    path: Path
    run_position: RunPosition
    libraries: dict[str, str]
    """Versions of what wrote it."""
    files: tuple[str, ...]
    """Names of its tensor files."""

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self.run_position.step

    @property
    def position(self) -> DataPosition:
        """Where the run stands in its data."""
        return self.run_position.position

    def tensors(self, group: str) -> dict[str, Tensor]:
        """The whole tensors of `model`, `optimizer` or `ema`, on the CPU, however many ranks saved them.

        A group that was not saved is empty.

        Raises:
            BadCheckpointError: if the files were damaged since they were verified.
        """
        try:
            return read_tensors(self.path, files_of(group, self.files))
        except DamagedFileError as error:
            raise BadCheckpointError(self.path, str(error)) from None


def newest_checkpoint(root: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies; each newer one that does not is named to `report`.

    Raises:
        CheckpointError: if there are checkpoints but none verifies, or one cannot look. A run never starts from
            zero in silence.
    """
    rejected: list[str] = []
    for path in _checkpoints(root):
        try:
            checkpoint = verify_checkpoint(path)
            if checkpoint.step != step_of(path):
                raise BadCheckpointError(path, f"its manifest is of step {checkpoint.step}")
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
    """Hold every file of a checkpoint against the manifest.

    Raises:
        BadCheckpointError: naming the first file that is missing, cut, changed, or no part of it, or an unknown
            format.
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


def _checkpoints(root: Path) -> list[Path]:
    """All that bears the name of a checkpoint, the newest first."""
    if not os.path.lexists(root):
        return []
    try:
        found = [path for path in root.iterdir() if path.name.startswith("step-")]
    except OSError as error:
        raise CheckpointError(f"folder {root} of checkpoints cannot be read: {error.strerror}") from None
    return sorted(found, key=_age, reverse=True)


def _age(path: Path) -> tuple[int, bool]:
    """Greater for what is newer; one set aside is older than the one that takes its place."""
    step = step_of(path)
    return (-1 if step is None else step, not is_set_aside(path))


def _verified(path: Path) -> Checkpoint:
    if not path.exists():
        raise DamagedFileError("there is no such folder")
    try:
        manifest = Manifest.from_json((path / MANIFEST_FILE).read_bytes())
    except ValueError as error:
        raise DamagedFileError(f"{MANIFEST_FILE} cannot be used ({error})") from None
    extra = {entry.name for entry in path.iterdir()} - {*manifest.files, MANIFEST_FILE}
    if extra:
        raise DamagedFileError(f"{min(extra)} is no part of it")
    for name, wanted in manifest.files.items():
        found = FileIdentity.of(path / name)
        if found != wanted:
            raise DamagedFileError(
                f"{name} is changed or cut ({found.bytes} bytes, sha256 {found.sha256[:12]}; "
                f"written were {wanted.bytes}, {wanted.sha256[:12]})"
            )
    for group in groups_of(manifest.files):
        require_whole(path, files_of(group, manifest.files))
    return Checkpoint(path, manifest.run_position, dict(manifest.libraries), tuple(manifest.files))
