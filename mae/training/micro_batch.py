"""Some steps of a model on its device: what they cost, and how many images at a time there is room for."""

import gc
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.optim import Optimizer

from mae.data.batches import Batch, BatchPlan, empty_batch, plan_batches
from mae.data.settings import DataSettings
from mae.errors import UserError
from mae.models.execution import checkpoint_activations
from mae.training.loop import LossOf, to_device
from mae.training.memory import forget_peak_memory, free_memory, give_back, memory_in_use, peak_memory, total_memory
from mae.training.optimizer import OptimSettings, build_optimizer, parameter_groups
from mae.training.settings import TrainSettings

# Some steps are timed, very short ones until they make a moment, very long ones no longer than a while.
_TIMED_STEPS, _TIMED_SECONDS = 3, (0.2, 3.0)
# Of the whole memory: for libraries, communication, and gaps between tensors.
_SHARE_KEPT_FREE = 0.1
# Of the time per image, when twice as many are taken at a time; what brings less only costs memory.
_LEAST_GAIN = 0.05
# A micro-batch that takes so long on a CPU has nothing to gain from more images.
_LONG_SECONDS = 2.0


class OutOfRoomError(Exception):
    """The batch is too large for the memory."""


@dataclass(frozen=True)
class Cost:
    """Of steps with micro-batches of `images` images, on one process."""

    images: int
    loss: float
    """Of the first micro-batch under the first weights."""
    seconds: float
    """Forward and backward of a micro-batch: the median."""
    least_seconds: float
    """The same, least disturbed by others."""
    update_seconds: float
    """Of the optimiser, for a step."""
    resting_bytes: int
    """Memory between two steps: weights and the optimiser's state, on a CPU the program too."""
    peak_bytes: int
    """Most memory during the steps."""

    def bytes_for(self, images: int, fixed: int) -> float:
        """Most memory of steps with so many images: what grows with them, all but `fixed`, scaled."""
        return fixed + (self.peak_bytes - fixed) * images / self.images


class Fit(NamedTuple):
    """The outcome of a search."""

    images: int
    """The largest micro-batch that pays."""
    why: str
    """Why no larger one is taken."""

    def __str__(self) -> str:
        return f"micro_batch_size auto takes {self.images} images at a time: {self.why}"


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
    """The cost of steps with so many times this batch.

    With more than one the gradients of the first are there while the second is computed, as they are whenever
    a run accumulates.

    Raises:
        OutOfRoomError: if there is not enough memory.
    """
    device, steps = accelerator.device, list[_Step]()
    forget_peak_memory(device)
    try:
        batch = to_device(batch, device)
        first = _step(accelerator, model, optimizer, loss_of, batch, micro_batches)
        began = time.perf_counter()
        while not steps or time.perf_counter() - began < _TIMED_SECONDS[len(steps) < _TIMED_STEPS]:
            steps.append(_step(accelerator, model, optimizer, loss_of, batch, micro_batches))
    except torch.OutOfMemoryError:
        raise OutOfRoomError from None
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # of the host
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
    """Of all that is trained."""
    return sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)


def bytes_beside(model: nn.Module, processes: int, has_average: bool) -> int:
    """What steps of one process do not show: the gradients that DDP exchanges, and the running average."""
    return gradient_bytes(model) * ((processes > 1) + has_average)


def fit_micro_batch(
    accelerator: Accelerator,
    build: Callable[[], nn.Module],
    loss_of: LossOf,
    settings: TrainSettings,
    optim: OptimSettings,
    data: DataSettings,
    plan: BatchPlan,
    unit: int,
    patches: int = 0,
    here: int = 1,
    running: int = 1,
) -> Fit:
    """Try a model on random images, ever more at a time, for the share that a process has in the global batch.

    It is not wrapped for several processes: where one of them has no room, no other waits for it. With FSDP2, whose
    parts of the weights are smaller, and with `compile`, which is not waited for, this is on the safe side. Nothing is
    left of it, and random numbers go on as if nothing had been tried.

    Args:
        build: Gives the model, which is changed.
        plan: The global batch, dealt out without a limit.
        unit: Images of which a micro-batch holds a multiple.
        patches: Columns of the noise.
        here: Processes of the run on this machine. On CPUs they share its memory.
        running: How many of them have taken part of it by now.

    Raises:
        UserError: if there is no room for `unit` images, or the share of a process is no multiple of it.
    """
    sizes, device = micro_batch_sizes(plan.per_process, unit), accelerator.device
    if not sizes:
        raise UserError(
            f"a process takes {plan.per_process} images of the global batch, which is no multiple of {unit} "
            "(data.views_per_image, and pairs for mixup and cutmix); change batch_size"
        )
    room = _room(device, here, running)

    def search() -> Fit:
        try:
            model = build().to(device)
        except torch.OutOfMemoryError:
            raise UserError("the model alone does not fit into memory; choose a smaller one") from None
        checkpoint_activations(model, settings.activation_checkpointing)
        optimizer = build_optimizer(parameter_groups(model, optim.weight_decay), optim, device)

        def cost_of(images: int) -> Cost:
            batch = _random_batch(images, data, patches)
            # Two, as for every size but the whole share.
            return take_steps(accelerator, model, optimizer, loss_of, batch, micro_batches=2)

        beside = bytes_beside(model, plan.processes, settings.ema_decay is not None)
        return largest_fit(cost_of, sizes, room - beside, gradient_bytes(model), foreseen=device.type != "cuda")

    with _without_trace(device):
        return search()


def micro_batch_sizes(share: int, unit: int) -> list[int]:
    """Ever larger parts into which `share` can be cut, all multiples of `unit`; each at most twice the one before, if
    there is one: the powers of two for a power of two."""
    parts = [part for part in range(unit, share + 1, unit) if share % part == 0]
    sizes = parts[:1]
    while sizes[-1:] != parts[-1:]:
        larger = [part for part in parts if part > sizes[-1]]
        sizes.append(max([part for part in larger if part <= 2 * sizes[-1]], default=larger[0]))
    return sizes


def largest_fit(
    cost_of: Callable[[int], Cost], sizes: Sequence[int], room: float, gradients: int, foreseen: bool
) -> Fit:
    """Try `sizes`, which rise, until one does not fit into `room` bytes.

    Where it is `foreseen`, on a CPU, whose system kills a process that takes too much, a size is only tried if by the
    last one it will fit; and the search ends where more images at a time are hardly faster.

    Raises:
        UserError: if the first does not fit.
    """
    best = _cost_within(room, cost_of, sizes[0])
    if best is None:
        raise UserError(f"not even {sizes[0]} images at a time fit into memory; choose a smaller model or images")
    fixed = best.resting_bytes + gradients
    for images in sizes[1:]:
        if foreseen and best.bytes_for(images, fixed) > room:
            needed = _gigabytes(best.bytes_for(images, fixed))
            return Fit(best.images, f"{images} would take about {needed} of {_gigabytes(room)}")
        if foreseen and best.least_seconds > _LONG_SECONDS:
            return Fit(best.images, f"they take {best.least_seconds:.0f} s, and more would not be faster")
        cost = _cost_within(room, cost_of, images)
        if cost is None:
            return Fit(best.images, f"{images} do not fit into {_gigabytes(room)}")
        if foreseen and not _is_faster(cost, best, cost_of):
            return Fit(best.images, f"{images} are no faster, and take more memory")
        best = cost
    return Fit(best.images, "they are the whole share of a process")


def agree_on_micro_batch(
    accelerator: Accelerator, plan: BatchPlan, find: Callable[[BatchPlan, int, int], Fit], say: Callable[[str], None]
) -> BatchPlan:
    """The same global batch in micro-batches that every rank has room for; says which and why. Collective.

    `plan` deals it out without a limit; `find` is given that, and how many processes are on this machine, twice.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", plan.processes))  # set by torchrun and Accelerate
    fit = _least_of_all(accelerator, find(plan, here, here))
    chosen = plan_batches(plan.global_batch, plan.processes, fit.images)
    say(f"{fit}; batch of {plan.global_batch} = {plan.processes} x {chosen.accumulation} x {chosen.per_process}")
    return chosen


def _least_of_all(accelerator: Accelerator, fit: Fit) -> Fit:
    """What fits on every rank, with the reason of the one that has least room."""
    everyone = accelerator.gather(torch.tensor([fit.images], device=accelerator.device)).tolist()
    (why,) = broadcast_object_list([fit.why], from_process=everyone.index(min(everyone)))
    return Fit(min(everyone), str(why))


def _cost_within(room: float, cost_of: Callable[[int], Cost], images: int) -> Cost | None:
    """None if it is more memory than there is room for."""
    with suppress(OutOfRoomError):
        cost = cost_of(images)
        return cost if cost.peak_bytes <= room else None
    torch.cuda.empty_cache()  # outside of the handler, where nothing holds the tensors of the step any more
    return None


def _is_faster(cost: Cost, than: Cost, cost_of: Callable[[int], Cost]) -> bool:
    """By `_LEAST_GAIN` for each doubling; what is not is timed again, for others may have kept the processor busy."""
    most: float = (1 - _LEAST_GAIN) ** math.log2(cost.images / than.images) * cost.images / than.images
    first = cost.least_seconds, than.least_seconds
    if first[0] <= most * first[1]:
        return True
    again = cost_of(cost.images).least_seconds, cost_of(than.images).least_seconds
    return min(first[0], again[0]) <= most * min(first[1], again[1])


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
    """When the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _room(device: torch.device, here: int, running: int) -> float:
    """Bytes for one of `here` processes, of which `running` like this one are there by now."""
    if device.type == "cuda":  # each has its own
        here = running = 1
    available = free_memory(device) + running * memory_in_use(device)
    return (available - _SHARE_KEPT_FREE * total_memory(device)) / here


def _random_batch(images: int, data: DataSettings, patches: int) -> Batch:
    batch = empty_batch(images, data, patches)
    batch.images.random_(0, 256)
    batch.noise.uniform_()
    return batch._replace(labels=torch.zeros_like(batch.labels))


@contextmanager
def _without_trace(device: torch.device) -> Iterator[None]:
    """Random numbers, and the memory of the device, as if nothing had been tried."""
    python, numpy = random.getstate(), np.random.get_state()  # timm's mixup draws from these
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
    gc.collect()
    give_back(device)
    forget_peak_memory(device)


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
