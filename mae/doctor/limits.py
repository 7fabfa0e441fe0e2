"""What the workers of a run need of this machine, and would fail without."""

import resource
import shutil
from pathlib import Path

from mae.data.batch import TrainingBatches
from mae.data.plan import BatchPlan
from mae.doctor.finding import counted, gigabytes
from mae.errors import UserError

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (looked at, not written to)
# By torch's DataLoader, for each worker.
_BATCHES_AHEAD = 2
_TENSORS_PER_BATCH = 5
_PIPES_PER_WORKER = 4
# At most so many shards are open at a time in a process: see `mae.data.reader`.
_SHARDS_OPEN_AT_MOST = 256


def shared_memory(batches: TrainingBatches, local_processes: int, unit: int) -> str:
    """How much of /dev/shm the batches take in which workers hand over their images; containers often have 64 MB.

    Raises:
        UserError: if there is less.
    """
    data, plan = batches.recipe.data, batches.plan
    height, width = data.size
    row = data.channels * height * width + 8 + 8 + 4 * batches.recipe.noise_columns  # image, label, id, noise
    ahead = data.workers * _BATCHES_AHEAD * local_processes
    needed, free = ahead * plan.per_process * row, shutil.disk_usage(_SHARED_MEMORY).free
    found = (
        f"{_SHARED_MEMORY} has {gigabytes(free)} free, needed are {gigabytes(needed)} for {counted(ahead, 'batch')} of "
        f"{counted(plan.per_process, 'image')} made ahead"
    )
    if needed > free:
        fitting = largest_micro_batch(plan, free // (ahead * row), unit)
        smaller = f", or --micro_batch_size {fitting}" if fitting else ""
        raise UserError(
            f"{found}; give the machine more (docker run --shm-size 16g), or choose fewer data.workers{smaller}"
        )
    return found


def open_files(shards: int, workers: int) -> str:
    """How many descriptors a process needs: shards, pipes to the workers, and one for each tensor on its way.

    Raises:
        UserError: if fewer are allowed.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    now = len(list(Path("/proc/self/fd").iterdir()))
    per_worker = _PIPES_PER_WORKER + _BATCHES_AHEAD * _TENSORS_PER_BATCH
    needed = now + min(shards, _SHARDS_OPEN_AT_MOST) + workers * per_worker
    found = (
        f"{soft:,} are allowed, about {needed:,} needed for {counted(shards, 'shard')} and {counted(workers, 'worker')}"
    )
    if soft != resource.RLIM_INFINITY and needed > soft:
        by_root = (
            "" if hard == resource.RLIM_INFINITY or needed <= hard else f", after root has raised the hard one, {hard}"
        )
        raise UserError(f"{found}; raise the limit in the shell that starts the run{by_root}: ulimit -n {needed}")
    return found


def largest_micro_batch(plan: BatchPlan, most: int, unit: int) -> int | None:
    """The greatest `micro_batch_size` of at most `most` images into which the share of a process divides."""
    share = plan.per_process * plan.accumulation
    return next((size for size in range(min(most, share), 0, -1) if share % size == 0 and size % unit == 0), None)
