"""Workers that make batches ahead, and what is done to a batch on the device."""

import atexit
import errno
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from itertools import count
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from pathlib import Path
from socket import gethostname
from weakref import WeakSet

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from mae.data.batch import Batch
from mae.data.statistics import PixelStatistics
from mae.errors import UserError, first_of
from mae.processes import end_with_parent

# What a scheduler or a person sends to the whole process group; only the trainer decides what follows.
_TRAINERS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

_GO_ON = "the same command goes on from the last checkpoint"

# Between the end of a process, which breaks its connections, and the moment at which its exit code can be had.
_SECONDS_TO_DIE = 1.0

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - asked for its size only

# Exit code of a worker that could not put a batch there.
_NO_SHARED_MEMORY = errno.ENOSPC

# Texts of torch's DataLoader and of the operating system; each has a test that fails if it changes.
_WORKER_GONE = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? (\d+)[\d, ]*\) (?:is killed by signal|exited unexpectedly)"
)
_TIMED_OUT = "DataLoader timed out"
_NO_SPACE = os.strerror(errno.ENOSPC)

_workers: WeakSet[BaseProcess] = WeakSet()
os.register_at_fork(after_in_child=_workers.clear)


def load(
    batches: Dataset[Batch],
    numbers: Sequence[int],
    workers: int,
    pin_memory: bool = False,
    timeout: float = 600.0,
) -> Iterator[Batch]:
    """The batches of the given numbers, in that order, made ahead by `workers` processes; a stream knows no numbers.

    The iterator raises a `UserError` if a worker is killed, takes more than `timeout` seconds for a batch, or finds no
    shared memory for it.
    """
    # A signal to the process group that comes before a new worker ignores it would end that worker.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _TRAINERS_SIGNALS)
    others = multiprocessing.active_children()
    try:
        made = iter(
            DataLoader(
                batches,
                batch_size=None,
                sampler=None if isinstance(batches, IterableDataset) else numbers,
                num_workers=workers,
                pin_memory=pin_memory,
                collate_fn=_as_it_is,  # type: ignore[arg-type]  # without batch_size it is given one item
                worker_init_fn=_serve_the_trainer,
                timeout=timeout if workers else 0,
            )
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    own = sorted(set(multiprocessing.active_children()) - set(others), key=lambda worker: worker.pid or 0)
    _workers.update(own)
    return _explain_failures(made, own, timeout)


def worker_failure(error: BaseException) -> UserError | None:
    """What to tell the user if `error` is torch's report of a data worker that is gone, else None.

    It comes between any two instructions of the main thread, wherever that stands.
    """
    found = _WORKER_GONE.search(str(error)) if isinstance(error, RuntimeError) else None
    return _gone(int(found[1])) if found else None


def kill_workers() -> None:
    """End all workers that are left, even stuck ones; for a trainer that is about to end."""
    _kill(list(_workers))


# Before multiprocessing's own end, which waits without limit for workers that ignore its SIGTERM.
atexit.register(kill_workers)


def normalize(
    images: UInt8[Tensor, "batch channels height width"], statistics: PixelStatistics
) -> Float32[Tensor, "batch channels height width"]:
    """uint8 pixels -> float32 with the data's own mean and standard deviation, on the images' device."""
    mean = torch.tensor(statistics.mean, device=images.device).view(1, -1, 1, 1) * 255
    std = torch.tensor(statistics.std, device=images.device).view(1, -1, 1, 1) * 255
    return (images.float() - mean) / std


def _explain_failures(made: Iterator[Batch], workers: Sequence[BaseProcess], timeout: float) -> Iterator[Batch]:
    try:
        for done in count():
            try:
                batch = next(made)
            except StopIteration:
                return
            except UserError as error:
                raise _without_traceback(error) from None
            except (RuntimeError, EOFError, OSError) as error:
                is_stuck = _TIMED_OUT in str(error)
                mistake = _stuck(done, workers, timeout) if is_stuck else _failure_within(error, workers)
                if mistake is None:
                    raise
                _kill(workers)
                raise mistake from None
            yield batch
    finally:
        # One that was killed may have held a lock that the others wait for; torch would give each of them ten seconds.
        if any(worker.exitcode for worker in workers):
            _kill(workers)


def _kill(workers: Sequence[BaseProcess]) -> None:
    is_main = threading.current_thread() is threading.main_thread()
    # torch's handler would raise an error for each of them.
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if is_main else None
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join(_SECONDS_TO_DIE)
    if handler is not None:
        signal.signal(signal.SIGCHLD, handler)


def _failure_within(error: Exception, workers: Sequence[BaseProcess]) -> UserError | None:
    """As `worker_failure`, for an error that came out of the loader: a worker that ends in the middle of a message
    shows as any error of connections."""
    until = time.monotonic() + _SECONDS_TO_DIE
    try:
        while isinstance(error, EOFError | OSError) and time.monotonic() < until:
            for worker in workers:
                if worker.pid and worker.exitcode:
                    return _gone(worker.pid)
            time.sleep(0.02)
    except RuntimeError as report:  # torch's, of that worker
        return worker_failure(report)
    return worker_failure(error)


def _gone(pid: int) -> UserError:
    exit_code = next((worker.exitcode for worker in _workers if worker.pid == pid), None)
    if exit_code in (_NO_SHARED_MEMORY, -signal.SIGBUS):
        total = shutil.disk_usage(_SHARED_MEMORY).total
        return UserError(
            f"{_SHARED_MEMORY} on {gethostname()} holds {total:,} bytes, too few for the batches that the data workers "
            "make ahead: lower data.workers, or enlarge it (docker run --shm-size 16g)"
        )
    who = f"data worker {pid} on {gethostname()}"
    if exit_code is None or exit_code >= 0:
        return UserError(f"{who} ended with exit code {exit_code}; its own message stands above")
    how = f"was killed by signal {-exit_code} ({signal.Signals(-exit_code).name})"
    if -exit_code == signal.SIGKILL:
        return UserError(f"{who} {how}, likely for lack of memory (see dmesg): lower data.workers; {_GO_ON}")
    return UserError(f"{who} {how}: a library crashed, see its message above; {_GO_ON}")


def _stuck(done: int, workers: Sequence[BaseProcess], timeout: float) -> UserError:
    pids = [str(worker.pid) for worker in workers]
    return UserError(
        f"the data workers on {gethostname()} (pids {first_of(pids, separator=', ')}) have not made batch {done} since "
        f"this start within {timeout:g} s: look whether the storage of the shards answers, and where they wait "
        f"(py-spy dump --pid PID); {_GO_ON}"
    )


def _without_traceback(error: UserError) -> UserError:
    """An error of a worker comes with its traceback as text; of one for the user only the last line is meant."""
    return type(error)(str(error).rstrip().rpartition(f"{type(error).__qualname__}: ")[2])


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _serve_the_trainer(_: int) -> None:
    """For the begin of a worker."""
    for number in _TRAINERS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _TRAINERS_SIGNALS)
    Queue._on_queue_feeder_error = staticmethod(_end_without_a_batch)  # type: ignore[attr-defined]
    end_with_parent()


def _end_without_a_batch(error: Exception, _: object) -> None:
    """For a batch that cannot be sent: by itself the queue would drop it, and the trainer wait for it in vain."""
    if _NO_SPACE in str(error):
        os._exit(_NO_SHARED_MEMORY)
    traceback.print_exception(error)
    os._exit(1)
