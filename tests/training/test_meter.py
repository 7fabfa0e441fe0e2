"""What a line of the log tells about speed and memory."""

import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from mae.training import meter as meter_module
from mae.training.context import training
from mae.training.meter import Meter, Steps
from training.jobs import job_of

BATCH, FLOPS = 8, 3 * 2 * 64


@pytest.fixture
def shard(make_shards: Callable[..., Path]) -> Path:
    return make_shards([24]) / "train-000000.tar"


def lines(shard: Path, run_dir: Path, steps: int = 4) -> list[dict[str, Any]]:
    job = job_of(shard, run_dir, allowed=0, log_every=2)
    job.folder.pictures.mkdir(parents=True, exist_ok=True)
    with training(job) as numbers:
        assert len(list(islice(numbers, steps))) == steps
    return job.folder.metrics()


def test_a_line_tells_step_time_operations_and_memory(shard: Path, tmp_path: Path) -> None:
    found = lines(shard, tmp_path / "run")
    assert [line["step"] for line in found] == [2, 4]
    for line in found:
        assert line["step_seconds"] * line["images_per_second"] == pytest.approx(BATCH, rel=1e-2)
        assert line["tflops"] == pytest.approx(FLOPS * line["images_per_second"] / 1e12, rel=1e-2)
        assert 10 * 2**20 < line["peak_memory"] < 100 * 2**30
        assert "mfu" not in line, "no peak is known of a CPU"


def test_operations_are_those_of_one_device(
    shard: Path, tmp_path: Path, on_two_ranks: Callable[[Callable[[], Any]], list[Any]]
) -> None:
    line = on_two_ranks(lambda: lines(shard, tmp_path / "run"))[0][-1]
    assert line["tflops"] == pytest.approx(FLOPS * line["images_per_second"] / 2 / 1e12, rel=1e-2)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_mfu_is_a_share_of_the_peak_in_bf16_only(
    precision: str, shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(shard, tmp_path / "run", allowed=0)
    monkeypatch.setattr(meter_module, "peak_flops", lambda device: 1e6)
    monkeypatch.setattr(job.accelerator.state, "_mixed_precision", precision)
    meter = Meter(job.accelerator, job.folder, job.progress, 0)
    meter.add(torch.ones(()), torch.ones(()), [])
    meter.read(1)
    timing = meter.timing(BATCH, FLOPS)
    if precision == "no":
        assert "mfu" not in timing
    else:
        assert timing["mfu"] == pytest.approx(timing["tflops"] * 1e12 / 1e6, rel=1e-2)


def test_steps_of_before_a_resume_count_for_the_loss_and_not_for_the_speed(shard: Path, tmp_path: Path) -> None:
    job = job_of(shard, tmp_path / "run", allowed=0)
    before = Steps(losses=[3.0] * 1000, norms=[1.0] * 1000, skipped=[False] * 1000)
    meter = Meter(job.accelerator, job.folder, job.progress, 0, unlogged_steps=before.to_json())
    time.sleep(0.05)
    meter.add(torch.full((), 3.0), torch.ones(()), [])
    meter.read(1001)
    timing = meter.timing(BATCH, FLOPS)
    assert len(meter.steps.losses) == 1001
    assert timing["step_seconds"] >= 0.05
    assert timing["images_per_second"] <= BATCH / 0.05
