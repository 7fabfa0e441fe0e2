"""Trial: a few real steps on the device and a few real batches by the workers, to measure time and memory."""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset

from mae.data.batch import Batch
from mae.data.loader import load
from mae.data.plan import BatchPlan
from mae.errors import UserError, first_of
from mae.training.step_cost import Cost, OutOfRoomError, gradient_bytes, take_steps
from mae.training.task import Task

# On a CPU, a batch as large as a GPU's would take minutes.
_SECONDS_PER_STEP_ON_CPU = 3.0
# Images of the first steps, after which all memory that does not depend on the batch is allocated.
_FIRST_IMAGES = 2
# Images per batch when the workers are timed; their time is proportional to it.
_IMAGES_PER_TIMED_BATCH = 32
# Batches per worker before, during and after the timing. Those after it keep the workers busy until it ends.
_WARMUP_ROUNDS, _TIMED_ROUNDS, _EXTRA_ROUNDS = 2, 4, 2


@dataclass(frozen=True)
class Trial:
    """Time and memory of a run, for one process."""

    asked: int
    """Size of the micro-batch in the settings [images]."""
    fitting: int
    """Size of the largest micro-batch that fits: `asked`, or less, found by halving."""
    images: int
    """Size of the micro-batches of the timed steps; on a CPU less than `asked` if that would take too long."""
    loss: float
    """Loss of the first batch with the starting weights."""
    seconds_per_image: float
    """Time of forward and backward, per image."""
    update_seconds: float
    """Time of the optimiser's update, per step."""
    data_seconds_per_image: float
    """Time per image in which all workers of one process together make a batch."""
    fixed_bytes: int
    """Memory that does not depend on the batch: weights, gradients, optimiser state; on a CPU the whole program."""
    peak_bytes: int
    """Greatest memory during the steps with `images` images."""

    @property
    def bytes_asked(self) -> float:
        """Estimated memory of a step with `asked` images."""
        return self.fixed_bytes + (self.peak_bytes - self.fixed_bytes) * self.asked / self.images


def measure(task: Task, accelerator: Accelerator, model: nn.Module, plan: BatchPlan) -> Trial:
    """Take some steps with real batches, with the micro-batch of `plan` or the largest that fits.

    Raises:
        UserError: if not even `task.unit` images fit, data cannot be read, or more images are bad than allowed.
    """
    device, asked, unit = accelerator.device, plan.per_process, task.unit
    optimizer = task.build_optimizer(model, device)
    micro_batches = min(2, plan.accumulation)

    def cost_of(images: int) -> Cost:
        batch = _first_batch(task, images, device)
        return take_steps(accelerator, model, optimizer, task.loss_of(images), batch, micro_batches)

    first = min(asked, _whole_units(_FIRST_IMAGES, unit))
    few = _largest_that_fits(cost_of, first, unit)
    in_time = _whole_units(_SECONDS_PER_STEP_ON_CPU / few.seconds * few.images, unit)
    wanted = asked if device.type == "cuda" else min(asked, max(few.images, in_time))
    cost = few if wanted == few.images else _largest_that_fits(cost_of, wanted, unit)
    return Trial(
        asked=asked,
        fitting=asked if (few.images, cost.images) == (first, wanted) else cost.images,
        images=cost.images,
        loss=few.loss,
        seconds_per_image=cost.seconds / cost.images,
        update_seconds=cost.update_seconds,
        data_seconds_per_image=_seconds_of_data(task, cost.images),
        fixed_bytes=min(few.resting_bytes + gradient_bytes(model), cost.peak_bytes),
        peak_bytes=cost.peak_bytes,
    )


def _largest_that_fits(cost_of: Callable[[int], Cost], images: int, unit: int) -> Cost:
    """Return the cost of steps with `images` images, or with the first of its halves that fits."""
    while True:
        with suppress(OutOfRoomError):
            return cost_of(images)
        torch.cuda.empty_cache()  # outside the handler, where nothing refers to the tensors of the step any more
        if images == unit:
            raise UserError(f"not even {unit} images at a time fit into memory; choose a smaller model or images")
        images = _whole_units(images / 2, unit)


def _whole_units(images: int | float, unit: int) -> int:
    return max(1, int(images / unit)) * unit


def _batches_of(task: Task, images: int) -> Dataset[Batch]:
    """Return the batches of a run with one process that takes `images` images at a time."""
    plan = BatchPlan(images, processes=1, per_process=images, accumulation=1)
    return task.batches(plan, rank=0).starting_at(0)


def _first_batch(task: Task, images: int, device: torch.device) -> Batch:
    """Return the first batch from the run's own loader.

    Raises:
        UserError: if data cannot be read, or more images are bad than allowed.
    """
    data, timeout = task.settings.data, task.settings.timeout
    on_gpu = device.type == "cuda"
    batch = _next(load(_batches_of(task, images), range(1), min(1, data.workers), pin_memory=on_gpu, timeout=timeout))
    if len(batch.bad) > data.max_bad_samples:
        raise UserError(
            f"{len(batch.bad)} of the first {len(batch.images)} images are bad: {first_of(batch.bad, most=1)}"
        )
    return batch


def _next(batches: Iterator[Batch]) -> Batch:
    batch = next(batches)
    if batch.lost:
        raise UserError(f"data cannot be read: {batch.lost}")
    return batch


def _seconds_of_data(task: Task, images: int) -> float:
    """Return the seconds per image when all workers are busy."""
    workers, timeout = task.settings.data.workers, task.settings.timeout
    size = min(images, _whole_units(_IMAGES_PER_TIMED_BATCH, task.unit))
    parallel = max(1, workers)
    numbers = range(parallel * (_WARMUP_ROUNDS + _TIMED_ROUNDS + _EXTRA_ROUNDS))
    with warnings.catch_warnings():
        # `machine.processors` warns of more workers than cores.
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        batches = load(_batches_of(task, size), numbers, workers, timeout=timeout)
        _next(batches)
    for _ in range(parallel * _WARMUP_ROUNDS - 1):
        _next(batches)
    began = time.perf_counter()
    for _ in range(parallel * _TIMED_ROUNDS):
        _next(batches)
    return (time.perf_counter() - began) / (parallel * _TIMED_ROUNDS * size)
