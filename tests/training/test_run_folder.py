"""The folder of a run: its settings, its log, and the refusal to mix."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from mae.errors import UserError
from mae.training.run_folder import RunFolder


@dataclass(frozen=True)
class Settings:
    run_dir: Path
    seed: int = 0
    log_every: int = 5


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
