"""Evaluation while pretraining: what it measures, and that training does not notice it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipelines.test_pretrain import STEPS, losses, settings

from mae.errors import UserError
from mae.evaluation.rank import effective_rank
from mae.pipelines.pretrain import run

CPU = torch.device("cpu")


def flags(held_out: Path, *more: str) -> list[str]:
    return ["--evaluation.eval_shards", str(held_out / "*.tar"), "--evaluation.every", "1", *more]


def evaluations(run_dir: Path) -> list[dict[str, Any]]:
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == "evaluation"]


@pytest.mark.parametrize("directions", [1, 3])
def test_the_rank_counts_directions_of_equal_strength(directions: int) -> None:
    rows = np.eye(6, dtype=np.float32)[np.arange(12) % directions]
    assert effective_rank(rows, CPU) == pytest.approx(directions, rel=1e-4)


def test_training_is_the_same_to_the_last_bit(make_shards: Callable[..., Path], tmp_path: Path) -> None:
    shards, held_out = make_shards([13, 12]), make_shards([9, 8], name="held_out", size=(9, 9))
    known = make_shards([20], name="known", size=(10, 10))
    plain = run(settings(shards, tmp_path / "off"))
    labelled = ["--evaluation.train_shards", str(known / "*.tar"), "--evaluation.shots", "3"]
    watched = run(settings(shards, tmp_path / "on", *flags(held_out, *labelled)))
    assert plain.model.read_bytes() == watched.model.read_bytes()
    assert losses(plain.path) == losses(watched.path)
    found = evaluations(watched.path)
    assert [record["step"] for record in found] == [4, 7, 10, STEPS]
    assert evaluations(plain.path) == []
    for record in found:
        assert record["samples"] == 17
        assert 1 <= record["rank"] <= 17
        assert 0 <= record["knn"] <= 1
        assert 0 <= record["few_shot"] <= 1
        assert 0 < record["share_of_time"] < 1
    assert found[-1]["loss"] < found[0]["loss"]
    assert "Evaluation while pretraining" in watched.report.read_text()


def test_without_labels_there_are_loss_and_rank_and_a_resume_doubles_nothing(
    make_shards: Callable[..., Path], tmp_path: Path
) -> None:
    shards, held_out = make_shards([13, 12]), make_shards([9], name="held_out", size=(9, 9))
    first = run(settings(shards, tmp_path / "run", *flags(held_out)))
    expected = evaluations(first.path)
    assert "knn" not in expected[-1]
    shutil.rmtree(first.checkpoints / f"step-{STEPS:09d}")  # a resume repeats the last step
    run(settings(shards, tmp_path / "run", *flags(held_out)))
    for name in ("step", "loss", "rank"):
        assert [each[name] for each in evaluations(first.path)] == [each[name] for each in expected]


def test_held_out_images_that_are_training_images_are_refused(make_shards: Callable[..., Path], tmp_path: Path) -> None:
    shards = make_shards([13, 12])
    with pytest.raises(UserError, match="are also training samples"):
        run(settings(shards, tmp_path / "run", *flags(shards)))
