"""Signals to launchers, ranks and groups: the run is saved, nobody is left behind, the same command goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent.parent
SCRIPT = str(ROOT / "pipelines" / "pretrain.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local_addr", "127.0.0.1"]
TORCHRUN += ["--nproc_per_node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--quiet"]
FLAGS = [
    "--batch_size", "8", "--log_every", "5", "--checkpoint_every", "1000", "--data.workers", "1", "--timeout", "20",
    "--data.image_size", "8", "--data.channels", "1", "--picture_every", "100000", "--picture_images", "2",
    "--model.width", "16", "--model.depth", "1", "--model.heads", "2", "--model.patch_size", "2",
    "--model.decoder_width", "8", "--model.decoder_depth", "1", "--model.decoder_heads", "2", "--epochs", "9000",
]  # fmt: skip


@pytest.fixture
def command(make_shards: Callable[..., Path], tmp_path: Path) -> list[str]:
    shards = make_shards([13, 12])
    return [SCRIPT, *FLAGS, "--data.shards", str(shards / "*.tar"), "--run_dir", str(tmp_path / "run")]


class Training:
    """A launcher with its ranks and their workers, in a process group of its own."""

    def __init__(self, launcher: list[str], command: list[str], run_dir: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        if "torch.distributed.run" not in launcher:
            environment.pop("ACCELERATE_USE_CPU")
        self.run_dir, self.first, self.log_before = run_dir, newest_step(run_dir), log_number(run_dir)
        self.errors = (run_dir.parent / "stderr").open("w+")
        self.launcher = subprocess.Popen(
            [*launcher, *command],
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
            env=environment,
            start_new_session=True,
        )
        self.everyone: list[psutil.Process] = []

    def until_it_trains(self) -> None:
        """Wait for a few lines of the log that belong to this start."""
        deadline = time.time() + 90
        while log_number(self.run_dir) == self.log_before or logged_step(self.run_dir) < self.first + 10:
            assert self.launcher.poll() is None, self.said()
            assert time.time() < deadline, self.said()
            time.sleep(0.05)
        self.everyone = psutil.Process(self.launcher.pid).children(recursive=True)

    def ranks(self) -> list[psutil.Process]:
        """In the order of their numbers."""
        found = [p for p in self.everyone if p.parent() and p.parent().pid == self.launcher.pid]
        return sorted(found, key=lambda process: int(process.environ().get("RANK", "0")))

    def until_all_are_gone(self, seconds: float) -> float:
        """Seconds it took; nobody may be left."""
        began = time.time()
        self.launcher.wait(seconds)
        _, left = psutil.wait_procs(self.everyone, timeout=max(0.1, began + seconds - time.time()))
        assert not left, [process.cmdline()[-3:] for process in left]
        return time.time() - began

    def said(self) -> str:
        self.errors.seek(0)
        return self.errors.read()


@contextmanager
def training(launcher: list[str], command: list[str], run_dir: Path) -> Iterator[Training]:
    started = Training(launcher, command, run_dir)
    try:
        started.until_it_trains()
        yield started
    finally:
        with suppress(ProcessLookupError):
            os.killpg(started.launcher.pid, signal.SIGKILL)
        for process in started.everyone:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        started.launcher.wait()
        started.errors.close()


def newest_step(run_dir: Path) -> int:
    return max((int(path.name[5:]) for path in run_dir.glob("checkpoints/step-*")), default=0)


def log_number(run_dir: Path) -> int:
    """Of the log's file: each start writes it anew, without the lines of steps that it runs again."""
    path = run_dir / "metrics.jsonl"
    return path.stat().st_ino if path.exists() else 0


def logged_step(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def left_by(run_dir: Path) -> tuple[str, str]:
    record = json.loads((run_dir / "exit.json").read_text())
    return record["reason"], record["message"]


def to_launcher(number: signal.Signals) -> Callable[[Training], None]:
    return lambda started: os.kill(started.launcher.pid, number)


def to_group(number: signal.Signals) -> Callable[[Training], None]:
    return lambda started: os.killpg(started.launcher.pid, number)


def to_rank(rank: int, number: signal.Signals) -> Callable[[Training], None]:
    return lambda started: started.ranks()[rank].send_signal(number)


SAVED = {
    "p01 SIGTERM to torchrun": to_launcher(signal.SIGTERM),
    "p02 SIGTERM to one rank": to_rank(1, signal.SIGTERM),
    "p03 SIGTERM to the whole group, workers included": to_group(signal.SIGTERM),
    "p05 SIGUSR1 to one rank": to_rank(0, signal.SIGUSR1),
    "p05 SIGUSR1 to the whole group, launcher included": to_group(signal.SIGUSR1),
    "p08 SIGKILL to the launcher": to_launcher(signal.SIGKILL),
}


@pytest.mark.slow
def test_two_ranks_save_and_leave_together_whoever_is_told_p01_p02_p03_p05_p08(
    command: list[str], tmp_path: Path
) -> None:
    """One run goes through all of it: each start goes on where the one before was cut."""
    run_dir = tmp_path / "run"
    for case, tell in SAVED.items():
        with training(TORCHRUN, command, run_dir) as started:
            tell(started)
            seconds = started.until_all_are_gone(30)
            reason, message = left_by(run_dir)
            assert reason == "preempted", f"{case}: {message}\n{started.said()}"
            assert f"saved at step {newest_step(run_dir)} of" in message, case
            assert newest_step(run_dir) > started.first, case
            assert seconds < 15, f"{case}: {seconds}"
            assert "Traceback" not in started.said().partition("elastic")[0], started.said()
    # Whoever is lost, the job ends, the first error is told, and the run goes on from what was saved.
    saved = newest_step(run_dir)
    for case, number in (("r02 killed", signal.SIGKILL), ("r03 frozen", signal.SIGSTOP)):
        with training(TORCHRUN, command, run_dir) as started:
            to_rank(1, number)(started)
            started.until_all_are_gone(90)
            assert left_by(run_dir)[0] == "error", case
            assert "rank 1" in left_by(run_dir)[1], f"{case}: {left_by(run_dir)[1]}"
            assert newest_step(run_dir) == saved, case
    weights = load_file(run_dir / "checkpoints" / f"step-{saved:09d}" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


@pytest.mark.slow
def test_accelerate_launch_leaves_no_orphan_and_a_second_signal_ends_at_once_p04_p08(
    command: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with training(ACCELERATE, command, run_dir) as started:
        to_launcher(signal.SIGTERM)(started)
        started.until_all_are_gone(20)
        assert left_by(run_dir)[0] == "preempted"
        assert f"saved at step {newest_step(run_dir)} of" in left_by(run_dir)[1]
    saved = newest_step(run_dir)
    with training(ACCELERATE, command, run_dir) as started:
        (trainer,) = started.ranks()
        trainer.send_signal(signal.SIGSTOP)  # so that it cannot save in between
        trainer.send_signal(signal.SIGTERM)
        time.sleep(2.5)
        trainer.send_signal(signal.SIGKILL)
        started.until_all_are_gone(20)
    assert newest_step(run_dir) == saved
    with training(ACCELERATE, command, run_dir) as started:
        assert started.first == saved
        to_group(signal.SIGINT)(started)
        started.until_all_are_gone(20)
        assert left_by(run_dir)[0] == "preempted"
