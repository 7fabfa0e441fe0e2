"""The start of a run: killed at any moment, refused for any reason, or on a damaged folder."""

import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pipelines.test_pretrain import settings as settings_of
from safetensors.torch import load_file, save_file

from mae.data.plan import plan_batches
from mae.errors import PreemptedError, UserError
from mae.pipelines.pretrain import run
from mae.tasks.pretraining import Pretraining, PretrainSettings
from mae.training.job import total_steps
from mae.training.processes.accelerator import start_accelerator
from mae.training.progress import TrainingProgress
from mae.training.run_folder.folder import RunFolder
from mae.training.run_folder.repair import set_damage_aside
from mae.training.start import start_job

CHANGES = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync")
SHORT = ("--epochs", "0.9", "--optim.warmup_epochs", "0", "--checkpoint_every", "2")  # 3 steps


class DeathError(BaseException):
    """In place of a kill."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from conftest import write_shards

    return write_shards(tmp_path_factory.mktemp("data") / "shards", [13, 12])


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(settings_of(shards, tmp_path_factory.mktemp("runs") / "run", *SHORT)).path


@pytest.fixture
def again(shards: Path, finished: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that starts the finished run, of which this test has a copy, once more."""
    shutil.copytree(finished, tmp_path / "run")

    def start(*flags: str) -> Path:
        return run(settings_of(shards, tmp_path / "run", *SHORT, *flags)).path

    return start


def how_it_ended(folder: Path) -> str:
    return str(json.loads((folder / "exit.json").read_text())["reason"])


def start(settings: PretrainSettings) -> None:
    """Start a run, and leave it before the first step."""
    accelerator, progress = start_accelerator("fp32"), TrainingProgress("pretrain", enabled=False)
    task = Pretraining.open(settings, progress.say)
    start_job(task, plan_batches(8, 1, None), accelerator, progress).folder.unlock()


def survives(change: int, work: Callable[[], None]) -> bool:
    """Return whether `work` wants fewer changes of the disk; no later one succeeds."""
    numbers = itertools.count()

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*given: Any, **named: Any) -> Any:
            if next(numbers) >= change:
                raise DeathError
            return call(*given, **named)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            patch.setattr(os, name, counted(getattr(os, name)))
        try:
            work()
        except DeathError:
            return False
    return True


def test_killed_before_any_change_of_the_disk_it_starts_again(shards: Path, finished: Path, tmp_path: Path) -> None:
    for change in itertools.count():
        asked = settings_of(shards, tmp_path / f"{change}")
        if survives(change, lambda asked=asked: start(asked)):
            break
        start(asked)
    assert change > 8


@pytest.mark.parametrize("left", ["pictures", "checkpoints", ".lock", "exit.json"])
def test_what_a_start_makes_first_is_no_run_of_another(left: str, tmp_path: Path) -> None:
    path = tmp_path / left
    path.write_text("{}") if "." in left else path.mkdir()
    RunFolder(tmp_path).check(PretrainSettings(tmp_path))
    if path.is_dir():
        (path / "mine").touch()
        with pytest.raises(UserError, match="is not empty and holds no run"):
            RunFolder(tmp_path).check(PretrainSettings(tmp_path))


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_published_model_that_is_damaged_is_written_again_from_the_last_checkpoint(
    again: Callable[..., Path], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "run" / "model.safetensors"
    for damage, word in ((flip_last_byte, "has changed since it was written"), (Path.unlink, "is missing"), (None, "")):
        if damage is not None:
            damage(model)
        again()
        assert (f"{word}; it is written again from step-000000003" in capsys.readouterr().out) == bool(word)
        assert model.read_bytes() == (finished / "model.safetensors").read_bytes()


def test_a_published_model_with_another_header_but_equal_tensors_is_no_damage(
    again: Callable[..., Path], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As earlier versions wrote it."""
    model = tmp_path / "run" / "model.safetensors"
    save_file(load_file(model), model, {"format": "pt", "earlier": "version"})
    again()
    assert "warning" not in capsys.readouterr().out
    assert model.read_bytes() == (finished / "model.safetensors").read_bytes()


def test_equal_runs_publish_equal_files(shards: Path, finished: Path, tmp_path: Path) -> None:
    folder = run(settings_of(shards, tmp_path / "run", *SHORT)).path
    files = [path.relative_to(finished) for path in finished.rglob("*.safetensors")]
    files += [path.relative_to(finished) for path in finished.rglob("manifest.json")]
    assert len(files) == 7
    for file in files:
        assert (folder / file).read_bytes() == (finished / file).read_bytes()


LINES = [
    "what is no JSON",
    '{"kind": "train"}',
    '{"step": -1}',
    "[" * 100_000,
    '{"step": 1, "kind": []}',
    "5",
    "\0" * 9,
]


def test_lines_of_the_log_that_are_no_records_are_kept_elsewhere(
    again: Callable[..., Path], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, before = tmp_path / "run" / "metrics.jsonl", (finished / "metrics.jsonl").read_text()
    first, rest = before.split("\n", 1)
    log.write_text("\n".join([first, *LINES, rest]))
    again()
    assert log.read_text() == before
    assert (tmp_path / "run" / "metrics.jsonl.damaged").read_text() == "\n".join([*LINES, ""])
    assert "7 lines are no records of this run; they are kept in metrics.jsonl.damaged" in capsys.readouterr().out


FILES = ["rollback.json", "exit.json", "metrics.jsonl", "bad-samples.txt", "skipped-steps.jsonl", "report.html"]
FILES += ["samples-rank0.jsonl"]


def test_what_is_no_file_is_set_aside(
    again: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = itertools.cycle((os.mkfifo, Path.mkdir, lambda path: path.symlink_to(path)))
    for name, make in zip(FILES, kinds, strict=False):
        (tmp_path / "run" / name).unlink(missing_ok=True)
        make(tmp_path / "run" / name)
    again()
    shown = capsys.readouterr().out
    for name in FILES:
        assert os.path.lexists(tmp_path / "run" / f"{name}.damaged")
        assert f"it is kept as {name}.damaged, and " in shown
    assert how_it_ended(tmp_path / "run") == "finished"
    assert "The log of the training is lost" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    "text",
    ["", '{"step": 3', "[]", '{"step": 1}', '{"step": 1, "samples": "8"}', '{"step": true, "samples": 8}', "[" * 9999],
    ids=range(7),
)
def test_a_damaged_note_of_a_return_to_a_checkpoint_is_set_aside(text: str, tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "rollback.json").write_text(text)
    set_damage_aside(RunFolder(tmp_path), said.append)
    assert (tmp_path / "rollback.json.damaged").read_text() == text
    assert "may return once more" in said[0]
    assert RunFolder(tmp_path).rollback() is None


@pytest.mark.parametrize("name", ["model.safetensors", "pictures", "checkpoints"])
def test_a_folder_for_a_file_and_a_file_for_a_folder_are_one_line(
    name: str, again: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "run" / name
    path.rename(tmp_path / "elsewhere")
    path.mkdir() if "." in name else path.touch()
    with pytest.raises(UserError, match=rf"{name} is to be a .*, but is a .*; rename it"):
        again()
    assert how_it_ended(tmp_path / "run") == "error"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must hold a mapping"),
        ("[" * 2_000, "too many lists in lists"),
        ("a: &a [x, x]\n" + "".join(f"b{n}: &b{n} [*a, *a]\n" for n in range(9)), "more than 16 repetitions"),
        ("data: {mean: 5, std: [1]}", "data.mean is 5; allowed: what the run has saved"),
        ("data: {mean: ['x'], std: [1]}", "data.mean is"),
    ],
)
def test_damaged_settings_are_one_line_and_recorded(
    text: str, words: str, again: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "run" / "settings.yaml").write_text(text)
    (tmp_path / "run" / "exit.json").write_text('{"reason": "preempted"}')
    with pytest.raises(UserError, match=words):
        again()
    assert how_it_ended(tmp_path / "run") == "error"


def damage_checkpoints(folder: Path) -> None:
    for path in folder.glob("checkpoints/step-*/model.safetensors"):
        flip_last_byte(path)


@pytest.mark.parametrize(
    ("flags", "prepare"),
    [
        (["--data.shards", "nowhere.tar"], None),
        (["--seed", "5"], None),
        (["--precision", "bf16"], None),
        ([], damage_checkpoints),
    ],
    ids=["data-gone", "other-settings", "no-gpu", "no-checkpoint"],
)
def test_a_start_that_fails_is_no_preemption(
    flags: list[str], prepare: Callable[[Path], None] | None, again: Callable[..., Path], tmp_path: Path
) -> None:
    """A script that starts a preempted run again would do so for ever."""
    folder = tmp_path / "run"
    (folder / "exit.json").write_text('{"reason": "preempted"}')
    if prepare:
        prepare(folder)
    with pytest.raises(UserError) as caught:
        again(*flags)
    record = json.loads((folder / "exit.json").read_text())
    assert (record["reason"], record["message"]) == ("error", f"error: {caught.value}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
@pytest.mark.parametrize("moment", ["open", "build_model"], ids=["index", "model"])
def test_a_signal_before_training_is_a_preemption(
    moment: str, number: signal.Signals, again: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run" / "exit.json").write_text('{"reason": "error"}')
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, under which it ends nothing, may have started the tests
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)]

    def told(*given: object) -> None:
        try:
            signal.raise_signal(number)
        except Exception:  # as code that goes on after its own errors
            pytest.fail("the signal was taken for an error")

    with (
        monkeypatch.context() as patch,
        pytest.raises(PreemptedError, match=f"^{number.name}: stopped before training"),
    ):
        patch.setattr(Pretraining, moment, told)
        again()
    assert how_it_ended(tmp_path / "run") == "preempted"
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)] == handlers


def test_a_start_in_the_folder_of_another_run_leaves_its_record(again: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="other settings: seed was 0, is 5"):
        again("--seed", "5")
    assert how_it_ended(tmp_path / "run") == "finished"
    with pytest.raises(UserError, match="nowhere"):
        again("--data.shards", "nowhere.tar")
    assert how_it_ended(tmp_path / "run") == "error"


def test_a_start_in_a_folder_in_use_leaves_no_record(
    again: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run" / "exit.json").unlink()  # as the run does that uses it

    def in_use(path: Path) -> Any:
        raise UserError("is in use")

    monkeypatch.setattr("mae.training.run_folder.folder.lock_folder", in_use)
    for flags in ([], ["--data.shards", "nowhere.tar"]):
        with pytest.raises(UserError):
            again(*flags)
    assert not (tmp_path / "run" / "exit.json").exists()


def test_a_start_that_fails_makes_no_folder_and_writes_into_none_of_another(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").touch()
    for folder in (tmp_path / "new", tmp_path / "mine"):
        with pytest.raises(UserError):
            run(settings_of(shards, folder, "--data.shards", "nowhere.tar"))
    assert not (tmp_path / "new").exists()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis"]


def test_other_settings_go_on_in_another_folder_as_the_refusal_says(
    again: Callable[..., Path], shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"epochs was 0\.9, is 1\.5; .* --resume (\S+) --run_dir NEW") as caught:
        again("--epochs", "1.5")
    checkpoint = str(caught.value).partition("--resume ")[2].split()[0]
    longer = run(settings_of(shards, tmp_path / "new", *SHORT, "--epochs", "1.5", "--resume", checkpoint))
    assert [record["step"] for record in longer.metrics() if record["kind"] == "train"] == [4, 5]
    with pytest.raises(UserError, match=r"step-000000003 has done 3 steps, but the run would end after 1; raise epoch"):
        run(settings_of(shards, tmp_path / "short", *SHORT, "--epochs", "0.3", "--resume", checkpoint))


def test_a_finished_run_without_checkpoints_does_not_begin_anew(again: Callable[..., Path], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.rmtree(run_dir / "checkpoints")
    before = {name: (run_dir / name).read_bytes() for name in ("metrics.jsonl", "model.safetensors")}
    with pytest.raises(UserError, match=r"a finished model but no checkpoint to go on from; give another run_dir"):
        again()
    assert {name: (run_dir / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("given", ["", "checkpoints"])
def test_a_run_is_no_checkpoint_to_resume(given: str, shards: Path, finished: Path, tmp_path: Path) -> None:
    asked = settings_of(shards, tmp_path / "on", *SHORT, "--resume", str(finished / given))
    with pytest.raises(UserError, match=r"holds checkpoints and is none; give one of them, such as .*/step-000000003$"):
        run(asked)


def test_the_last_checkpoint_of_another_run_leaves_nothing_to_do(shards: Path, finished: Path, tmp_path: Path) -> None:
    last = finished / "checkpoints" / "step-000000003"
    with pytest.raises(UserError, match=r"step-000000003 has done all 3 steps of this run; raise epochs"):
        run(settings_of(shards, tmp_path / "on", *SHORT, "--resume", str(last)))


@pytest.mark.parametrize(("samples", "epochs", "steps"), [(50_000, 1.1, 110), (50_000, 2.2, 220), (25, 0.9, 3)])
def test_steps_are_those_of_the_epochs_as_written(samples: int, epochs: float, steps: int) -> None:
    assert total_steps(samples, epochs, 500 if samples > 25 else 8) == steps


def test_a_disk_too_small_for_the_state_of_the_optimiser_is_told_at_the_start(
    shards: Path,
    finished: Path,
    again: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    newest = max((finished / "checkpoints").glob("step-*"))
    size = sum(path.stat().st_size for path in newest.glob("*.safetensors"))
    usual = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usual(path)._replace(free=size * 6 // 5))
    run(settings_of(shards, tmp_path / "new", *SHORT, "--keep_checkpoints", "1"))  # the oldest goes after the newest
    assert "the checkpoints to come take" in capsys.readouterr().out
    again()
    assert "the checkpoints to come take" not in capsys.readouterr().out
