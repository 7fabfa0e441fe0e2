"""Nothing in a checkpoint is trusted before it is verified."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mae.errors import CheckpointError, UserError
from mae.training.checkpoints.manifest import BadCheckpointError
from mae.training.checkpoints.reader import newest_checkpoint, require_same_data, verify_checkpoint
from training.checkpoints.samples import GROUPS, groups, names, run_position, write

FIXTURES = Path(__file__).parent / "fixtures"
POSITION = run_position(10).position


def test_what_was_saved_is_found_and_read(tmp_path: Path) -> None:
    write(tmp_path, 9)
    path = write(tmp_path, 10)
    found = newest_checkpoint(tmp_path, pytest.fail)
    assert found is not None
    assert found.path == path
    assert (found.step, found.position, found.run_position) == (10, POSITION, run_position(10))
    assert found.libraries["torch"] == torch.__version__
    for group in GROUPS:
        assert torch.equal(found.tensors(group)[f"{group}.weight"], torch.full((3,), 10.0))


def test_a_group_that_was_not_saved_is_empty(tmp_path: Path) -> None:
    found = verify_checkpoint(write(tmp_path, 10, tensors={"model": groups(10)["model"]}))
    assert found.tensors("ema") == {}
    assert found.tensors("optimizer") == {}


def test_tensors_stay_when_their_file_is_gone(tmp_path: Path) -> None:
    path = write(tmp_path, 10)
    tensors = verify_checkpoint(path).tensors("model")
    for file in path.iterdir():
        file.write_bytes(b"")
    shutil.rmtree(path)
    assert torch.equal(tensors["model.weight"], torch.full((3,), 10.0))


@pytest.mark.parametrize("name", [*(f"{group}.safetensors" for group in GROUPS), "manifest.json"])
@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "missing", "folder"])
def test_any_damage_is_named_and_the_one_before_is_used_c06_c10(name: str, damage: str, tmp_path: Path) -> None:
    write(tmp_path, 10)
    path = write(tmp_path, 20) / name
    data = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(data[:-1])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "folder":
        path.mkdir()
    elif damage == "bit":
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    said: list[str] = []
    found = newest_checkpoint(tmp_path, said.append)
    assert found is not None
    assert found.step == 10
    assert len(said) == 1
    assert said[0].startswith("checkpoint step-000000020 is not used: ")
    assert name in said[0]
    # Asked for by name, it is refused.
    with pytest.raises(BadCheckpointError, match=f"checkpoint {path.parent} cannot be used: .*{name}"):
        verify_checkpoint(path.parent)


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
@pytest.mark.parametrize("kind", ["pipe", "loop", "huge"])
def test_what_would_never_end_is_not_read_c06(name: str, kind: str, tmp_path: Path) -> None:
    path = write(tmp_path, 10) / name
    size = path.stat().st_size
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    else:
        path.touch()
        os.truncate(path, size + (1 << 40))
    with pytest.raises(BadCheckpointError, match=name):
        verify_checkpoint(path.parent)


def test_what_is_no_part_of_a_checkpoint_is_damage_c06(tmp_path: Path) -> None:
    path = write(tmp_path, 10)
    (path / "optimizer.pt").write_bytes(b"")
    with pytest.raises(BadCheckpointError, match=r"optimizer\.pt does not belong to it"):
        verify_checkpoint(path)


def test_a_checkpoint_that_was_renamed_is_of_no_step(tmp_path: Path) -> None:
    write(tmp_path, 10).rename(tmp_path / "step-000000020")
    said: list[str] = []
    with pytest.raises(CheckpointError):
        newest_checkpoint(tmp_path, said.append)
    assert said == ["checkpoint step-000000020 is not used: its manifest belongs to step 10"]


def test_the_greatest_step_is_the_newest_however_many_digits_it_has_c11(tmp_path: Path) -> None:
    for step in (999_999_999, 1_000_000_000):
        write(tmp_path, step)
    found = newest_checkpoint(tmp_path, pytest.fail)
    assert found is not None
    assert found.step == 1_000_000_000


def test_an_empty_folder_or_none_is_a_fresh_start(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path, pytest.fail) is None
    assert newest_checkpoint(tmp_path / "none", pytest.fail) is None


def test_a_save_that_was_cut_short_is_a_fresh_start_c16(tmp_path: Path) -> None:
    write(tmp_path, 10).rename(tmp_path / ".tmp-000000010-launch.1")
    assert newest_checkpoint(tmp_path, pytest.fail) is None


@pytest.mark.parametrize("remains", ["no manifest", "empty", "file", "other name", "dead link"])
def test_remains_are_no_fresh_start_c07_c17(remains: str, tmp_path: Path) -> None:
    if remains == "no manifest":
        (write(tmp_path, 10) / "manifest.json").unlink()
    elif remains == "empty":
        (tmp_path / "step-000000010").mkdir()
    elif remains == "file":
        (tmp_path / "step-000000010").write_bytes(b"")
    elif remains == "other name":
        (tmp_path / "step-last").mkdir()
    else:
        (tmp_path / "step-000000010").symlink_to(tmp_path / "nowhere")
    with pytest.raises(
        CheckpointError, match=r"no checkpoint in .* is intact \(checkpoint step-.* is not used"
    ) as error:
        newest_checkpoint(tmp_path, lambda text: None)
    assert error.value.exit_code == 4


@pytest.mark.parametrize("trouble", ["file", "dead link"])
def test_a_folder_one_cannot_look_into_is_no_fresh_start_c07(trouble: str, tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    if trouble == "file":
        root.write_bytes(b"")
    else:
        root.symlink_to(tmp_path / "a disk that is not mounted")
    with pytest.raises(CheckpointError, match="cannot be read"):
        newest_checkpoint(root, pytest.fail)


def test_a_missing_path_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpointError, match="the folder does not exist"):
        verify_checkpoint(tmp_path / "step-000000010")


def test_format_version_1_is_refused_by_its_version_c12() -> None:
    with pytest.raises(BadCheckpointError, match="its format version is 1, this program reads 2 and 3"):
        verify_checkpoint(FIXTURES / "checkpoint-v1" / "step-000000005")


@pytest.mark.parametrize("name", ["checkpoint-v2", "checkpoint-v2-sharded"])
def test_format_version_2_is_read_c12_c18(name: str) -> None:
    found = newest_checkpoint(FIXTURES / name, pytest.fail)
    assert found is not None
    assert found.run_position == replace(run_position(5, best={"knn": 0.5}), settings=None)
    assert torch.equal(found.tensors("model")["blocks.0.attn.qkv.weight"], torch.arange(15.0).view(5, 3))
    assert found.tensors("model")["cls_token"].dtype == torch.bfloat16
    assert torch.equal(found.tensors("optimizer")["exp_avg.blocks.0.attn.qkv.weight"], torch.ones(5, 3))
    assert torch.equal(found.tensors("optimizer")["step.blocks.0.attn.qkv.weight"], torch.tensor(5.0))


def test_a_newer_format_is_not_guessed_at_c12(tmp_path: Path) -> None:
    path = write(tmp_path, 10) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 4}))
    with pytest.raises(BadCheckpointError, match="format version is 4, this program reads 2 and 3"):
        verify_checkpoint(path.parent)


def test_damage_after_it_was_verified_is_an_error_too(tmp_path: Path) -> None:
    found = verify_checkpoint(write(tmp_path, 10))
    (found.path / "model.safetensors").write_bytes(b"")
    with pytest.raises(BadCheckpointError, match=r"model\.safetensors is a damaged safetensors file"):
        found.tensors("model")


def test_reading_changes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, 10)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    verify_checkpoint(path).tensors("model")["model.weight"].zero_()
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert names(tmp_path) == ["step-000000010"]


def test_another_version_of_the_order_is_refused_by_name_o13(tmp_path: Path) -> None:
    found = verify_checkpoint(write(tmp_path, 10))
    older = replace(found, run_position=replace(found.run_position, position=replace(POSITION, order_version=1)))
    with pytest.raises(UserError, match="another order version: 1, now 2"):
        require_same_data(older, POSITION.fingerprint, POSITION.global_batch)


@pytest.mark.parametrize(
    ("fingerprint", "batch", "words"),
    [("e" * 64, 8, "another data"), ("f" * 64, 16, "another global batch: 8, now 16")],
)
def test_other_data_are_refused_by_name(fingerprint: str, batch: int, words: str, tmp_path: Path) -> None:
    found = verify_checkpoint(write(tmp_path, 10))
    require_same_data(found, POSITION.fingerprint, POSITION.global_batch)
    with pytest.raises(UserError, match=words):
        require_same_data(found, fingerprint, batch)
