"""Whole runs with trackers: what a tracker's own reader finds is what metrics.jsonl holds, each step once."""

import math
import os
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mae.errors import UserError
from mae.pipelines import pretrain
from mae.settings import parse
from mae.tasks.pretraining import Pretraining
from mae.training.run_folder.folder import RunFolder
from mae.training.task import LossOf
from mae.training.trackers.events import PICTURES, events_of
from pipelines.conftest import cut_at
from pipelines.test_kills import PRETRAIN, finish, kill_after, start

TRACKERS = ("tensorboard", *(("trackio",) if find_spec("trackio") else ()))
if "trackio" in TRACKERS:
    # trackio looks for its folder once, when it is imported.
    os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-")
    os.environ["TRACKIO_AUTO_LOG_CPU"] = "0"


def train(shards: Path, run_dir: Path, *words: str, trackers: tuple[str, ...] = TRACKERS) -> RunFolder:
    places = ["--data.shards", str(shards / "*.tar"), "--run_dir", str(run_dir), "--data.workers", "0"]
    words = (
        *PRETRAIN,
        "--epochs",
        "18",
        *places,
        "--trackers",
        *trackers,
        "--tracker_project",
        run_dir.parent.name,
        *words,
    )
    return pretrain.run(parse(pretrain.PretrainSettings, words, "mae pretrain"))


def logged(folder: RunFolder) -> dict[tuple[str, int], float]:
    """Each figure of the log, as float32, in which TensorBoard holds it; a picture is 0."""
    events = events_of(folder, sys.maxsize)
    numbers = {(name, event.step): value for event in events for name, value in event.numbers.items()}
    return numbers | {(PICTURES, event.step): 0.0 for event in events if event.picture}


def of_tensorboard(folder: RunFolder) -> list[tuple[str, int, float]]:
    reader = EventAccumulator(str(folder.path / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    reader.Reload()
    tags = reader.Tags()
    found = [(tag, event.step, event.value) for tag in tags["scalars"] for event in reader.Scalars(tag)]
    pictures = [(tag, event) for tag in tags["images"] for event in reader.Images(tag)]
    assert all(event.encoded_image_string.startswith(b"\x89PNG") for _, event in pictures)
    return found + [(tag, event.step, 0.0) for tag, event in pictures]


def of_trackio(folder: RunFolder) -> list[tuple[str, int, float]]:
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    project = folder.path.parent.name
    (run,) = trackio.Api().runs(project)
    assert run.name.startswith(f"{folder.path.name}-")
    assert run.config is not None
    assert run.config["epochs"] == 18
    found = []
    for log in SQLiteStorage.get_logs(project, run.name):
        for name, value in log.items():
            if name == PICTURES:
                assert (SQLiteStorage.get_project_db_path(project).parent / "media" / value["file_path"]).is_file()
                found.append((name, log["step"], 0.0))
            elif name not in ("step", "timestamp"):
                found.append((name, log["step"], value))
    return found


def assert_complete(folder: RunFolder) -> None:
    """Every tracker holds all that was logged, once."""
    expected = logged(folder)
    assert {name for name, _ in expected} >= {"train/loss", "train/lr", "train/images_per_second", PICTURES}
    for tracker, found in {"tensorboard": of_tensorboard, "trackio": of_trackio}.items():
        if tracker in TRACKERS:
            values = found(folder)
            assert Counter((name, step) for name, step, _ in values) == Counter(expected.keys())
            assert all(math.isclose(value, expected[name, step], rel_tol=1e-6) for name, step, value in values)


def test_a_run_that_was_cut_is_handed_on_once_to_the_same_run(
    make_shards: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Cut before the checkpoint of step 49; the steps after 42 were logged, and are done again."""
    shards = make_shards([13, 12])
    with monkeypatch.context() as dying, pytest.raises(KeyboardInterrupt):
        cut_at(49, dying)
        train(shards, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    assert max(step for _, step in logged(folder)) == 49
    assert max(step for _, step, _ in of_tensorboard(folder)) == 42
    train(shards, folder.path)
    assert_complete(folder)
    (hparams,) = folder.path.glob("tensorboard/*/hparams.yml")
    assert "optim.base_lr: " in hparams.read_text()
    assert "warning" not in capsys.readouterr().out


def test_steps_before_a_return_to_a_checkpoint_are_never_shown(
    make_shards: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [0]
    loss_of = Pretraining.loss_of

    def spoilt(self: Pretraining, images: int) -> LossOf:
        inner = loss_of(self, images)

        def loss(model: Any, batch: Any) -> Any:
            calls[0] += 1
            return inner(model, batch) * (math.nan if 24 <= calls[0] <= 26 else 1.0)

        return loss

    monkeypatch.setattr(Pretraining, "loss_of", spoilt)
    folder = train(make_shards([13, 12]), tmp_path / "run", "--skip_at_most", "3")
    assert folder.rollback() is not None
    assert ("train/loss", 22) in logged(folder)
    assert_complete(folder)


@pytest.mark.slow
def test_kills_at_any_moment_lose_and_double_nothing(make_shards: Callable[..., Path], tmp_path: Path) -> None:
    shards, run_dir, moments = make_shards([13, 12]), tmp_path / "run", random.Random(14)
    for step in (8, 15, 30, 43, 50):
        kill_after(start(1, lambda: train(shards, run_dir)), run_dir, step, moments.random() / 10)
    finish(start(1, lambda: train(shards, run_dir)))
    assert_complete(RunFolder(run_dir))


def test_a_tracker_that_is_not_installed_is_refused_before_the_run_begins(
    make_shards: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mae.training.trackers.settings.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed, but among trackers: tensorboard; pip install '"):
        train(make_shards([13]), tmp_path / "run", trackers=("tensorboard",))
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_cannot_be_opened_ends_no_run(
    make_shards: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, shards = tmp_path / "run", make_shards([13, 12])
    train(shards, run_dir, "--epochs", "3", trackers=())
    (run_dir / "tensorboard").write_text("a file in its place")
    folder = train(shards, run_dir, "--epochs", "3", trackers=("tensorboard",))
    said = capsys.readouterr().out
    assert len(re.findall(r"warning: the tracker tensorboard fails \(.*\); the run goes on", said)) == 1
    (run_dir / "tensorboard").unlink()
    train(shards, run_dir, "--epochs", "3", trackers=("tensorboard",))
    assert {step for _, step, _ in of_tensorboard(folder)} == {step for _, step in logged(folder)}
