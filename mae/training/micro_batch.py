"""Search for the largest micro-batch that fits into the memory of a process."""

import gc
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from mae.data.batch import Batch, empty_batch
from mae.data.plan import BatchPlan, plan_batches
from mae.data.settings import DataSettings
from mae.errors import UserError, is_out_of_memory
from mae.models.execution import checkpoint_activations
from mae.training.memory import forget_peak_memory, free_memory, give_back, memory_in_use, total_memory
from mae.training.step_cost import Cost, OutOfRoomError, bytes_beside, gradient_bytes, take_steps
from mae.training.task import Task

# Share of the total memory kept free for libraries, communication and fragmentation.
_SHARE_KEPT_FREE = 0.1
# Share of the time per image that doubling the micro-batch must save to be worth its memory.
_LEAST_GAIN = 0.05
# On a CPU, steps that take this many seconds gain no speed per image from more images.
_LONG_SECONDS = 2.0


class MicroBatch(NamedTuple):
    """Result of the search."""

    images: int
    """Number of images of the largest micro-batch that is worth its memory."""
    why: str
    """Reason why it is no larger."""

    def __str__(self) -> str:
        return f"micro_batch_size auto takes {self.images} images at a time: {self.why}"


def agree_on_micro_batch(
    task: Task, accelerator: Accelerator, plan: BatchPlan, say: Callable[[str], None]
) -> BatchPlan:
    """Return `plan` with micro-batches that fit into the memory of every rank, and report them. Collective.

    `plan` divides the global batch without a limit on the micro-batch.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", plan.processes))  # set by torchrun and Accelerate
    found = _least_of_all(accelerator, find_micro_batch(task, accelerator, plan, here, here))
    chosen = plan_batches(plan.global_batch, plan.processes, found.images)
    say(f"{found}; batch of {plan.global_batch} = {plan.processes} x {chosen.accumulation} x {chosen.per_process}")
    return chosen


def find_micro_batch(task: Task, accelerator: Accelerator, plan: BatchPlan, here: int, running: int) -> MicroBatch:
    """Train the task's model for a few steps on random images, with rising micro-batches up to a process's share.

    The model is not wrapped for several processes, so no process waits for one that runs out of memory. The result errs
    on the small side with FSDP2, which shards the weights, and with `compile`, which is left out here. The random
    generators are restored afterwards.

    Args:
        plan: Global batch, divided without a limit on the micro-batch.
        here: Number of processes of the run on this machine. On CPUs they share its memory.
        running: Number of these processes that already use their part of the memory.

    Raises:
        UserError: if `task.unit` images do not fit, or the share of a process is not a multiple of `task.unit`.
    """
    sizes, device = micro_batch_sizes(plan.per_process, task.unit), accelerator.device
    if not sizes:
        raise UserError(
            f"a process takes {plan.per_process} images of the global batch, which is not a multiple of {task.unit} "
            "(data.views_per_image, and pairs for mixup and cutmix); change batch_size"
        )
    room = _room(device, here, running)
    with _without_trace(device):
        return _search(task, accelerator, plan.processes, sizes, room)


def _search(task: Task, accelerator: Accelerator, processes: int, sizes: Sequence[int], room: float) -> MicroBatch:
    settings, device, loss_of = task.settings, accelerator.device, task.loss_of(task.unit)
    try:
        model = task.build_model().to(device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError("the model alone does not fit into memory; choose a smaller one") from None
    checkpoint_activations(model, settings.activation_checkpointing)
    optimizer = task.build_optimizer(model, device)

    def cost_of(images: int) -> Cost:
        batch = _random_batch(images, settings.data, task.noise_columns)
        # Any size below the whole share accumulates at least two micro-batches.
        return take_steps(accelerator, model, optimizer, loss_of, batch, micro_batches=2)

    beside = bytes_beside(model, processes, settings.ema_decay is not None)
    return largest_fit(cost_of, sizes, room - beside, gradient_bytes(model), is_cuda=device.type == "cuda")


def micro_batch_sizes(share: int, unit: int) -> list[int]:
    """Return the sizes to try: rising divisors of `share` that are multiples of `unit`.

    Each is at most twice the one before, if there is such a divisor. For a power of two these are the powers of two.
    """
    parts = [part for part in range(unit, share + 1, unit) if share % part == 0]
    sizes = parts[:1]
    while sizes[-1:] != parts[-1:]:
        larger = [part for part in parts if part > sizes[-1]]
        sizes.append(max([part for part in larger if part <= 2 * sizes[-1]], default=larger[0]))
    return sizes


def largest_fit(
    cost_of: Callable[[int], Cost], sizes: Sequence[int], room: float, gradients: int, is_cuda: bool
) -> MicroBatch:
    """Try rising `sizes` until one does not fit into `room` bytes; return the last that fits.

    On a CPU, where the system kills a process that takes too much memory, a size is only tried if it should fit, judged
    by the one before. The search there also ends when a larger size is hardly faster.

    Args:
        gradients: Bytes of the gradients.

    Raises:
        UserError: if the first size does not fit.
    """
    best = _cost_within(room, cost_of, sizes[0])
    if best is None:
        raise UserError(f"not even {sizes[0]} images at a time fit into memory; choose a smaller model or images")
    fixed = best.resting_bytes + gradients
    for images in sizes[1:]:
        if not is_cuda and best.bytes_for(images, fixed) > room:
            needed = _gigabytes(best.bytes_for(images, fixed))
            return MicroBatch(best.images, f"{images} would take about {needed} of {_gigabytes(room)}")
        if not is_cuda and best.least_seconds > _LONG_SECONDS:
            return MicroBatch(best.images, f"they take {best.least_seconds:.0f} s, and more would not be faster")
        cost = _cost_within(room, cost_of, images)
        if cost is None:
            return MicroBatch(best.images, f"{images} do not fit into {_gigabytes(room)}")
        if not is_cuda and not _is_faster(cost, best, cost_of):
            return MicroBatch(best.images, f"{images} are no faster, and take more memory")
        best = cost
    return MicroBatch(best.images, "they are the whole share of a process")


def _least_of_all(accelerator: Accelerator, found: MicroBatch) -> MicroBatch:
    """Return the smallest result of all ranks, with its reason. Collective."""
    everyone = accelerator.gather(torch.tensor([found.images], device=accelerator.device)).tolist()
    (why,) = broadcast_object_list([found.why], from_process=everyone.index(min(everyone)))
    return MicroBatch(min(everyone), str(why))


def _cost_within(room: float, cost_of: Callable[[int], Cost], images: int) -> Cost | None:
    """Return the cost; None if it exceeds `room` bytes or the memory."""
    with suppress(OutOfRoomError):
        cost = cost_of(images)
        return cost if cost.peak_bytes <= room else None
    torch.cuda.empty_cache()  # after the exception, which would keep the step's tensors alive
    return None


def _is_faster(cost: Cost, than: Cost, cost_of: Callable[[int], Cost]) -> bool:
    """Return whether `cost` saves `_LEAST_GAIN` of the time per image for each doubling.

    If not, both are timed again, in case other processes kept the CPU busy.
    """
    most: float = (1 - _LEAST_GAIN) ** math.log2(cost.images / than.images) * cost.images / than.images
    first = cost.least_seconds, than.least_seconds
    if first[0] <= most * first[1]:
        return True
    again = cost_of(cost.images).least_seconds, cost_of(than.images).least_seconds
    return min(first[0], again[0]) <= most * min(first[1], again[1])


def _room(device: torch.device, here: int, running: int) -> float:
    """Return the bytes for each of `here` processes, `running` of which already use as much memory as this one."""
    if device.type == "cuda":  # each process has a GPU of its own
        here = running = 1
    available = free_memory(device) + running * memory_in_use(device)
    return (available - _SHARE_KEPT_FREE * total_memory(device)) / here


def _random_batch(images: int, data: DataSettings, noise_columns: int) -> Batch:
    batch = empty_batch(images, data, noise_columns)
    batch.images.random_(0, 256)
    batch.noise.uniform_()
    return batch._replace(labels=torch.zeros_like(batch.labels))


@contextmanager
def _without_trace(device: torch.device) -> Iterator[None]:
    """Restore the random generators and free the device's memory when the context ends."""
    python, numpy = random.getstate(), np.random.get_state()  # used by timm's mixup
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
