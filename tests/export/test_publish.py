"""An export appears whole under its name, or not at all."""

import os
from contextlib import suppress
from pathlib import Path

import pytest

from mae.errors import UserError, user_error_of
from mae.export.publish import VERIFICATION_FILE, new_folder


def test_a_folder_appears_under_its_name_when_it_is_whole(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a" / "out") as part:
        (part / "file").write_text("x")
        assert not (tmp_path / "a" / "out").exists()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["out"]
    assert (tmp_path / "a" / "out" / "file").read_text() == "x"


@pytest.mark.parametrize("error", [UserError, KeyboardInterrupt])
def test_after_an_error_nothing_is_left(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), new_folder(tmp_path / "out") as part:
        (part / "file").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_and_the_rest_of_a_killed_export_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part" / "old").write_text("x")
    with new_folder(tmp_path / "out") as part:
        (part / "new").write_text("y")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new"]


def test_a_file_or_a_used_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for used in (tmp_path, tmp_path / "file"):
        with (
            pytest.raises(UserError, match="is not an empty folder; give a new one with --out"),
            new_folder(used),
        ):
            pytest.fail("it was to be refused")
    assert (tmp_path / "file").read_text() == "x"


def test_an_export_that_is_there_is_compared(tmp_path: Path) -> None:
    for text in ("x", "x"):
        with new_folder(tmp_path / "out") as part:
            (part / "file").write_text(text)
            (part / VERIFICATION_FILE).write_text("{}")
    for damage in (lambda file: file.write_text("y"), lambda file: (file.unlink(), os.mkfifo(file))):
        damage(tmp_path / "out" / "file")
        with (
            pytest.raises(UserError, match=r"out holds another export, or a damaged one: file differs; remove"),
            new_folder(tmp_path / "out") as part,
        ):
            (part / "file").write_text("x")
            (part / VERIFICATION_FILE).write_text("{}")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_of_two_exports_at_once_is_refused_and_the_other_is_whole(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as part:
        (part / "file").write_text("x")
        with (
            pytest.raises(UserError, match=r"out is being written by another export; wait for it"),
            new_folder(tmp_path / "out"),
        ):
            pytest.fail("it was to be refused")
        (part / "other").write_text("x")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["file", "other"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_after_an_error_the_new_folders_above_are_gone_unless_they_are_used(tmp_path: Path) -> None:
    for used in (False, True):
        with suppress(UserError), new_folder(tmp_path / "a" / "b" / "out"):
            if used:
                (tmp_path / "a" / "other").mkdir()
            raise UserError
        assert [path.name for path in tmp_path.rglob("*")] == (["a", "other"] if used else [])


def test_a_place_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / ".out.part").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    for out, words in (
        (tmp_path / "out", "out.part cannot be made: File exists; remove it"),
        (Path("/proc/x"), "made: "),
    ):
        with pytest.raises(UserError, match=words), new_folder(out):
            pytest.fail("it was to be refused")
    with pytest.raises(OSError, match="Too many levels") as error, new_folder(tmp_path / "loop" / "out"):
        pytest.fail("it was to be refused")
    assert user_error_of(error.value) is not None


def test_an_export_into_a_checkpoint_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "step-000000001"
    checkpoint.mkdir(parents=True)
    for name in ("manifest.json", "model.safetensors"):
        (checkpoint / name).touch()
    (tmp_path / "link").symlink_to(checkpoint)
    for out in (checkpoint / "out", tmp_path / "link" / "a" / "out"):
        with pytest.raises(UserError, match=r"is in the checkpoint .*/step-000000001, which"), new_folder(out):
            pytest.fail("it was to be refused")
    assert len(list(checkpoint.iterdir())) == 2
