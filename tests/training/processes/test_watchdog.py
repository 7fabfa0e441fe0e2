"""A step that is stuck shows where."""

import multiprocessing
import os
import sys
import time
from pathlib import Path

from mae.training.processes.watchdog import StackWatchdog


def test_r03_the_stacks_of_a_step_that_is_stuck_are_written_and_of_no_other(tmp_path: Path) -> None:
    def step(watchdog: StackWatchdog, seconds: float) -> None:
        watchdog.reset()
        time.sleep(seconds)

    def train() -> None:
        os.dup2(os.open(tmp_path / "stderr", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
        sys.__stderr__ = open(2, "w", closefd=False)  # noqa: SIM115 - a descriptor
        watchdog = StackWatchdog(1.0)
        for _ in range(15):
            step(watchdog, 0.1)
        os.write(2, b"alive\n")
        step(watchdog, 1.5)
        watchdog.stop()
        time.sleep(1.2)

    rank = multiprocessing.get_context("fork").Process(target=train)
    rank.start()
    rank.join()
    assert rank.exitcode == 0
    before, after = (tmp_path / "stderr").read_text().split("alive\n")
    assert before == ""
    assert after.count("Timeout (") == 1
    assert "in step" in after


def test_a_reset_costs_next_to_nothing() -> None:
    watchdog = StackWatchdog(600.0)
    watchdog.reset()
    seconds = []
    for _ in range(10):  # others that keep the processor busy do not disturb all of them
        began = time.perf_counter()
        for _ in range(1000):
            watchdog.reset()
        seconds.append(time.perf_counter() - began)
    watchdog.stop()
    assert min(seconds) / 1000 < 20e-6  # about 1 us
