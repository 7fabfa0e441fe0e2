"""What trackers are given, in which order, and how often: with a tracker that can die at any moment."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from mae.errors import UserError
from mae.training.run_folder.folder import RunFolder
from mae.training.run_folder.repair import set_damage_aside
from mae.training.settings import TrainSettings
from mae.training.trackers.adapters import ADAPTERS, Adapter
from mae.training.trackers.events import PICTURES, Event, events_of
from mae.training.trackers.handing_on import Trackers, _Sink
from mae.training.trackers.position import TRACKERS_FILE, read_positions
from mae.training.trackers.settings import require_installed


class KilledError(BaseException):
    """The end of the process, which nothing catches."""


class Recorder(Adapter):
    """A store that outlives the process; it dies at the call with number `dies_at`."""

    name = "tensorboard"
    store: ClassVar[list[tuple[str, int, float | None]]] = []
    settings: ClassVar[list[Mapping[str, Any]]] = []
    calls, dies_at, fails = 0, -1, False

    def __init__(self, folder: Path, project: str, run: str) -> None:
        self.run = run or "new"
        self.call()

    def call(self) -> None:
        if type(self).calls == type(self).dies_at:
            raise KilledError
        if type(self).fails:
            raise OSError("the network is down")
        type(self).calls += 1

    def store_settings(self, settings: Mapping[str, Any]) -> None:
        self.settings.append(settings)

    def give(self, event: Event) -> None:
        for name, value in event.numbers.items():
            self.call()
            self.store.append((name, event.step, value))
        if event.picture is not None:
            self.call()
            self.store.append((PICTURES, event.step, None))

    def flush(self) -> None:
        self.call()

    def held(self) -> set[tuple[str, int]]:
        return {(name, step) for name, step, _ in self.store}

    def finish(self) -> None:
        pass


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    own = type("Own", (Recorder,), {"store": [], "settings": []})
    monkeypatch.setitem(ADAPTERS, "tensorboard", own)
    return own


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.pictures.mkdir(parents=True)
    return folder


def log(folder: RunFolder, *steps: int) -> None:
    """Log these steps, each with a loss of its own, and a picture and an evaluation at every fourth."""
    for step in steps:
        folder.log({"kind": "train", "step": step, "loss": 1 / step, "epoch": step / 10, "skipped": True})
        if step % 4 == 0:
            folder.log({"kind": "evaluation", "step": step, "knn": 0.5, "rank": None})
            (folder.pictures / f"step-{step:09d}.png").touch()


def sink(folder: RunFolder, said: list[str] | None = None) -> _Sink:
    opened = _Sink(folder, TrainSettings(folder.path, trackers=("tensorboard",)), ([] if said is None else said).append)
    opened.open()
    return opened


def expected(*steps: int) -> list[tuple[str, int, float | None]]:
    found: list[tuple[str, int, float | None]] = []
    for step in steps:
        found += [("train/loss", step, 1 / step), ("train/epoch", step, step / 10)]
        found += [("evaluation/knn", step, 0.5), (PICTURES, step, None)] if step % 4 == 0 else []
    return found


def test_events_are_the_figures_of_each_record_and_the_pictures(folder: RunFolder) -> None:
    folder.log({"kind": "train", "step": 1, "loss": None, "lr": 1, "layer_lr": {"head": 0.5}, "epoch": float("inf")})
    folder.log({"kind": "output", "step": 2, "message": "lost"})
    folder.log({"kind": "eval", "step": 3, "accuracy": 0.5})
    folder.log({"kind": "eval", "step": 3, "accuracy": 0.5})
    for name in ("step-000000002.png", "other.png", "step-000000009.png"):
        (folder.pictures / name).touch()
    assert events_of(folder, 3) == [
        Event(1, "train", {"train/lr": 1.0, "train/layer_lr/head": 0.5}),
        Event(2, PICTURES, {}, folder.pictures / "step-000000002.png"),
        Event(3, "eval", {"eval/accuracy": 0.5}),
    ]


def test_a_step_is_handed_on_once_a_checkpoint_covers_it(folder: RunFolder, recorder: type[Recorder]) -> None:
    log(folder, 1, 2, 3, 4, 5)
    one = sink(folder)
    one.hand_on(0)
    assert recorder.store == []
    one.hand_on(3)
    assert recorder.store == expected(1, 2, 3)
    one.hand_on(4)
    one.hand_on(4)
    assert recorder.store == expected(1, 2, 3, 4)
    position = read_positions(folder.path)["tensorboard"]
    assert (position.run, position.step, position.in_doubt) == ("new", 4, False)
    assert set(position.kinds) == {"train", "evaluation", PICTURES}


def test_what_is_rolled_back_or_lost_by_a_kill_is_never_shown(folder: RunFolder, recorder: type[Recorder]) -> None:
    log(folder, *range(1, 8))
    sink(folder).hand_on(6)
    folder.forget_after(6)  # as a resume or a return to that checkpoint does
    log(folder, 7, 8)
    again = sink(folder)
    again.hand_on(6)
    again.hand_on(8)
    assert recorder.store == expected(*range(1, 9))
    assert [each["epochs"] for each in recorder.settings] == [100.0]


def test_steps_that_are_done_again_since_their_checkpoint_is_damaged_show_once(
    folder: RunFolder, recorder: type[Recorder]
) -> None:
    log(folder, 1, 2, 3, 4)
    sink(folder).hand_on(4)
    folder.forget_after(2)
    log(folder, 3, 4, 5)
    sink(folder).hand_on(5)
    assert recorder.store == expected(1, 2, 3, 4, 5)


def test_an_evaluation_that_follows_its_checkpoint_is_handed_on_by_the_next(
    folder: RunFolder, recorder: type[Recorder]
) -> None:
    """A run that was told to stop saves first, and evaluates that step when it is resumed."""
    log(folder, 1, 2, 3)
    sink(folder).hand_on(3)
    folder.log({"kind": "eval", "step": 3, "accuracy": 0.25})
    log(folder, 5)
    sink(folder).hand_on(5)
    assert recorder.store == [*expected(1, 2, 3), ("eval/accuracy", 3, 0.25), *expected(5)]


def test_killed_at_any_moment_nothing_is_lost_or_doubled(folder: RunFolder, recorder: type[Recorder]) -> None:
    log(folder, 1, 2, 3, 4, 5)
    moments = 20
    for moment in range(moments):
        recorder.store.clear()
        (folder.path / TRACKERS_FILE).unlink(missing_ok=True)
        recorder.calls, recorder.dies_at = 0, moment
        try:
            one = sink(folder)
            one.hand_on(2)
            one.hand_on(5)
        except KilledError:
            recorder.dies_at = -1
            sink(folder).hand_on(5)
        assert recorder.store == expected(1, 2, 3, 4, 5), moment
    assert recorder.calls < moments, "no moment was after the end"


def test_a_tracker_that_fails_is_named_once_and_gets_everything_later(
    folder: RunFolder, recorder: type[Recorder]
) -> None:
    log(folder, 1, 2, 3)
    said: list[str] = []
    recorder.fails = True
    one = sink(folder, said)
    one.hand_on(1)
    one.hand_on(2)
    assert len(said) == 1
    assert said[0].startswith("warning: the tracker tensorboard fails (the network is down); the run goes on")
    recorder.fails = False
    one.hand_on(3)
    assert recorder.store == expected(1, 2, 3)


def test_the_thread_hands_everything_on_before_it_ends(folder: RunFolder, recorder: type[Recorder]) -> None:
    log(folder, *range(1, 30))
    settings = TrainSettings(folder.path, trackers=("tensorboard",))
    trackers = Trackers(folder, settings, [].append)
    for step in range(0, 30, 5):
        trackers.cover(step)
    trackers.cover(29)
    trackers.finish(60.0)
    assert recorder.store == expected(*range(1, 30))


@pytest.mark.parametrize("text", ["{", "[]", '{"wandb": {"run": 1}}'])
def test_damaged_positions_are_set_aside_before_a_start(text: str, folder: RunFolder) -> None:
    path = folder.path / TRACKERS_FILE
    path.write_text(text)
    with pytest.raises(UserError, match=r"trackers\.json cannot be used"):
        read_positions(folder.path)
    said: list[str] = []
    set_damage_aside(folder, said.append)
    assert not path.exists()
    assert "each tracker begins a new run, which gets everything" in said[0]
    assert (folder.path / f"{TRACKERS_FILE}.damaged").read_text() == text


def test_positions_name_project_and_run(folder: RunFolder, recorder: type[Recorder]) -> None:
    sink(folder)
    found = json.loads((folder.path / TRACKERS_FILE).read_text())
    assert found["tensorboard"] | {"project": "mae", "run": "new", "has_settings": True} == found["tensorboard"]


def test_a_missing_package_is_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    require_installed(())
    monkeypatch.setattr("mae.training.trackers.settings.find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        require_installed(("wandb", "trackio", "wandb"))
    assert str(caught.value) == (
        "not installed, but among trackers: wandb, trackio; pip install 'mae-pretraining[wandb,trackio]', or leave "
        "them out (metrics.jsonl is always written)"
    )
