"""Limits of this machine that would stop the workers of a run: shared memory and open files."""

import resource
import shutil
from pathlib import Path

from mae.data.batch import TrainingBatches
from mae.data.plan import BatchPlan
from mae.doctor.finding import gigabytes
from mae.errors import UserError
from mae.output import counted

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (only its size is read)
# Batches that torch's DataLoader prepares ahead for each worker, and what they occupy.
_BATCHES_AHEAD = 2
_TENSORS_PER_BATCH = 5
_PIPES_PER_WORKER = 4
# Most shards that a process has open at a time: see `mae.data.reader`.
_MAX_OPEN_SHARDS = 256


def shared_memory(batches: TrainingBatches, local_processes: int, unit: int) -> str:
    """Report how much of /dev/shm is free, and how much the batches of the workers take; containers often have 64 MB.

    Raises:
        UserError: if not enough is free.
    """
    data, plan = batches.recipe.data, batches.plan
    height, width = data.size
    row = data.channels * height * width + 8 + 8 + 4 * batches.recipe.noise_columns  # image, label, id, noise
    ahead = data.workers * _BATCHES_AHEAD * local_processes
    needed, free = ahead * plan.per_process * row, shutil.disk_usage(_SHARED_MEMORY).free
    found = (
        f"{_SHARED_MEMORY} has {gigabytes(free)} free, {gigabytes(needed)} are needed for {counted(ahead, 'batch')} of "
        f"{counted(plan.per_process, 'image')} prepared ahead"
    )
    if needed > free:
        fitting = largest_micro_batch(plan, free // (ahead * row), unit)
        smaller = f", or --micro_batch_size {fitting}" if fitting else ""
        raise UserError(
            f"{found}; enlarge {_SHARED_MEMORY} (docker run --shm-size 16g), or lower data.workers{smaller}"
        )
    return found


def open_files(shards: int, workers: int) -> str:
    """Report how many open files a process may have, and needs: shards, pipes to workers, and tensors in transfer.

    Raises:
        UserError: if not enough are allowed.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    now = len(list(Path("/proc/self/fd").iterdir()))
    per_worker = _PIPES_PER_WORKER + _BATCHES_AHEAD * _TENSORS_PER_BATCH
    needed = now + min(shards, _MAX_OPEN_SHARDS) + workers * per_worker
    found = (
        f"{soft:,} are allowed, about {needed:,} are needed for {counted(shards, 'shard')} and "
        f"{counted(workers, 'worker')}"
    )
    if soft != resource.RLIM_INFINITY and needed > soft:
        is_possible = hard == resource.RLIM_INFINITY or needed <= hard
        by_root = "" if is_possible else f", after root has raised the hard limit {hard}"
        raise UserError(f"{found}; raise the limit in the shell that starts the run{by_root}: ulimit -n {needed}")
    return found


def largest_micro_batch(plan: BatchPlan, most: int, unit: int) -> int | None:
    """Return the largest divisor of a process's share of the batch that is at most `most` and a multiple of `unit`."""
    share = plan.per_process * plan.accumulation
    return next((size for size in range(min(most, share), 0, -1) if share % size == 0 and size % unit == 0), None)
