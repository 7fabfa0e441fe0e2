"""Room on the disk that checkpoints need."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from mae.training.muon import hidden_matrices
from mae.training.settings import TrainSettings

_ADAMW_MOMENTS = 2
_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Room:
    """Room that the checkpoints of a run need, and that its disk has."""

    size: int
    """Bytes of a checkpoint."""
    together: int
    """How many are on the disk at the same time."""
    there: int
    """How many are written already."""
    free: int
    """Free bytes."""

    @property
    def needed(self) -> int:
        """Bytes of the checkpoints to come, at least of one."""
        return self.size * max(1, self.together - self.there)


def room(model: nn.Module, settings: TrainSettings, total_steps: int, checkpoints: Path, place: Path) -> Room:
    """Return what the checkpoints of a run of `total_steps` need, and what the disk of the folder `place` has.

    There is one checkpoint more than are kept, because the oldest is removed after the newest is written.
    """
    every = settings.checkpoint_every
    permanent = total_steps // math.lcm(settings.keep_every, every) if settings.keep_every else 0
    return Room(
        size=checkpoint_bytes(model, settings.ema_decay is not None, settings.optim.name),
        together=min(settings.keep_checkpoints + 1 + permanent, math.ceil(total_steps / every)),
        there=len(list(checkpoints.glob("step-*"))),
        free=shutil.disk_usage(place).free,
    )


def checkpoint_bytes(model: nn.Module, has_average: bool, optimizer: str) -> int:
    """Return the bytes of a checkpoint: weights, optimiser state, and the running average if there is one.

    AdamW has two moments of each weight, Muon one of those that it trains.
    """
    weights: int = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    saved = sum(weight.numel() for weight in hidden_matrices(model)) if optimizer == "muon" else 0
    return weights + ((_ADAMW_MOMENTS + has_average) * trained - saved) * _FLOAT32_BYTES
