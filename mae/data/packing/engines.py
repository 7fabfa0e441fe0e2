"""Engines that run the tasks of a pack: this process, processes on this machine, or a Ray cluster."""

import logging
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from ctypes import c_int64
from functools import partial
from itertools import islice
from multiprocessing.sharedctypes import SynchronizedArray
from typing import Any, TypeAlias

import torch

from mae.errors import UserError
from mae.processes import end_with_parent

Advance: TypeAlias = Callable[[int, int], None]
"""Function that takes how many more images are done, and their bytes in the source."""
Task: TypeAlias = Callable[[int, Advance], None]
"""Function that packs the shard of a given number."""
Engine: TypeAlias = Callable[[Task, Sequence[int], Advance], None]
"""Function that runs a task for each number; the first error stops it."""

_POLL_SECONDS = 0.2
_CONNECT_TIMEOUT = 10


def process_engine(workers: int) -> Engine:
    """Return an engine of `workers` processes; with 0, 1 or a single task, this process does the work."""
    return partial(_run_in_processes, workers)


def ray_engine(local_workers: int) -> Engine:
    """Return an engine on the Ray cluster of RAY_ADDRESS or of this machine, or else on a new local Ray.

    Raises:
        UserError: if Ray is not installed.
    """
    try:
        import ray  # noqa: F401, PLC0415 (an extra, and slow to import)
    except ImportError:
        raise UserError("--engine ray needs Ray: pip install 'mae-pretraining[ray]'") from None
    return partial(_run_on_ray, local_workers)


def _run_in_processes(workers: int, task: Task, numbers: Sequence[int], advance: Advance) -> None:
    if min(workers, len(numbers)) <= 1:
        for number in numbers:
            task(number, advance)
        return
    # The fork server has no threads; a fork of this process could copy a lock that is never released.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, task.__module__])
    done: SynchronizedArray[int] = context.Array(c_int64, 2)
    count = min(workers, len(numbers))
    with ProcessPoolExecutor(count, mp_context=context, initializer=_start_worker, initargs=(done,)) as pool:
        try:
            rest, reported = iter(numbers), (0, 0)
            pending = {pool.submit(_run_counted, task, number) for number in islice(rest, 2 * count)}
            while pending:
                ended, pending = wait(pending, _POLL_SECONDS, FIRST_COMPLETED)
                for future in ended:
                    future.result()
                pending |= {pool.submit(_run_counted, task, number) for number in islice(rest, len(ended))}
                now = (done[0], done[1])
                advance(now[0] - reported[0], now[1] - reported[1])
                reported = now
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, probably because memory ran out; run the same command again with fewer "
                "--workers: finished shards are kept"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


# Images and bytes that all workers have done, in shared memory; set when a worker starts.
_done: "SynchronizedArray[int] | None" = None


def _start_worker(done: "SynchronizedArray[int]") -> None:
    global _done  # noqa: PLW0603
    _done = done
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all processes; only the parent reports it
    end_with_parent()


def _run_counted(task: Task, number: int) -> None:
    def advance(images: int, size: int) -> None:
        assert _done is not None
        with _done.get_lock():
            _done[0] += images
            _done[1] += size

    task(number, advance)


def _run_on_ray(local_workers: int, task: Task, numbers: Sequence[int], advance: Advance) -> None:
    import ray  # noqa: PLC0415

    with _connected(ray, local_workers):
        remote = ray.remote(_run_and_count)
        pending = [remote.remote(task, number) for number in numbers]
        try:
            while pending:
                ended, pending = ray.wait(pending)
                for result in ray.get(ended):
                    advance(*result)
        except ray.exceptions.RayError as error:
            if isinstance(cause := getattr(error, "cause", None), UserError):
                raise cause from None
            raise UserError(
                f"Ray failed ({' '.join(str(error).split())}); run the same command again: finished shards are kept"
            ) from None
        finally:
            for result in pending:
                ray.cancel(result)


def _run_and_count(task: Task, number: int) -> tuple[int, int]:
    images, size = 0, 0

    def advance(more_images: int, more_bytes: int) -> None:
        nonlocal images, size
        images, size = images + more_images, size + more_bytes

    torch.set_num_threads(1)
    task(number, advance)
    return images, size


@contextmanager
def _connected(ray: Any, local_workers: int) -> Iterator[None]:
    """Connect to a running cluster, or else start one here; leave an existing connection open."""
    if ray.is_initialized():
        yield
        return
    _require_answer(os.environ.get("RAY_ADDRESS", ""))
    # Ray logs each error several times; the exception is enough.
    quiet = {"logging_level": logging.CRITICAL, "log_to_driver": False}
    try:
        ray.init(address="auto", **quiet)
    except ConnectionError:
        ray.init(address="local", num_cpus=max(1, local_workers), include_dashboard=False, **quiet)
    try:
        yield
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Raise an error at once if no cluster answers; Ray itself would try for many minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT).close()
    except OSError as error:
        raise UserError(
            f"no Ray cluster answers at {address} (RAY_ADDRESS): {error}; start one with `ray start --head`"
        ) from None
