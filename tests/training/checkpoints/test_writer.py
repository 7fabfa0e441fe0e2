"""A checkpoint appears whole or not at all, beside the training; no trouble of the disk costs a run or an old one."""

import errno
import itertools
import os
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from mae.errors import UserError
from mae.training.checkpoints import writer as checkpoint_writer
from mae.training.checkpoints.manifest import step_folder
from mae.training.checkpoints.reader import Checkpoint, newest_checkpoint, verify_checkpoint
from mae.training.checkpoints.retention import superseded
from mae.training.checkpoints.tensor_files import HostCopy
from mae.training.checkpoints.writer import CheckpointWriter, bytes_needed
from training.checkpoints.samples import GROUPS, groups, names, run_position, write

LARGE = 60_000
"""Numbers in a tensor; a checkpoint of three takes 720 kB."""


def steps(root: Path) -> list[int]:
    return [int(name.removeprefix("step-")) for name in names(root) if not name.startswith(".")]


def found_in(root: Path) -> Checkpoint:
    found = newest_checkpoint(root, lambda text: None)
    assert found is not None
    return found


def require_consistent(found: Checkpoint) -> None:
    """Weights, optimiser state and average are of the step that the checkpoint is of."""
    for group in GROUPS:
        tensors = found.tensors(group)
        assert tensors.keys() == {f"{group}.weight"}
        assert bool((tensors[f"{group}.weight"] == found.step).all()), (found.step, group)
    assert found.position == run_position(found.step).position


# What comes back


@pytest.mark.parametrize("background", [False, True])
def test_all_fields_come_back_c15(background: bool, tmp_path: Path) -> None:
    tensors = {
        "model": {"w": torch.randn(3, 2), "b": torch.randn(2).bfloat16(), "scale": torch.tensor(0.5)},
        "optimizer": {"exp_avg.w": torch.randn(3, 2), "step.w": torch.tensor(7.0), "count.w": torch.tensor(1 << 60)},
        "ema": {"w": torch.randn(3, 2), "mask": torch.tensor([True, False]), "none": torch.empty(0, 3)},
    }
    where = run_position(7, best={"knn": 0.123456789012345678}, pending=True, losses=[1e-45, 3.0], text="schön")
    writer = CheckpointWriter(tmp_path, 1, background=background)
    writer.save(tensors, {"format": "pt", "mae": "{}"}, where)
    writer.close()
    found = found_in(tmp_path)
    assert found.run_position == where
    for group, members in tensors.items():
        back = found.tensors(group)
        assert back.keys() == members.keys()
        for name, tensor in members.items():
            assert back[name].dtype == tensor.dtype
            assert torch.equal(back[name], tensor)
    with safe_open(found.path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "mae": "{}"}


def test_foreground_and_background_write_the_same_files(tmp_path: Path) -> None:
    for background in (False, True):
        writer = CheckpointWriter(tmp_path / f"{background}", 1, background=background)
        writer.save(groups(7), {"b": "1", "a": "2"}, run_position(7, best=0.5))
        writer.close()
    first, second = (tmp_path / f"{background}" / "step-000000007" for background in (False, True))
    assert names(first) == names(second) == ["ema.safetensors", "manifest.json", *names(first)[2:]]
    for name in names(first):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_the_bytes_needed_are_those_of_the_tensors(tmp_path: Path) -> None:
    tensors = groups(1, LARGE)
    assert bytes_needed(tensors) == 3 * 4 * LARGE
    on_disk = sum(file.stat().st_size for file in write(tmp_path, 1, tensors=tensors).iterdir())
    assert bytes_needed(tensors) < on_disk < bytes_needed(tensors) + 2000


def test_ranks_that_do_not_write_write_nothing(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "none", 1, rank=1)
    writer.save(groups(1), {}, run_position(1))
    writer.close()
    assert not (tmp_path / "none").exists()


def test_a_folder_that_cannot_be_made_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"file/checkpoints for checkpoints cannot be made: Not a directory"):
        CheckpointWriter(tmp_path / "file" / "checkpoints", 1)


# Beside the training


@contextmanager
def writing_held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No file is written before the event is set."""
    go, write_file = threading.Event(), HostCopy.write

    def hold(copy: HostCopy, path: Path) -> Any:
        assert go.wait(20)
        return write_file(copy, path)

    monkeypatch.setattr(HostCopy, "write", hold)
    try:
        yield go
    finally:
        go.set()


def test_training_goes_on_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, notes = groups(7), {"losses": [1.0]}
    writer = CheckpointWriter(tmp_path, 1)
    with writing_held(monkeypatch) as go:
        writer.save(tensors, {}, replace(run_position(7), notes=notes))
        for group in tensors.values():
            for tensor in group.values():
                tensor.fill_(8.0)
        notes["losses"].append(2.0)
        assert newest_checkpoint(tmp_path, pytest.fail) is None
        go.set()
        writer.wait()
    require_consistent(found_in(tmp_path))
    assert found_in(tmp_path).run_position.notes == {"losses": [1.0]}


def test_one_save_is_in_progress_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CheckpointWriter(tmp_path, 9)
    with writing_held(monkeypatch) as go:
        writer.save(groups(1), {}, run_position(1))
        second = threading.Thread(target=lambda: writer.save(groups(2), {}, run_position(2)))
        second.start()
        second.join(0.1)
        assert second.is_alive()
        go.set()
        second.join()
    writer.close()
    assert steps(tmp_path) == [1, 2]
    for step in (1, 2):
        require_consistent(verify_checkpoint(step_folder(tmp_path, step)))


def test_a_mistake_of_the_program_is_not_taken_for_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(HostCopy, "first_not_finite", fail)
    writer = CheckpointWriter(tmp_path, 1)
    writer.save(groups(1), {}, run_position(1))
    with pytest.raises(ZeroDivisionError):
        writer.wait()


# What stays


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_stay(keep: int, tmp_path: Path) -> None:
    for step in (5, 10, 100, 1000):
        write(tmp_path, step, keep)
    assert steps(tmp_path) == [5, 10, 100, 1000][-keep:]


@settings(max_examples=200, deadline=None)
@given(
    found=st.lists(st.integers(1, 60), unique=True).map(sorted),
    keep=st.integers(1, 5),
    keep_every=st.none() | st.integers(1, 10),
)
def test_the_newest_and_every_so_many_steps_stay(found: list[int], keep: int, keep_every: int | None) -> None:
    there: set[Path] = set()
    for step in found:
        there.add(step_folder(Path("root"), step))
        there -= set(superseded(there, step, keep, keep_every))
    wanted = {step for step in found if keep_every and step % keep_every == 0} | set(found[-keep:])
    assert there == {step_folder(Path("root"), step) for step in wanted}


def test_every_so_many_steps_stay_on_the_disk(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, 1, keep_every=20)
    for step in range(5, 70, 5):
        writer.save(groups(step), {}, run_position(step))
    writer.close()
    assert steps(tmp_path) == [20, 40, 60, 65]


def test_after_a_resume_the_count_goes_on_and_what_was_given_up_goes_c11(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write(tmp_path, step, keep=3)
    for step in (20, 30):
        (step_folder(tmp_path, step) / "model.safetensors").write_bytes(b"")
    assert found_in(tmp_path).step == 10
    # Those of later steps are not to be taken for the newest, nor counted among those that stay.
    write(tmp_path, 15, keep=2)
    assert steps(tmp_path) == [10, 15]
    assert found_in(tmp_path).step == 15


def test_a_step_that_is_saved_again_takes_the_place_of_the_first_c05(tmp_path: Path) -> None:
    for again in range(3):
        writer = CheckpointWriter(tmp_path, 1)
        writer.save(groups(20), {}, run_position(20, again=again))
        writer.close()
        assert writer.failure is None
        assert names(tmp_path) == ["step-000000020"]
        assert found_in(tmp_path).run_position.notes == {"again": again}


def test_leftovers_of_dead_runs_are_removed_and_never_loaded_c16(tmp_path: Path) -> None:
    write(tmp_path, 30).rename(tmp_path / ".tmp-000000030-dead.1")
    write(tmp_path, 20).rename(tmp_path / ".tmp-gone-step-000000020-dead.2")
    (tmp_path / ".tmp-000000010-dead.1.failed-0").mkdir()
    (tmp_path / ".tmp-file").write_bytes(b"")
    assert newest_checkpoint(tmp_path, pytest.fail) is None
    write(tmp_path, 10)
    assert names(tmp_path) == ["step-000000010"]


def test_what_links_point_to_is_never_removed_x09(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(b"1")
    inside = write(root, 5)
    for planted in (".tmp-000000001-a.1", ".tmp-gone", "step-000000001", "step-000000010", "step-000000010.old"):
        (root / planted).symlink_to(outside)
    (inside / "link").symlink_to(outside)
    (inside / "file link").symlink_to(outside / "precious")
    write(root, 10, keep=1)
    assert names(root) == ["step-000000010"]
    assert not step_folder(root, 10).is_symlink()
    assert names(outside) == ["precious"]
    assert found_in(root).step == 10


# The disk


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[None]:
    """A small disk."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root may mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_costs_nothing_but_the_new_checkpoint_c03(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with mounted(disk, "1m"):
        root = disk / "checkpoints"
        writer = CheckpointWriter(root, keep=1)
        writer.save(groups(10, LARGE), {}, run_position(10))
        for count in (1, 2):
            writer.save(groups(20, LARGE), {}, run_position(20))
            writer.wait()
            assert writer.failure is not None
            assert writer.failure.startswith(
                f"checkpoint of step 20 is not written: No space left on device in {root}; needed 720,000 bytes, free "
            )
            assert writer.failure.endswith(" bytes; make room there, or lower keep_checkpoints")
            free = int(writer.failure.partition("free ")[2].split()[0].replace(",", ""))
            assert 200_000 < free < 720_000  # what the part took is free again
            assert writer.failures_in_a_row == count
            assert names(root) == ["step-000000010"]
            require_consistent(found_in(root))
        subprocess.run(["mount", "-o", "remount,size=2m", str(disk)], check=True)
        writer.save(groups(30, LARGE), {}, run_position(30))
        writer.close()
        assert (writer.failure, writer.failures_in_a_row) == (None, 0)
        assert names(root) == ["step-000000030"]
        require_consistent(found_in(root))


def test_a_disk_that_is_read_only_for_a_while_costs_nothing_c14(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with mounted(disk, "4m"):
        root = disk / "checkpoints"
        writer = CheckpointWriter(root, keep=1)
        writer.save(groups(10), {}, run_position(10))
        writer.wait()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        writer.save(groups(20), {}, run_position(20))
        writer.wait()
        assert writer.failure is not None
        assert "Read-only file system" in writer.failure
        assert writer.failure.endswith("mount it writable")
        require_consistent(found_in(root))
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        writer.save(groups(30), {}, run_position(30))
        writer.close()
        assert (writer.failure, writer.failures_in_a_row) == (None, 0)
        assert names(root) == ["step-000000030"]


def test_files_that_may_not_be_so_large_are_a_failure_c03(tmp_path: Path) -> None:
    write(tmp_path, 10)
    writer = CheckpointWriter(tmp_path, keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        writer.save(groups(20, LARGE), {}, run_position(20))
        writer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert writer.failure is not None
    assert "File too large" in writer.failure
    assert "ulimit -f" in writer.failure
    assert names(tmp_path) == ["step-000000010"]
    writer.save(groups(20, LARGE), {}, run_position(20))
    writer.wait()
    assert (writer.failure, writer.failures_in_a_row) == (None, 0)


def test_a_folder_that_vanished_is_not_made_again_elsewhere_c14(tmp_path: Path) -> None:
    root = tmp_path / "disk" / "checkpoints"
    writer = CheckpointWriter(root, keep=1)
    writer.save(groups(10), {}, run_position(10))
    writer.wait()
    (tmp_path / "disk").rename(tmp_path / "unmounted")
    writer.save(groups(20), {}, run_position(20))
    writer.wait()
    assert writer.failure is not None
    assert writer.failure.endswith("free unknown; the folder has vanished: mount it or make it again")
    assert not root.exists()
    (tmp_path / "unmounted").rename(tmp_path / "disk")
    writer.save(groups(20), {}, run_position(20))
    writer.close()
    assert writer.failure is None
    assert steps(root) == [20]


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ENOSPC, errno.EDQUOT, errno.ESTALE])
@pytest.mark.parametrize("call", ["mkdir", "rename", "fsync"])
def test_any_error_of_the_disk_is_a_failure_that_may_pass_c03(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    write(tmp_path, 10)
    writer = CheckpointWriter(tmp_path, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        writer.save(groups(20), {}, run_position(20))
        writer.wait()
    assert writer.failure is not None
    assert os.strerror(number) in writer.failure
    assert writer.failures_in_a_row == 1
    require_consistent(found_in(tmp_path))
    writer.save(groups(30), {}, run_position(30))
    writer.close()
    assert (writer.failure, writer.failures_in_a_row) == (None, 0)
    assert names(tmp_path) == ["step-000000030"]


def test_old_ones_that_cannot_be_removed_are_told_and_the_new_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, *_: object) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(groups(10), {}, run_position(10))
    writer.wait()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail)
        writer.save(groups(20), {}, run_position(20))
        writer.wait()
    assert (writer.failure, writer.failures_in_a_row) == (None, 0)
    assert writer.warning is not None
    assert "cannot be removed (Device or resource busy)" in writer.warning
    assert found_in(tmp_path).step == 20
    writer.save(groups(30), {}, run_position(30))
    writer.wait()
    assert writer.warning is None
    assert names(tmp_path) == ["step-000000030"]


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["n03-nan", "n03-inf"])
def test_what_is_not_finite_is_never_written(value: float, group: str, tmp_path: Path) -> None:
    write(tmp_path, 10)
    tensors = groups(20)
    tensors[group][f"{group}.weight"][1] = value
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(tensors, {}, run_position(20))
    writer.close()
    assert writer.failure == f"checkpoint of step 20 is not written: {group}.weight of the {group} is not finite"
    assert names(tmp_path) == ["step-000000010"]


# Death at any moment


class Killed(BaseException):
    """As a SIGKILL: nobody tidies up after it."""


CALLS = ("mkdir", "rename", "fsync", "unlink", "rmdir")


def dies_at(number: int, work: Callable[[], None], before: Callable[[], None] = lambda: None) -> bool:
    """Whether `work` is over before call `number` that changes the disk; before each such call, `before` is called."""
    count = itertools.count()

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **options: Any) -> Any:
            before()
            if next(count) == number:
                raise Killed
            return call(*arguments, **options)

        return counting

    with pytest.MonkeyPatch.context() as patch:
        for call in CALLS:
            patch.setattr(os, call, counted(getattr(os, call)))
        try:
            work()
        except Killed:
            return False
    return True


@pytest.mark.parametrize("step", [20, 30], ids=["c01-c05-the-same-step-again", "c01-c05-the-next-step"])
def test_death_before_any_change_of_the_disk_leaves_a_whole_checkpoint(step: int, tmp_path: Path) -> None:
    for number in itertools.count():
        root = tmp_path / f"{number}"
        write(root, 20, keep=1)

        def look(root: Path = root) -> None:
            # With one to keep, there is never less than that one.
            require_consistent(found_in(root))

        def save(root: Path = root) -> None:
            writer = CheckpointWriter(root, keep=1)
            writer.save(groups(step), {}, run_position(step, again=True))
            writer.wait()

        is_over = dies_at(number, save, look)
        look()
        # Whatever is left, the next start goes on from it and tidies up.
        write(root, found_in(root).step, keep=1)
        assert names(root) == [f"step-{found_in(root).step:09d}"]
        if is_over:
            break
    assert number > 15
    assert found_in(root).step == step


# Several writers


def pair(root: Path, **options: Any) -> list[CheckpointWriter]:
    return [CheckpointWriter(root, 1, rank=rank, writers=2, launch_id="launch", **options) for rank in range(2)]


def save_all(writers: list[CheckpointWriter], step: int) -> None:
    for writer in writers:
        writer.save(groups(step), {}, run_position(step))
    for writer in reversed(writers):
        writer.wait()


def test_several_writers_need_a_word_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="need a launch_id, which tells their parts"):
        CheckpointWriter(tmp_path, 1, writers=2)


def test_what_all_ranks_have_is_written_once(tmp_path: Path) -> None:
    writers = pair(tmp_path)
    for step in (10, 20):
        save_all(writers, step)
        assert [writer.failure for writer in writers] == [None, None]
        assert steps(tmp_path) == [step]
        require_consistent(found_in(tmp_path))
    assert names(step_folder(tmp_path, 20)) == sorted(
        ["manifest.json", *(f"{group}-0000{rank}-of-00002.safetensors" for group in GROUPS for rank in range(2))]
    )


def test_what_rank_0_does_not_get_in_time_is_given_up_c02(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = pair(tmp_path)
    save_all([first, second], 10)
    monkeypatch.setattr(checkpoint_writer, "_PART_TIMEOUT", 0.1)
    first.save(groups(20), {}, run_position(20))
    first.wait()
    assert first.failure == "checkpoint of step 20 is not written: rank 1 has not written its part in time"
    assert steps(tmp_path) == [10]
    second.save(groups(20), {}, run_position(20))  # too late
    second.wait()
    assert second.failure == first.failure
    monkeypatch.undo()
    save_all([first, second], 30)
    assert [first.failure, second.failure] == [None, None]
    assert names(tmp_path) == ["step-000000030"]


def test_leaving_does_not_wait_long_for_the_dead_c02(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_writer, "_EXIT_TIMEOUT", 0.1)
    first, _ = pair(tmp_path)
    first.save(groups(20), {}, run_position(20))
    began = time.monotonic()
    first.close()
    assert time.monotonic() - began < 10
    assert first.failure is not None
    assert newest_checkpoint(tmp_path, pytest.fail) is None


@pytest.mark.parametrize("failing", [0, 1])
def test_what_one_rank_cannot_write_is_given_up_by_all_with_its_reason_c03(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_file = HostCopy.write

    def fail(copy: HostCopy, path: Path) -> Any:
        if path.name.startswith(f"ema-0000{failing}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_file(copy, path)

    writers = pair(tmp_path)
    save_all(writers, 10)
    with monkeypatch.context() as patch:
        patch.setattr(HostCopy, "write", fail)
        save_all(writers, 20)
    assert writers[0].failure is not None
    assert "No space left on device" in writers[0].failure
    assert steps(tmp_path) == [10]
    if failing == 1:  # rank 1 may come late to a save that rank 0 has given up
        assert {path.name for path in tmp_path.glob(".tmp-*/*")} == {"reason"}
    save_all(writers, 20)
    assert [writer.failure for writer in writers] == [None, None]
    assert names(tmp_path) == ["step-000000020"]
    require_consistent(found_in(tmp_path))


def test_parts_of_a_save_given_up_never_mix_with_those_of_the_next(tmp_path: Path) -> None:
    first, second = pair(tmp_path)
    second.save(groups(20), {}, run_position(20))
    second.wait()
    # The whole job dies, and starts again with rank 1 late.
    first = CheckpointWriter(tmp_path, 1, rank=0, writers=2, launch_id="another")
    first.save(groups(20), {}, run_position(20))
    time.sleep(0.1)
    assert newest_checkpoint(tmp_path, pytest.fail) is None
    second = CheckpointWriter(tmp_path, 1, rank=1, writers=2, launch_id="another")
    second.save(groups(20), {}, run_position(20))
    first.wait()
    assert first.failure is None
    assert names(tmp_path) == ["step-000000020"]


SHAPES = {"even": (4, 3), "uneven": (5, 2), "one": (1, 3), "none": (0, 3), "line": (7,)}


def wholes() -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape, generator=torch.Generator().manual_seed(1)) for name, shape in SHAPES.items()}


def save_in_parts(root: Path) -> list[Any]:
    from mae.training.processes.accelerator import start_accelerator

    rank = start_accelerator("fp32").process_index
    mesh = init_device_mesh("cpu", (2,))
    parts = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in wholes().items()}
    tensors = {"model": parts, "optimizer": {**parts, "step": torch.tensor(7.0)}}
    writer = CheckpointWriter(root, 1, rank=rank, writers=2, launch_id="launch")
    needed = bytes_needed(tensors)
    writer.save(tensors, {"format": "pt"}, run_position(20))
    torch.distributed.barrier()
    for part in parts.values():
        part.to_local().zero_()
    writer.close()
    torch.distributed.barrier()
    found = found_in(root).tensors("model")
    same = all(torch.equal(found[name], tensor) for name, tensor in wholes().items())
    return [writer.failure, needed, same]


def test_rows_saved_by_two_ranks_are_whole_for_any_number_c18(
    on_two_ranks: Callable[[Callable[[], Any]], list[Any]], tmp_path: Path
) -> None:
    needed = 2 * 4 * sum(tensor.numel() for tensor in wholes().values()) + 4
    assert on_two_ranks(lambda: save_in_parts(tmp_path)) == [[None, needed, True]] * 2
    found = found_in(tmp_path)
    assert found.tensors("optimizer").pop("step") == 7.0
    for group in ("model", "optimizer"):
        tensors = found.tensors(group)
        assert {name: tuple(tensors[name].shape) for name in SHAPES} == SHAPES
        assert all(torch.equal(tensors[name], tensor) for name, tensor in wholes().items())
    for lost in found.path.glob("model-*"):
        kept = lost.read_bytes()
        lost.unlink()
        with pytest.raises(UserError, match=lost.name):
            newest_checkpoint(tmp_path, lambda text: None)
        lost.write_bytes(kept)
    assert found_in(tmp_path).step == 20
