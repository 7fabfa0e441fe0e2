"""Workers serve their trainer: they end with it, leave its signals alone, and what befalls them is named."""

import errno
import faulthandler
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from mae.data.batch import Batch, empty_batch
from mae.data.loader import kill_workers, load, normalize, worker_failure
from mae.data.settings import DataSettings
from mae.data.statistics import PixelStatistics
from mae.errors import BadDataError, UserError, user_error_of

HOST = socket.gethostname()
ROOT = Path(__file__).parent.parent.parent

# torch's error for a lost worker may come in the midst of what cannot raise, such as the end of an object.
interrupted = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Numbered(Dataset[Batch]):
    """Batch n bears n as the id of all its samples; at one number it does something else first."""

    def __init__(self, at: int = -1, does: Callable[[], object] = lambda: None, size: int = 8) -> None:
        self.at, self.does = at, does
        self.data = DataSettings(image_size=(size,))

    def __getitem__(self, number: int) -> Batch:
        if number == self.at:
            self.does()
        batch = empty_batch(2, self.data, noise_columns=0)
        return batch._replace(ids=torch.full((2,), number))


@pytest.fixture(autouse=True)
def _no_worker_outlives_its_test() -> Iterator[None]:
    """An error that a test looks at keeps its loader alive."""
    yield
    kill_workers()


def workers_of(trainer: int) -> list[int]:
    """Its children, without the tracker of multiprocessing's resources, which ends by itself."""
    children = Path(f"/proc/{trainer}/task/{trainer}/children").read_text().split()
    return [int(child) for child in children if "tracker" not in Path(f"/proc/{child}/cmdline").read_text()]


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def seconds_until(condition: Callable[[], bool], at_most: float) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < at_most
        time.sleep(0.02)
    return time.monotonic() - began


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_come_in_the_order_of_their_numbers(workers: int) -> None:
    numbers = [3, 1, 4, 15, 9, 2, 6]
    batches = list(load(Numbered(), numbers, workers))
    assert [batch.ids[0].item() for batch in batches] == numbers


@interrupted
def test_p09_a_killed_worker_is_named_with_its_signal_and_the_remedy() -> None:
    batches = load(Numbered(5, lambda: os.kill(os.getpid(), signal.SIGKILL)), range(10), workers=1)
    with pytest.raises(UserError) as error:
        list(batches)
    assert re.fullmatch(
        r"data worker \d+ on \S+ was killed by signal 9 \(SIGKILL\), probably because memory ran out \(see dmesg\): "
        "lower data.workers; run the same command again to resume from the last checkpoint",
        str(error.value),
    )


@interrupted
def test_p09_a_worker_killed_while_the_trainer_computes_is_known_from_the_error_of_torch() -> None:
    others = set(workers_of(os.getpid()))
    batches = load(Numbered(), range(100), workers=2)
    next(batches)
    victim, _ = set(workers_of(os.getpid())) - others
    with pytest.raises(RuntimeError, match="killed by signal") as error:
        os.kill(victim, signal.SIGKILL)
        seconds_until(lambda: False, at_most=5)
    mistake = worker_failure(error.value)
    assert mistake is not None
    assert str(mistake).startswith(f"data worker {victim} on {HOST} was killed by signal 9 (SIGKILL)")


def crash() -> None:
    faulthandler.disable()  # pytest's would fill a page with tracebacks of a crash that is meant
    os.kill(os.getpid(), signal.SIGILL)


@interrupted
def test_p09_a_worker_that_crashes_is_no_lack_of_memory() -> None:
    batches = load(Numbered(1, crash), range(10), workers=1)
    with pytest.raises(UserError, match=r"data worker \d+ on \S+ was killed by signal 4 \(SIGILL\): a library crashed"):
        list(batches)


@interrupted
def test_a_lost_worker_is_known_even_where_no_signal_reports_it() -> None:
    """As where other code has taken torch's handler of SIGCHLD away: torch then finds the worker gone by itself."""
    handler = signal.getsignal(signal.SIGCHLD)
    batches = load(Numbered(1, lambda: os.kill(os.getpid(), signal.SIGKILL)), range(10), workers=1, timeout=2.0)
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with pytest.raises(UserError, match=r"data worker \d+ on \S+ was killed by signal 9 \(SIGKILL\)") as error:
            list(batches)
    finally:
        signal.signal(signal.SIGCHLD, handler)
    assert re.search(r"worker \(pid\(s\) \d+\) exited unexpectedly", str(error.value.__context__))


class Unsendable(Numbered):
    """Its batch 1 cannot leave the worker."""

    def __getitem__(self, number: int) -> Batch:
        return super().__getitem__(number)._replace(bad=[threading.Lock()] if number == 1 else [])  # type: ignore[list-item]


@interrupted
def test_a_batch_that_cannot_be_sent_is_not_lost_in_silence() -> None:
    with pytest.raises(UserError, match=r"data worker \d+ on \S+ ended with exit code 1; see its message above"):
        list(load(Unsendable(), range(3), workers=1))


@interrupted
@pytest.mark.parametrize(
    ("limit", "words"),
    [
        (resource.RLIMIT_NOFILE, r"Too many open files; raise the number of open files \(ulimit -n\)"),
        (resource.RLIMIT_FSIZE, r"File too large; raise the limit on the size of a file \(ulimit -f\)"),
    ],
)
def test_a_limit_that_keeps_a_worker_from_sending_is_named(limit: int, words: str) -> None:
    batches = Numbered(1, lambda: resource.setrlimit(limit, (3, 3)))
    with pytest.raises(UserError, match=rf"data worker \d+ on \S+ could not send a batch: {words}"):
        list(load(batches, range(3), workers=1))


def test_other_errors_are_no_failures_of_workers() -> None:
    for error in (ValueError("DataLoader worker (pid 1) is killed by signal: Killed."), RuntimeError("shared memory")):
        assert worker_failure(error) is None


def fail_for_the_user() -> None:
    raise BadDataError("shard 3: what, got, allowed")


def test_a_mistake_found_by_a_worker_stays_one_line_of_its_kind() -> None:
    with pytest.raises(BadDataError) as error:
        list(load(Numbered(2, fail_for_the_user), range(3), workers=1))
    assert str(error.value) == "shard 3: what, got, allowed"


def test_a_bug_in_a_worker_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError, match="in <lambda>"):
        list(load(Numbered(2, lambda: 1 // 0), range(3), workers=1))


@pytest.mark.parametrize("error", [BlockingIOError(errno.EAGAIN, "busy"), RuntimeError("can't start new thread")])
def test_where_no_more_processes_are_allowed_none_is_left_behind(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """multiprocessing would wait without end for a worker that ignores its signals."""
    start, started = BaseProcess.start, list[BaseProcess]()

    def limited(process: BaseProcess) -> None:
        if started:
            raise error
        start(process)
        started.append(process)

    monkeypatch.setattr(BaseProcess, "start", limited)
    with pytest.raises(type(error)) as caught:
        load(Numbered(), range(3), workers=2)
    assert not started[0].is_alive()
    assert "raise the number of processes (ulimit -u" in str(user_error_of(caught.value))


def test_p03_workers_ignore_the_signals_of_their_trainer() -> None:
    batches = load(Numbered(), range(50), workers=2)
    for worker in workers_of(os.getpid()):  # they may just have begun
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            os.kill(worker, number)
    assert [batch.ids[0].item() for batch in batches] == list(range(50))


def test_normalised_pixels_have_the_data_set_s_mean_and_deviation_taken_out() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = np.array([0.1, 0.5, 0.9]), np.array([0.2, 0.3, 0.4])
    found = normalize(images, PixelStatistics(tuple(mean.tolist()), tuple(std.tolist())))
    expected = (images.numpy() / 255 - mean[:, None, None]) / std[:, None, None]
    assert found.dtype == torch.float32
    assert np.abs(found.numpy() - expected).max() < 1e-5


TRAINER = """
import os, sys, threading, time
sys.path.insert(0, {root!r})
from tests.data.test_loader import Numbered
from mae.data.loader import load
from mae.training.processes.first_error import errors_said_once

def stick():
    threading.Event().wait()

with errors_said_once():
    batches = load({dataset}, range(1000), 2, timeout={timeout})
    for number, batch in enumerate(batches):
        print(number, flush=True)
        {each}
"""


@pytest.fixture
def write_trainer(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a program which trains on `dataset` with two workers and does `each` after each batch."""

    def write(dataset: str, each: str, timeout: float = 600.0) -> Path:
        script = tmp_path / "trainer.py"
        script.write_text(TRAINER.format(root=str(ROOT), dataset=dataset, each=each, timeout=timeout))
        return script

    return write


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """A function that starts a program, which does not outlive the test."""
    started = []

    def run(*command: str | Path) -> subprocess.Popen[str]:
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def test_p10_a_stuck_worker_is_named_and_does_not_outlive_its_trainer(
    write_trainer: Callable[..., Path], start: Callable[..., subprocess.Popen[str]]
) -> None:
    trainer = start(sys.executable, write_trainer("Numbered(3, stick)", "pass", timeout=1.0))
    assert trainer.stdout is not None
    trainer.stdout.readline()
    workers = workers_of(trainer.pid)
    began = time.monotonic()
    _, errors = trainer.communicate(timeout=30)
    pids = ", ".join(map(str, sorted(workers)))
    assert errors.startswith(
        f"error: the data workers on {HOST} (pids {pids}) did not finish batch 3 of this start within 1 s: check"
    )
    assert errors.count("\n") == 1
    assert trainer.returncode == 2
    assert time.monotonic() - began < 20
    assert len(workers) == 2
    assert not any(map(is_alive, workers))


def test_p10_workers_that_are_frozen_after_they_announced_a_batch_are_named(
    write_trainer: Callable[..., Path], start: Callable[..., subprocess.Popen[str]]
) -> None:
    trainer = start(sys.executable, write_trainer("Numbered()", "time.sleep(2)", timeout=1.0))
    assert trainer.stdout is not None
    trainer.stdout.readline()
    time.sleep(1)
    workers = workers_of(trainer.pid)
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    _, errors = trainer.communicate(timeout=30)
    assert re.match(rf"error: the data workers on {HOST} \(pids [\d, ]+\) did not finish batch \d ", errors), errors
    assert errors.count("\n") == 1
    assert trainer.returncode == 2
    assert not any(map(is_alive, workers))


def test_workers_end_with_a_trainer_that_is_killed(
    write_trainer: Callable[..., Path], start: Callable[..., subprocess.Popen[str]]
) -> None:
    """One of them waits for work, the other is stuck in it."""
    trainer = start(sys.executable, write_trainer("Numbered(9, stick)", "time.sleep(60) if number == 8 else None"))
    assert trainer.stdout is not None
    for _ in range(9):
        trainer.stdout.readline()
    workers = workers_of(trainer.pid)
    assert len(workers) == 2
    trainer.kill()
    assert seconds_until(lambda: not any(map(is_alive, workers)), at_most=10) < 5


def test_a_trainer_that_stops_half_way_leaves_soon_and_with_its_exit_code(
    write_trainer: Callable[..., Path], start: Callable[..., subprocess.Popen[str]]
) -> None:
    trainer = start(sys.executable, write_trainer("Numbered(5, stick)", "sys.exit(7) if number == 3 else None"))
    assert trainer.stdout is not None
    trainer.stdout.readline()
    began = time.monotonic()
    _, errors = trainer.communicate(timeout=30)
    assert (trainer.returncode, errors) == (7, "")
    assert time.monotonic() - began < 20


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="only root can shrink /dev/shm")
def test_p11_too_little_shared_memory_is_named(
    write_trainer: Callable[..., Path], start: Callable[..., subprocess.Popen[str]]
) -> None:
    script = write_trainer("Numbered(size=512)", "time.sleep(0.1)")
    command = f"mount -t tmpfs -o size=2m tmpfs /dev/shm && exec {sys.executable} {script}"
    trainer = start("unshare", "-m", "sh", "-c", command)
    _, errors = trainer.communicate(timeout=60)
    # Where the memory ends within a page, torch's handler of bus errors has a line of its own before ours.
    assert errors.splitlines(keepends=True)[-1] == (
        f"error: /dev/shm on {HOST} has 2,097,152 bytes, too few for the batches that the data workers prepare ahead: "
        "lower data.workers, or enlarge it (docker run --shm-size 16g)\n"
    )
    assert trainer.returncode == 2
