"""Small checkpoints whose every number says of which step they are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae.training.checkpoints.manifest import DataPosition, RunPosition, step_folder
from mae.training.checkpoints.writer import CheckpointWriter

GROUPS = ("model", "optimizer", "ema")


def groups(step: int, numbers: int = 3) -> dict[str, dict[str, Tensor]]:
    """A model, its optimiser's state and its average, all of one step."""
    return {group: {f"{group}.weight": torch.full((numbers,), float(step))} for group in GROUPS}


def run_position(step: int, **notes: Any) -> RunPosition:
    return RunPosition(step, DataPosition(samples=8 * step, fingerprint="f" * 64, global_batch=8), {"seed": 0}, notes)


def write(root: Path, step: int, keep: int = 2, tensors: Mapping[str, Mapping[str, Tensor]] | None = None) -> Path:
    """Save the checkpoint of a step as a run does that has just started."""
    writer = CheckpointWriter(root, keep, background=False)
    writer.save(tensors or groups(step), {"format": "pt"}, run_position(step))
    assert writer.failure is None
    assert writer.warning is None
    return step_folder(root, step)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())
