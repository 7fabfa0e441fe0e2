"""Cost of training steps: time and memory, measured by taking some."""

import statistics
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from mae.data.batch import Batch, to_device
from mae.training.memory import forget_peak_memory, give_back, memory_in_use, peak_memory
from mae.training.task import LossOf

# At least this many steps are timed, and more until _ENOUGH_SECONDS are over; none begins after _MOST_SECONDS.
_TIMED_STEPS = 3
_ENOUGH_SECONDS, _MOST_SECONDS = 0.2, 3.0


class OutOfRoomError(Exception):
    """The batch is too large for the memory."""


@dataclass(frozen=True)
class Cost:
    """Time and memory of steps with micro-batches of `images` images, on one process."""

    images: int
    loss: float
    """Loss of the first micro-batch with the starting weights."""
    seconds: float
    """Median time of forward and backward of a micro-batch."""
    least_seconds: float
    """Shortest such time: the one least disturbed by other processes."""
    update_seconds: float
    """Median time of the optimiser's update."""
    resting_bytes: int
    """Memory between two steps: weights and optimiser state; on a CPU the whole program."""
    peak_bytes: int
    """Greatest memory during the steps."""

    def bytes_for(self, images: int, fixed: int) -> float:
        """Estimate the greatest memory of steps with another number of images: `fixed` bytes, the rest scaled."""
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
    """Take some steps on the same batch and measure them; the model changes.

    With more than one micro-batch the gradients of the first exist while the second is computed, as in a run that
    accumulates.

    Raises:
        OutOfRoomError: if there is not enough memory.
    """
    device, steps = accelerator.device, list[_Step]()
    forget_peak_memory(device)
    try:
        batch = to_device(batch, device)
        first = _step(accelerator, model, optimizer, loss_of, batch, micro_batches)
        began = time.perf_counter()
        while _goes_on(len(steps), time.perf_counter() - began):
            steps.append(_step(accelerator, model, optimizer, loss_of, batch, micro_batches))
    except torch.OutOfMemoryError:
        raise OutOfRoomError from None
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # torch's message on the CPU
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
    """Return the bytes of the gradients of all trained parameters."""
    return sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)


def bytes_beside(model: nn.Module, processes: int, has_average: bool) -> int:
    """Return the memory that steps of one process do not show: DDP's copy of the gradients, and the running average."""
    return gradient_bytes(model) * ((processes > 1) + has_average)


def _goes_on(done: int, seconds: float) -> bool:
    """Return whether to time one more step, after `done` steps in `seconds` seconds."""
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
    """Return the time at which the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
