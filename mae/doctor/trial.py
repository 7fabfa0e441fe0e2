"""A few real steps on the device, and a few real batches by the workers: measured, never guessed."""

import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from mae.data.batches import Batch, TrainBatches
from mae.data.loader import load
from mae.data.settings import DataSettings
from mae.data.stream import StreamBatches
from mae.errors import UserError, first_of
from mae.training.loop import to_device

_TIMED_STEPS = 3
# On a CPU a batch as large as a GPU's would take minutes.
_SECONDS_PER_STEP_ON_CPU = 3.0
# Of the first steps, after which all that does not grow with the batch is in memory.
_FEW_IMAGES = 2
# Of the batches that the workers are timed with: their time is that of their images.
_IMAGES_PER_TIMED_BATCH = 32
# Batches per worker: until all are under way, timed, and still in the making when the last timed one is there, so that
# as many are made beforehand at the end as at the begin.
_FIRST_ROUNDS, _TIMED_ROUNDS, _ROUNDS_BEYOND = 2, 4, 2

LossOf = Callable[[nn.Module, Batch], Tensor]
BatchesOf = Callable[[int], TrainBatches | StreamBatches]


@dataclass(frozen=True)
class Trial:
    """What a run costs in time and memory, for one process."""

    asked: int
    """Images that a process is to take at a time."""
    fitting: int
    """As many of them as the device has room for; the same, or found by halving."""
    images: int
    """Of the timed steps; on a CPU fewer than asked, if those would take too long."""
    loss: float
    """Of the first batch under the first weights."""
    seconds_per_image: float
    """Forward and backward."""
    update_seconds: float
    """Of the optimiser, for a step."""
    data_seconds_per_image: float
    """By all workers of one process together."""
    fixed_bytes: int
    """Memory that does not grow with the batch: weights, gradients, the optimiser's state, on a CPU the program too."""
    peak_bytes: int
    """Most memory during the steps of `images` images."""

    @property
    def bytes_asked(self) -> float:
        """Memory of a step as asked: what grows with the batch, scaled."""
        return self.fixed_bytes + (self.peak_bytes - self.fixed_bytes) * self.asked / self.images


class _Timed(NamedTuple):
    loss: float
    backward: float
    update: float


def measure(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    batches_of: BatchesOf,
    loss_of: Callable[[int], LossOf],
    *,
    asked: int,
    unit: int,
    data: DataSettings,
    timeout: float,
) -> Trial:
    """Take some steps with micro-batches of `asked` images, or as many as can be.

    Raises:
        UserError: if not even `unit` images fit on the device, or for lost data or more bad images than are allowed.
    """
    device = accelerator.device

    def steps(images: int) -> list[_Timed]:
        batch = to_device(_first_batch(batches_of(images), device, data, timeout), device)
        # One more, to warm up.
        return [_step(accelerator, model, optimizer, loss_of(images), batch) for _ in range(1 + _TIMED_STEPS)]

    _forget_peak_memory(device)
    begin = min(asked, _whole_units(_FEW_IMAGES, unit))
    few, tried = _largest_that_fits(steps, begin, unit)
    first, *_, warm = tried
    in_time = _whole_units(_SECONDS_PER_STEP_ON_CPU / warm.backward * few, unit)
    wanted = asked if device.type == "cuda" else min(asked, max(few, in_time))
    fixed = _memory_in_use(device) + sum(p.nbytes for p in model.parameters() if p.requires_grad)
    images, (_, *timed) = (few, tried) if wanted == few else _largest_that_fits(steps, wanted, unit)
    peak = _peak_memory(device)
    return Trial(
        asked=asked,
        fitting=asked if (few, images) == (begin, wanted) else images,
        images=images,
        loss=first.loss,
        seconds_per_image=statistics.median(one.backward for one in timed) / images,
        update_seconds=statistics.median(one.update for one in timed),
        data_seconds_per_image=_seconds_of_data(batches_of, images, unit, data.workers, timeout),
        fixed_bytes=min(fixed, peak),
        peak_bytes=peak,
    )


def _largest_that_fits(steps: Callable[[int], list[_Timed]], images: int, unit: int) -> tuple[int, list[_Timed]]:
    """How many images a step has room for, `images` or the first of its halves, and these steps."""
    while True:
        with suppress(_OutOfMemoryError):
            return images, _in_memory(steps, images)
        torch.cuda.empty_cache()  # outside of the handler, where nothing holds the tensors of the step any more
        if images == unit:
            raise UserError(f"not even {unit} images at a time fit into memory; choose a smaller model or images")
        images = _whole_units(images / 2, unit)


class _OutOfMemoryError(Exception):
    """The batch is too large."""


def _in_memory(steps: Callable[[int], list[_Timed]], images: int) -> list[_Timed]:
    try:
        return steps(images)
    except torch.OutOfMemoryError:
        raise _OutOfMemoryError from None
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # of the host
            raise
        raise _OutOfMemoryError from None


def _whole_units(images: int | float, unit: int) -> int:
    return max(1, int(images / unit)) * unit


def _first_batch(
    batches: TrainBatches | StreamBatches, device: torch.device, data: DataSettings, timeout: float
) -> Batch:
    """By the run's own loader.

    Raises:
        UserError: if data are lost, or more images bad than are allowed.
    """
    on_gpu = device.type == "cuda"
    batch = _next(load(batches.starting_at(0), range(1), min(1, data.workers), pin_memory=on_gpu, timeout=timeout))
    if len(batch.bad) > data.max_bad_samples:
        raise UserError(
            f"{len(batch.bad)} of the first {len(batch.images)} images are bad: {first_of(batch.bad, most=1)}"
        )
    return batch


def _next(batches: Iterator[Batch]) -> Batch:
    batch = next(batches)
    if batch.lost:
        raise UserError(f"data are lost: {batch.lost}")
    return batch


def _step(accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, loss_of: LossOf, batch: Batch) -> _Timed:
    began = _now(accelerator.device)
    with accelerator.autocast():
        loss = loss_of(model, batch)
    accelerator.backward(loss)
    between = _now(accelerator.device)
    optimizer.step()
    optimizer.zero_grad()
    return _Timed(loss.item(), between - began, _now(accelerator.device) - between)


def _now(device: torch.device) -> float:
    """When the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _seconds_of_data(batches_of: BatchesOf, images: int, unit: int, workers: int, timeout: float) -> float:
    """For one image, once the workers are under way."""
    size = min(images, _whole_units(_IMAGES_PER_TIMED_BATCH, unit))
    abreast = max(1, workers)
    numbers = range(abreast * (_FIRST_ROUNDS + _TIMED_ROUNDS + _ROUNDS_BEYOND))
    with warnings.catch_warnings():
        # Of more workers than cores: `machine.processors` says so.
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        batches = load(batches_of(size).starting_at(0), numbers, workers, timeout=timeout)
        _next(batches)
    for _ in range(abreast * _FIRST_ROUNDS - 1):
        _next(batches)
    began = time.perf_counter()
    for _ in range(abreast * _TIMED_ROUNDS):
        _next(batches)
    return (time.perf_counter() - began) / (abreast * _TIMED_ROUNDS * size)


def _forget_peak_memory(device: torch.device) -> None:
    """Look for the most memory in use from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # where it is not permitted, the peak of the whole process so far is an upper bound
        Path("/proc/self/clear_refs").write_text("5")


def _memory_in_use(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status_bytes("VmRSS")


def _peak_memory(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
