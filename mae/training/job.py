"""Job: everything the training loop works with."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from mae.data.batch import Batch, TrainingBatches
from mae.data.loader import load
from mae.data.plan import BatchPlan
from mae.output import newly_lost
from mae.training.checkpoints.manifest import RunPosition
from mae.training.checkpoints.writer import CheckpointWriter
from mae.training.optimizer import CosineSchedule
from mae.training.progress import TrainingProgress
from mae.training.run_folder.folder import RunFolder
from mae.training.settings import TrainSettings
from mae.training.state import TrainingState
from mae.training.task import LossOf, Task

EARLY_END = "early_end"
"""Note of a pipeline that has ended its run before its last step: that `step`, and `why`."""
# A stuck data worker is reported before the ranks that wait for this one give up.
_WORKER_SHARE_OF_TIMEOUT = 0.8


@dataclass(frozen=True)
class Job:
    """One start of a run. Only weights, optimiser state and notes change during it."""

    task: Task
    settings: TrainSettings
    """Settings of the task, with the micro-batch that was found by search."""
    accelerator: Accelerator
    model: nn.Module
    """Model as Accelerate prepared it."""
    state: TrainingState
    """Weights, optimiser state and average, which checkpoints hold."""
    schedule: CosineSchedule
    batches: TrainingBatches
    loss_of: LossOf
    folder: RunFolder
    writer: CheckpointWriter | None
    """Writer of checkpoints; None on ranks that write none."""
    progress: TrainingProgress
    start: RunPosition
    """Position at which this start begins."""
    total: int
    """Number of optimiser steps of the whole run."""
    notes: dict[str, Any] = field(default_factory=dict)
    """JSON values that the pipeline finds again after a resume."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a record to `metrics.jsonl`, and show it; on the main process only."""
        self.folder.log(record)
        self.progress.record(record)

    def log_lost_output(self, step: int) -> None:
        """Log that nobody can read any longer what the run prints; on the main process only."""
        for message in newly_lost():
            self.log({"kind": "output", "step": step, "message": message})

    @property
    def optimizer(self) -> Optimizer:
        """Optimiser as Accelerate prepared it."""
        return self.state.optimizer

    @property
    def last_step(self) -> int:
        """Number of steps after which the run ends: `total`, unless the pipeline has ended it early."""
        return int(self.notes[EARLY_END]["step"]) if EARLY_END in self.notes else self.total

    @property
    def ending(self) -> str:
        """Number of steps of a run that has ended, and why it has ended early if it has."""
        early = f", ended early: {self.notes[EARLY_END]['why']}" if EARLY_END in self.notes else ""
        return f"{self.last_step} steps{early}"

    @property
    def was_complete(self) -> bool:
        """Whether an earlier start has taken the last step."""
        return self.start.step == self.total or EARLY_END in self.start.notes.get("pipeline", {})

    def end_early(self, step: int, why: str) -> None:
        """Make `step`, which was just taken, the last of the run. Every rank has to call it."""
        self.notes[EARLY_END] = {"step": step, "why": why}

    @property
    def plan(self) -> BatchPlan:
        """Division of the global batch."""
        return self.batches.plan

    @property
    def samples(self) -> int:
        """Number of samples in an epoch."""
        return self.batches.samples

    def epoch_after(self, step: int) -> float:
        """Return the number of epochs after `step` optimiser steps."""
        return step * self.plan.global_batch / self.samples

    def micro_batches(self, position: int, steps: int) -> Iterator[Batch]:
        """Return this rank's micro-batches of `steps` steps, beginning with the sample at `position`."""
        plan, data = self.plan, self.settings.data
        first = position // plan.global_batch * plan.accumulation
        numbers = range(first, first + steps * plan.accumulation)
        return load(
            self.batches.starting_at(first),
            numbers,
            data.workers if numbers else 0,
            pin_memory=self.accelerator.device.type == "cuda",
            timeout=_WORKER_SHARE_OF_TIMEOUT * self.settings.timeout,
        )


def total_steps(samples: int, epochs: float, batch_size: int) -> int:
    """Return the number of steps after which every sample has been seen at least `epochs` times."""
    # As written, 1.1 is not the nearest binary number, by which 50,000 samples would take a step too many.
    return math.ceil(samples * Fraction(str(epochs)) / batch_size)
