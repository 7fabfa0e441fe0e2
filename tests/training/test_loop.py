"""The pure parts of the loop, and what it does about bad and lost data; the whole of it runs in tests/pipelines."""

import os
import random
import tarfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mae.data.indexing import open_index
from mae.errors import UserError
from mae.progress import duration
from mae.training.context import training
from mae.training.job import Job, total_steps
from mae.training.loop import seed_step
from mae.training.progress import TrainingProgress
from mae.training.run_folder.folder import BAD_SAMPLES_FILE
from training.jobs import STEPS_PER_EPOCH, job_of


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


RECORD: dict[str, Any] = {
    "kind": "train", "step": 249_999, "epoch": 799.9, "loss": 0.1234, "lr": 1e-3, "images_per_second": 123_456.0,
    "data_wait": 0.12, "mfu": 0.45,
}  # fmt: skip


def test_progress_prints_plain_lines_without_a_terminal_and_only_when_enabled(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for enabled in (True, False):
        progress = TrainingProgress("train", enabled)
        with progress.running(2, 10):
            progress.step(3)
            progress.report(RECORD | {"step": 4, "loss": None}, 10.0)
            progress.say("[bold]")
    assert capsys.readouterr().out == (
        "train 4/10 epoch 799.9  loss not finite  lr 1.00e-03  123,456 images/s  data wait 12%  MFU 45%  ETA 0:10\n"
        "[bold]\n"
    )


def spoil(shard: Path, number: int, bytes_: bytes) -> None:
    """Overwrite the middle of an image; the file's time stays as it was."""
    times = shard.stat()
    with tarfile.open(shard) as tar:
        at = tar.getmember(f"{number:06d}.png").offset_data + 60
    with shard.open("r+b") as file:
        file.seek(at)
        file.write(bytes_)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.fixture
def bad_shard(make_shards: Callable[..., Path]) -> Path:
    """24 images; 3, 4 and 20 are damaged, which only decoding tells."""
    shard: Path = make_shards([24]) / "train-000000.tar"
    for number in (3, 4, 20):
        spoil(shard, number, bytes(30))
    return shard


def names(shard: Path) -> list[str]:
    return [f"{shard}: {n:06d}.png" for n in (3, 4, 20)]


def run(job: Job, steps: int) -> list[str]:
    """Train so many steps and give the list of bad samples."""
    job.folder.pictures.mkdir(parents=True, exist_ok=True)
    begin = job.start.step
    with training(job) as numbers:
        assert list(islice(numbers, steps)) == list(range(begin + 1, begin + steps + 1))
    path = job.folder.path / BAD_SAMPLES_FILE
    return path.read_text().splitlines() if path.exists() else []


def listed(lines: list[str]) -> list[str]:
    return sorted(line.partition(" (")[0] for line in lines)


def test_bad_images_are_listed_once_each_also_over_a_resume_s01(
    bad_shard: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = run(job_of(bad_shard, tmp_path / "run", allowed=3), 3 * STEPS_PER_EPOCH)
    assert listed(lines) == names(bad_shard)
    assert all(line.endswith(")") for line in lines)
    assert 1 <= capsys.readouterr().out.count("replaced by neighbours") <= 3
    assert run(job_of(bad_shard, tmp_path / "run", allowed=3, start=4), STEPS_PER_EPOCH) == lines
    assert "replaced" not in capsys.readouterr().out


@pytest.mark.parametrize("log_every", [1, 3])
def test_one_bad_image_more_than_allowed_stops_the_run_by_name_s01(
    bad_shard: Path, tmp_path: Path, log_every: int
) -> None:
    with pytest.raises(UserError, match=r"3 bad images, 2 are allowed \(data\.max_bad_samples\): ") as caught:
        run(job_of(bad_shard, tmp_path / "run", allowed=2, log_every=log_every), STEPS_PER_EPOCH)
    assert any(name in str(caught.value) for name in names(bad_shard))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"^1 bad image, 0 are allowed|^[23] bad images, 0 are allowed"):
        run(job_of(bad_shard, tmp_path / "other", allowed=0, log_every=log_every), STEPS_PER_EPOCH)


def test_bad_images_of_before_a_resume_count_and_are_named_s01(bad_shard: Path, tmp_path: Path) -> None:
    run(job_of(bad_shard, tmp_path / "run", allowed=3), STEPS_PER_EPOCH)
    with pytest.raises(UserError, match=r"3 bad images, 1 are allowed .*: ") as caught:
        run(job_of(bad_shard, tmp_path / "run", allowed=1, start=3), STEPS_PER_EPOCH)
    assert all(name in str(caught.value) for name in names(bad_shard))


def test_lost_data_stop_the_run_however_many_bad_images_are_allowed_d12(bad_shard: Path, tmp_path: Path) -> None:
    job = job_of(bad_shard, tmp_path / "run", allowed=100)
    spoil(bad_shard, 7, b"x")
    message = rf"^data are lost: {bad_shard}: 000007\.png \(its crc32 is .*\); then start the same command again$"
    with pytest.raises(UserError, match=message):
        run(job, STEPS_PER_EPOCH)


OnTwoRanks = Callable[[Callable[[], Any]], list[Any]]


def test_bad_images_of_any_rank_are_counted_on_all_s01_s02(
    bad_shard: Path, tmp_path: Path, on_two_ranks: OnTwoRanks
) -> None:
    """The same images, on the same steps, whichever rank met them; and all ranks stay in step."""
    alone = run(job_of(bad_shard, tmp_path / "one", allowed=3), 2 * STEPS_PER_EPOCH)
    accepted = on_two_ranks(lambda: run(job_of(bad_shard, tmp_path / "two", allowed=3), 2 * STEPS_PER_EPOCH))
    assert accepted[0] == alone
    first, second = on_two_ranks(lambda: run(job_of(bad_shard, tmp_path / "three", 2), STEPS_PER_EPOCH))
    assert first == second
    assert first.startswith("error: 3 bad images, 2 are allowed")


def test_lost_data_of_one_rank_stop_all_d13(bad_shard: Path, tmp_path: Path, on_two_ranks: OnTwoRanks) -> None:
    open_index([str(bad_shard)], tmp_path / "cache")
    spoil(bad_shard, 7, b"x")
    first, second = on_two_ranks(lambda: run(job_of(bad_shard, tmp_path / "run", 100), STEPS_PER_EPOCH))
    assert first == second
    assert first.startswith(f"error: data are lost: {bad_shard}: 000007.png (its crc32 is ")
