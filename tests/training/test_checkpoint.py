"""Checkpoints appear whole or not at all, and are verified before they are trusted."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mae.errors import UserError
from mae.training import checkpoint
from mae.training.checkpoint import DataPosition, newest, require_same_data, save, verify

POSITION = DataPosition(samples=80, fingerprint="f" * 64, global_batch=8)


def write(root: Path, step: int, keep: int = 2) -> Path:
    weights = {"w": torch.full((3,), float(step))}
    optimizer = {"state": {0: {"exp_avg": torch.ones(2) * step}}, "param_groups": [{"lr": 0.1, "name": "all"}]}
    return save(root, step, weights, {"format": "pt"}, optimizer, replace(POSITION, samples=8 * step), keep)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_all_that_was_saved_comes_back(tmp_path: Path) -> None:
    found = verify(write(tmp_path, 10))
    assert found.step == 10
    assert found.position == POSITION
    assert torch.equal(found.model()["w"], torch.full((3,), 10.0))
    assert found.optimizer()["param_groups"] == [{"lr": 0.1, "name": "all"}]
    assert torch.equal(found.optimizer()["state"][0]["exp_avg"], torch.ones(2) * 10)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_stay(keep: int, tmp_path: Path) -> None:
    for step in (5, 10, 100, 1000):
        write(tmp_path, step, keep)
    steps = [5, 10, 100, 1000][-keep:]
    assert names(tmp_path) == [f"step-{step:09d}" for step in steps]


@pytest.mark.parametrize("dies_in", ["save_file", "sync", "write_atomically"])
def test_a_save_that_is_cut_short_leaves_the_old_one_and_no_new_one(
    dies_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 10, keep=1)

    def die(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(checkpoint, dies_in, die)
        write(tmp_path, 20, keep=1)
    found = newest(tmp_path, lambda text: None)
    assert found is not None
    assert found.step == 10
    write(tmp_path, 20, keep=1)
    assert names(tmp_path) == ["step-000000020"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["bit", "cut", "missing"])
def test_any_damage_is_named_and_the_one_before_is_used(name: str, damage: str, tmp_path: Path) -> None:
    write(tmp_path, 10)
    path = write(tmp_path, 20) / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        at = data.index(b"sha256") + 12 if name == "manifest.json" else len(data) // 2
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    said: list[str] = []
    found = newest(tmp_path, said.append)
    assert found is not None
    assert found.step == 10
    assert len(said) == 1
    assert "step-000000020 is not used" in said[0]


def test_an_empty_folder_is_a_fresh_start_and_remains_are_not(tmp_path: Path) -> None:
    assert newest(tmp_path / "none", lambda text: None) is None
    (write(tmp_path, 10) / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* is intact"):
        newest(tmp_path, lambda text: None)


def test_a_newer_format_is_not_guessed_at(tmp_path: Path) -> None:
    path = write(tmp_path, 10) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    with pytest.raises(checkpoint.BadCheckpointError, match="format version is 2"):
        verify(path.parent)


def test_an_optimizer_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (exec, (f"open({str(tmp_path / 'owned')!r}, 'w')",))

    torch.save({"state": Evil()}, tmp_path / "optimizer.pt")
    found = checkpoint.Checkpoint(tmp_path, 1, POSITION)
    with pytest.raises(Exception, match=r"[Ww]eights"):
        found.optimizer()
    assert not (tmp_path / "owned").exists()


def test_another_version_of_the_order_is_refused_by_name_o13(tmp_path: Path) -> None:
    found = replace(verify(write(tmp_path, 10)), position=replace(POSITION, order_version=1))
    with pytest.raises(UserError, match="another order version: 1, now 2"):
        require_same_data(found, POSITION.fingerprint, POSITION.global_batch)


@pytest.mark.parametrize(
    ("fingerprint", "batch", "words"),
    [("e" * 64, 8, "another data"), ("f" * 64, 16, "another global batch: 8, now 16")],
)
def test_other_data_are_refused_by_name(fingerprint: str, batch: int, words: str, tmp_path: Path) -> None:
    found = verify(write(tmp_path, 10))
    require_same_data(found, POSITION.fingerprint, POSITION.global_batch)
    with pytest.raises(UserError, match=words):
        require_same_data(found, fingerprint, batch)
