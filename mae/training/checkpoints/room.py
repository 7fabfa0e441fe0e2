"""Room on the disk that checkpoints need."""

import shutil
from pathlib import Path

from torch import nn

from mae.training.muon import hidden_matrices

_ADAMW_MOMENTS = 2
_FLOAT32_BYTES = 4


def checkpoint_bytes(model: nn.Module, has_average: bool, optimizer: str) -> int:
    """Return the bytes of a checkpoint: weights, optimiser state, and the running average if there is one.

    AdamW has two moments of each weight, Muon one of those that it trains.
    """
    weights: int = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    saved = sum(weight.numel() for weight in hidden_matrices(model)) if optimizer == "muon" else 0
    return weights + ((_ADAMW_MOMENTS + has_average) * trained - saved) * _FLOAT32_BYTES


def missing_room(checkpoints: Path, keep: int, size: int) -> str | None:
    """Return a warning if the disk of the run folder is too small for the checkpoints to come; None if it is not.

    One more is needed than are kept: the oldest is removed after the newest is written.
    """
    there = len(list(checkpoints.glob("step-*")))
    needed = size * max(1, keep + 1 - there)
    free = shutil.disk_usage(checkpoints.parent).free
    if needed <= free:
        return None
    return (
        f"warning: the checkpoints to come take {needed:,} bytes, {checkpoints.parent} has {free:,} bytes free; "
        "make room or lower keep_checkpoints"
    )
