"""No process outlives the one it works for."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from mae.processes import default_workers, end_with_parent
from tests.data.test_loader import is_alive, seconds_until

ROOT = Path(__file__).parent.parent

# It writes down each SIGTERM it gets.
TRAINER = """
import os, signal, sys, threading, time
from mae.processes import end_with_launcher

def note(*_):
    with open(sys.argv[1], "a") as file:
        file.write("SIGTERM\\n")

signal.signal(signal.SIGTERM, note)
for _ in range(3):
    end_with_launcher()
print(os.getpid(), threading.active_count() - 1, flush=True)
for _ in range(40):
    time.sleep(0.1)
"""
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"


def test_there_is_a_worker_for_each_core() -> None:
    assert default_workers() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("environment", "name", "is_watched"),
    [
        pytest.param({"TORCHELASTIC_RUN_ID": "1"}, "torchrun", True, id="p08-torchrun"),
        pytest.param({"ACCELERATE_MIXED_PRECISION": "no"}, "accelerate", True, id="p08-accelerate"),
        pytest.param({"ACCELERATE_MIXED_PRECISION": "no"}, "accelerate.sh", False, id="p08-shell"),
        pytest.param({}, "accelerate", False, id="p08-nohup"),
    ],
)
def test_a_trainer_ends_with_its_launcher_and_with_nothing_else(
    environment: dict[str, str], name: str, is_watched: bool, tmp_path: Path
) -> None:
    notes, program = tmp_path / "notes", tmp_path / name
    program.write_text(LAUNCHER)
    with subprocess.Popen(
        [sys.executable, program, TRAINER, notes],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    ) as launcher:
        assert launcher.stdout is not None
        trainer, watches = map(int, launcher.stdout.readline().split())
        assert watches == is_watched
        launcher.kill()
    if is_watched:
        assert seconds_until(notes.exists, at_most=5) < 3
    seconds_until(lambda: not is_alive(trainer), at_most=10)
    assert (notes.read_text() if notes.exists() else "") == "SIGTERM\n" * is_watched


def worker(ready: Connection, seconds: float) -> None:
    end_with_parent()
    ready.send(os.getpid())
    time.sleep(seconds)


def parent(ready: Connection) -> None:
    """Starts a worker, and then a process that holds all its pipes open for longer."""
    context = multiprocessing.get_context("fork")
    context.Process(target=worker, args=(ready, 60.0), daemon=True).start()
    sleeper = context.Process(target=time.sleep, args=(60,), daemon=True)
    sleeper.start()
    ready.send(sleeper.pid)
    time.sleep(60)


def test_a_worker_ends_with_a_parent_that_is_killed_whoever_holds_its_pipe() -> None:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=parent, args=(there,))
    process.start()
    children = {here.recv(), here.recv()}
    process.kill()
    process.join()
    seconds_until(lambda: sum(map(is_alive, children)) == 1, at_most=5)
    (sleeper,) = filter(is_alive, children)
    os.kill(sleeper, signal.SIGKILL)
