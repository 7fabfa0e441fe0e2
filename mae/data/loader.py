"""Worker processes that prepare batches ahead, and normalization of a batch on the device."""

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
from contextlib import contextmanager
from itertools import count
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from pathlib import Path
from socket import gethostname
from typing import TypeVar
from weakref import WeakSet

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from mae.data.statistics import PixelStatistics
from mae.errors import MACHINE_REMEDIES, UserError, first_of
from mae.processes import end_with_parent

# A scheduler or a person sends these to the whole process group; only the trainer handles them.
_TRAINER_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

_RESUME = "run the same command again to resume from the last checkpoint"
# A process that ends breaks its connections some time before its exit code can be read.
_EXIT_TIMEOUT = 1.0
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - only its size is read
# Exit codes of a worker that could not send a batch: no shared memory, too many open files, too large a file.
_UNSENT = (errno.ENOSPC, errno.EMFILE, errno.EFBIG)
# How often it is looked whether a batch is awaited for too long, and how much later than torch itself would say so.
_WATCH_INTERVAL, _WATCH_DELAY = 0.5, 2.0

# Texts of torch's DataLoader and of the operating system; each has a test that fails if it changes.
_WORKER_GONE = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? (\d+)[\d, ]*\) (?:is killed by signal|exited unexpectedly)"
)
_TIMED_OUT = "DataLoader timed out"
# torch 2.11 reports a full /dev/shm by this text instead of that of ENOSPC.
_NO_SHARED_MEMORY = "unable to allocate shared memory"

AnyBatch = TypeVar("AnyBatch")
_workers: WeakSet[BaseProcess] = WeakSet()
os.register_at_fork(after_in_child=_workers.clear)


def load(
    batches: Dataset[AnyBatch], numbers: Sequence[int], workers: int, pin_memory: bool = False, timeout: float = 600.0
) -> Iterator[AnyBatch]:
    """Return an iterator over the batches with the given numbers, in order, prepared ahead by `workers` processes.

    An iterable data set ignores `numbers`. The iterator raises `UserError` if a worker is killed, needs more than
    `timeout` seconds for a batch, or finds no shared memory for it.
    """
    # A signal to the process group would end a new worker that does not ignore it yet.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _TRAINER_SIGNALS)
    others = multiprocessing.active_children()
    try:
        made = iter(
            DataLoader(
                batches,
                batch_size=None,
                sampler=None if isinstance(batches, IterableDataset) else numbers,
                num_workers=workers,
                pin_memory=pin_memory,
                collate_fn=_unchanged,  # without batch_size it gets one item
                worker_init_fn=_prepare_worker,
                timeout=timeout if workers else 0,
            )
        )
    except BaseException:  # multiprocessing would wait for ever for those that did start
        _kill(_started_since(others))
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    own = _started_since(others)
    _workers.update(own)
    return _explain_failures(made, own, timeout)


def _started_since(others: Sequence[BaseProcess]) -> list[BaseProcess]:
    return sorted(set(multiprocessing.active_children()) - set(others), key=lambda worker: worker.pid or 0)


def worker_failure(error: BaseException) -> UserError | None:
    """Return the error for the user if `error` is torch's report of a lost data worker, else None.

    torch raises it in a signal handler, so it can interrupt the main thread anywhere.
    """
    found = _WORKER_GONE.search(str(error)) if isinstance(error, RuntimeError) else None
    return _gone(int(found[1])) if found else None


def kill_workers() -> None:
    """Kill all workers that are still alive, even stuck ones; for a trainer that is about to exit."""
    _kill(list(_workers))


# Runs before multiprocessing's exit handler, which waits without limit for workers that ignore its SIGTERM.
atexit.register(kill_workers)


def normalize(
    images: UInt8[Tensor, "batch channels height width"], statistics: PixelStatistics
) -> Float32[Tensor, "batch channels height width"]:
    """Subtract the mean of the data set and divide by its standard deviation; on the device of `images`."""
    mean = torch.tensor(statistics.mean, device=images.device).view(1, -1, 1, 1) * 255
    std = torch.tensor(statistics.std, device=images.device).view(1, -1, 1, 1) * 255
    return (images.float() - mean) / std


class _Watch(threading.Thread):
    """Thread that kills the workers when the trainer waits for a batch much longer than `timeout` seconds.

    torch's own limit does not hold while a batch is received: a worker that has announced a batch and stops then (it is
    frozen, or waits for a disk) would hold the trainer for ever.
    """

    def __init__(self, workers: Sequence[BaseProcess], timeout: float) -> None:
        super().__init__(daemon=True)
        self.awaited: int | None = None
        """Number of the batch that the trainer waits for; None: it does not wait."""
        self.has_killed = False
        self._workers = workers
        self._looks = (timeout + _WATCH_DELAY) / _WATCH_INTERVAL
        self._ended = threading.Event()

    def run(self) -> None:
        """Count looks, not seconds: a machine that was asleep has made no batch either."""
        looks, before = 0, None
        while not self._ended.wait(_WATCH_INTERVAL):
            looks = looks + 1 if self.awaited is not None and self.awaited == before else 0
            before = self.awaited
            if looks > self._looks:
                self.has_killed = True
                for worker in self._workers:
                    worker.kill()
                return

    def end(self) -> None:
        """End the thread."""
        self._ended.set()


def _explain_failures(made: Iterator[AnyBatch], workers: Sequence[BaseProcess], timeout: float) -> Iterator[AnyBatch]:
    watch = _Watch(workers, timeout)
    if workers:
        watch.start()
    try:
        for done in count():
            watch.awaited = done
            try:
                batch = next(made)
            except StopIteration:
                return
            except UserError as error:
                raise _without_traceback(error) from None
            except (RuntimeError, EOFError, OSError) as error:
                try:
                    with _no_reports_of_torch():
                        timed_out = watch.has_killed or _TIMED_OUT in str(error)
                        mistake = _stuck(done, workers, timeout) if timed_out else _failure_within(error, workers)
                except RuntimeError as report:  # torch's came just before they were turned off
                    mistake = worker_failure(report)
                if mistake is None:
                    raise
                _kill(workers)
                raise mistake from None
            watch.awaited = None
            yield batch
    finally:
        watch.end()
        # A killed worker may have held a lock that the others wait for; torch would wait ten seconds for each of them.
        if any(worker.exitcode for worker in workers):
            _kill(workers)


def _kill(workers: Sequence[BaseProcess]) -> None:
    with _no_reports_of_torch():
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join(_EXIT_TIMEOUT)


@contextmanager
def _no_reports_of_torch() -> Iterator[None]:
    """Let workers end without the error that torch's handler raises for each, in the midst of any line."""
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if is_main else None
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGCHLD, handler)


def _failure_within(error: Exception, workers: Sequence[BaseProcess]) -> UserError | None:
    """Return the error for the user if the loader's `error` was caused by a lost worker, else None.

    A worker that ends while it sends a batch appears as a connection error, so wait a moment for its exit code.
    """
    until = time.monotonic() + _EXIT_TIMEOUT
    while isinstance(error, EOFError | OSError) and time.monotonic() < until:
        for worker in workers:
            if worker.pid and worker.exitcode:
                return _gone(worker.pid)
        time.sleep(0.02)
    return worker_failure(error)


def _gone(pid: int) -> UserError:
    exit_code = next((worker.exitcode for worker in _workers if worker.pid == pid), None)
    if exit_code in (errno.ENOSPC, -signal.SIGBUS):
        total = shutil.disk_usage(_SHARED_MEMORY).total
        return UserError(
            f"{_SHARED_MEMORY} on {gethostname()} has {total:,} bytes, too few for the batches that the data workers "
            "prepare ahead: lower data.workers, or enlarge it (docker run --shm-size 16g)"
        )
    who = f"data worker {pid} on {gethostname()}"
    if exit_code in _UNSENT:
        return UserError(f"{who} could not send a batch: {os.strerror(exit_code)}; {MACHINE_REMEDIES[exit_code]}")
    if exit_code is None or exit_code >= 0:
        return UserError(f"{who} ended with exit code {exit_code}; see its message above")
    how = f"was killed by signal {-exit_code} ({signal.Signals(-exit_code).name})"
    if -exit_code == signal.SIGKILL:
        return UserError(f"{who} {how}, probably because memory ran out (see dmesg): lower data.workers; {_RESUME}")
    return UserError(f"{who} {how}: a library crashed, see its message above; {_RESUME}")


def _stuck(done: int, workers: Sequence[BaseProcess], timeout: float) -> UserError:
    pids = [str(worker.pid) for worker in workers]
    return UserError(
        f"the data workers on {gethostname()} (pids {first_of(pids, separator=', ')}) did not finish batch {done} of "
        f"this start within {timeout:g} s: check that the storage of the shards responds, and where the workers wait "
        f"(py-spy dump --pid PID); {_RESUME}"
    )


def _without_traceback(error: UserError) -> UserError:
    """Return a worker's `UserError` without the traceback that torch puts into its message."""
    return type(error)(str(error).rstrip().rpartition(f"{type(error).__qualname__}: ")[2])


def _unchanged(batch: AnyBatch) -> AnyBatch:
    return batch


def _prepare_worker(_: int) -> None:
    """Make a new worker ignore the trainer's signals, report unsendable batches, and end with the trainer."""
    for number in _TRAINER_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _TRAINER_SIGNALS)
    Queue._on_queue_feeder_error = staticmethod(_exit_for_unsent_batch)  # type: ignore[attr-defined]
    end_with_parent()


def _exit_for_unsent_batch(error: Exception, _: object) -> None:
    """End a worker whose batch cannot be sent; the queue would drop the batch, and the trainer would wait for it."""
    for number in _UNSENT:
        if os.strerror(number) in str(error):
            os._exit(number)
    if _NO_SHARED_MEMORY in str(error):
        os._exit(errno.ENOSPC)
    traceback.print_exception(error)
    os._exit(1)
