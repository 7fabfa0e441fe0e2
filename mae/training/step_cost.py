"""Time and memory of training steps, measured on a few of them."""

import statistics
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from mae.data.batch import Batch, to_device
from mae.errors import is_out_of_memory
from mae.training.memory import forget_peak_memory, give_back, memory_in_use, peak_memory
from mae.training.task import LossOf

# Steps are timed until there are _TIMED_STEPS and _ENOUGH_SECONDS have passed; none begins after _MOST_SECONDS.
_TIMED_STEPS = 3
_ENOUGH_SECONDS, _MOST_SECONDS = 0.2, 3.0


class OutOfRoomError(Exception):
    """Batch that is too large for the memory."""


@dataclass(frozen=True)
class Cost:
    """Time and memory of steps with micro-batches of `images` images, in one process."""

    images: int
    loss: float
    """Loss of the batch in the first step, before any update."""
    seconds: float
    """Median time of forward and backward pass of a micro-batch."""
    least_seconds: float
    """Shortest such time, the one least disturbed by other processes."""
    update_seconds: float
    """Median time of the optimiser's update."""
    resting_bytes: int
    """Memory after the steps: weights and optimiser state, on a CPU the whole process."""
    peak_bytes: int
    """Peak memory during the steps."""

    def bytes_for(self, images: int, fixed: int) -> float:
        """Estimate the peak memory with another number of images; `fixed` bytes do not depend on it."""
        return fixed + (self.peak_bytes - fixed) * images / self.images


class _Step(NamedTuple):
    loss: float
    seconds: float
    update_seconds: float


def take_steps(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    loss_of: LossOf,
    batch: Batch,
    micro_batches: int = 1,
) -> Cost:
    """Train on the same batch for a few steps and measure them; this changes the model.

    With several micro-batches, the gradients of the first occupy memory while the second is computed, as in a run with
    gradient accumulation.

    Raises:
        OutOfRoomError: if the memory is too small.
    """
    device, steps = accelerator.device, list[_Step]()
    forget_peak_memory(device)
    try:
        batch = to_device(batch, device)
        first = _step(accelerator, model, optimizer, loss_of, batch, micro_batches)
        began = time.perf_counter()
        while _goes_on(len(steps), time.perf_counter() - began):
            steps.append(_step(accelerator, model, optimizer, loss_of, batch, micro_batches))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfRoomError from None
    finally:
        optimizer.zero_grad()
    peak = peak_memory(device)
    give_back(device)
    return Cost(
        images=len(batch.images),
        loss=first.loss,
        seconds=statistics.median(step.seconds for step in steps),
        least_seconds=min(step.seconds for step in steps),
        update_seconds=statistics.median(step.update_seconds for step in steps),
        resting_bytes=memory_in_use(device),
        peak_bytes=peak,
    )


def gradient_bytes(model: nn.Module) -> int:
    """Return the bytes of the gradients of all trainable parameters."""
    return sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)


def bytes_beside(model: nn.Module, processes: int, has_average: bool) -> int:
    """Return the bytes that a trial in one process lacks: DDP's copy of the gradients, and the running average."""
    return gradient_bytes(model) * ((processes > 1) + has_average)


def _goes_on(done: int, seconds: float) -> bool:
    """Return whether to time another step after `done` steps in `seconds` seconds."""
    if done == 0:
        return True
    return seconds < (_MOST_SECONDS if done < _TIMED_STEPS else _ENOUGH_SECONDS)


def _step(
    accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, loss_of: LossOf, batch: Batch, micro_batches: int
) -> _Step:
    began = _now(accelerator.device)
    for _ in range(micro_batches):
        with accelerator.autocast():
            loss = loss_of(model, batch)
        accelerator.backward(loss)
    between = _now(accelerator.device)
    optimizer.step()
    optimizer.zero_grad()
    return _Step(loss.item(), (between - began) / micro_batches, _now(accelerator.device) - between)


def _now(device: torch.device) -> float:
    """Wait until the device is idle; return the time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
