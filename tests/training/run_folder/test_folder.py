"""The folder of a run: its settings, its log, and the refusal to mix."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from mae.errors import UserError
from mae.schema import MayChange
from mae.training.run_folder.folder import RunFolder
from mae.training.settings import TrainSettings


@dataclass(frozen=True)
class Settings:
    run_dir: MayChange[Path]
    seed: int = 0
    log_every: MayChange[int] = 5


def test_equal_settings_are_accepted_and_others_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.check(Settings(folder.path))
    folder.create(Settings(folder.path))
    folder.check(Settings(folder.path))
    with pytest.raises(UserError, match="seed was 0, is 1"):
        folder.check(Settings(folder.path, seed=1))


def test_settings_that_change_no_weight_are_free(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create(Settings(folder.path))
    folder.check(Settings(Path("elsewhere"), log_every=7))


def test_a_micro_batch_that_is_to_be_found_is_that_of_the_run(tmp_path: Path) -> None:
    """Whether it was found or set. If there was none, auto would change nothing, after the memory was too small."""
    folder = RunFolder(tmp_path / "run")
    asked = TrainSettings(folder.path, micro_batch_size="auto")
    assert folder.with_its_micro_batch(asked) == asked
    folder.create(TrainSettings(folder.path, micro_batch_size=4))
    assert folder.with_its_micro_batch(asked).micro_batch_size == 4
    assert folder.with_its_micro_batch(TrainSettings(folder.path, micro_batch_size=2)).micro_batch_size == 2
    folder.create(TrainSettings(folder.path))
    with pytest.raises(UserError, match="began without micro_batch_size, which auto cannot change; give another run"):
        folder.with_its_micro_batch(asked)


def test_a_file_or_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "note").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        RunFolder(tmp_path / "note").check(Settings(tmp_path))
    with pytest.raises(UserError, match="holds no run"):
        RunFolder(tmp_path).check(Settings(tmp_path))


def test_the_log_forgets_steps_that_will_run_again_and_lines_cut_by_a_kill(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create(Settings(folder.path))
    for step in (1, 2, 3):
        folder.log({"kind": "train", "step": step})
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert [record["step"] for record in folder.metrics()] == [1, 2, 3]
    folder.forget_after(2)
    folder.log({"kind": "train", "step": 3})
    assert [record["step"] for record in folder.metrics()] == [1, 2, 3]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "run").create(Settings(tmp_path))


def test_two_runs_never_share_a_folder_and_a_dead_one_leaves_it_free_c13(tmp_path: Path) -> None:
    """The lock belongs to the process: not to its children, and to nobody once it is killed."""
    holder = os.fork()
    if holder == 0:
        theirs = RunFolder(tmp_path)
        theirs.lock()
        (tmp_path / "held").touch()
        if os.fork() == 0:
            time.sleep(3)  # a worker that outlives its trainer
            os._exit(0)
        time.sleep(30)
        os._exit(0)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with pytest.raises(UserError, match=rf"is in use by process {holder} on .*; wait for it or end it"):
        RunFolder(tmp_path).lock()
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    mine = RunFolder(tmp_path)
    mine.lock()
    mine.unlock()


def test_a_log_that_cannot_be_written_is_named_and_ends_nothing_p13(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / "metrics.jsonl").mkdir()
    folder.log({"step": 1})
    assert "warning: a line is missing from" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").rmdir()
    folder.log({"step": 2})
    assert [record["step"] for record in folder.metrics()] == [2]
