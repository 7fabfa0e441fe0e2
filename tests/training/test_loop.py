"""The pure parts of the loop; the whole of it runs in tests/pipelines."""

import random

import numpy as np
import pytest
import torch

from mae.training.loop import seed_step, total_steps
from mae.training.progress import TrainingProgress, duration


@pytest.mark.parametrize(
    ("samples", "epochs", "batch", "steps"), [(100, 1.0, 10, 10), (25, 4.0, 8, 13), (25, 0.1, 8, 1), (7, 3.0, 7, 3)]
)
def test_every_sample_is_seen_as_often_as_asked(samples: int, epochs: float, batch: int, steps: int) -> None:
    assert total_steps(samples, epochs, batch) == steps


def draws(seed: int, step: int, rank: int) -> tuple[float, float, float]:
    seed_step(seed, step, rank)
    return float(torch.rand(())), float(np.random.rand()), random.random()


def test_generators_are_keyed_by_seed_step_and_rank() -> None:
    cases = [(s, t, r) for s in (0, 1) for t in (0, 1, 10**6) for r in (0, 1)]
    assert len({draws(*case) for case in cases}) == len(cases)
    assert draws(1, 2, 3) == draws(1, 2, 3)


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (75.0, "1:15"), (3700.0, "1:01:40")])
def test_durations_read_as_people_write_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_progress_prints_plain_lines_without_a_terminal_and_only_when_enabled(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for enabled in (True, False):
        progress = TrainingProgress("train", enabled)
        with progress.running(2, 10):
            progress.step(3)
            progress.status(4, "loss 1.0 [bold]")
    assert capsys.readouterr().out == "train 4/10 loss 1.0 [bold]\n"
