"""`mae pack` from its settings to what it says and leaves."""

import errno
import io
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import png
from data.packing.packs import packed_files
from PIL import Image

from mae.data.packing.plan import Plan
from mae.data.packing.publish import Packed, publish
from mae.errors import UserError
from mae.pipelines import pack as module
from mae.pipelines.pack import PackSettings, main, run


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Twelve images in three classes, and a text."""
    root = tmp_path / "tree"
    for number in range(12):
        path = root / "abc"[number % 3] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number, size=(20, 30), mode="RGB"))
    (root / "README.txt").write_text("text")
    return root


def test_a_tree_is_packed_and_told_of(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = run(PackSettings(str(tree), tmp_path / "out", shard_samples=7, workers=0))
    assert packed["train"].shard_lengths == [7, 5]
    assert packed["train"].samples_per_class == [4, 4, 4]
    said = capsys.readouterr()
    assert said.out.startswith("train: 1 file is left out: 1 README.txt\ntrain: 12 images in 2 shards")
    assert "3 classes (a, b, c), mean" in said.out
    assert said.err == ""


def test_classes_of_a_file_and_conversions_are_told_of(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "names").write_text("b\nc\nd\na\ne\n")
    Image.open(tree / "a" / "00.png").save(tree / "a" / "00.gif")
    packed = run(PackSettings(str(tree), tmp_path / "out", classes=tmp_path / "names", workers=0))
    assert packed["train"].samples_per_class == [4, 4, 0, 5, 0]
    said = capsys.readouterr().out
    assert "5 classes (b, c, d and 2 more, 2 of them without images: d, e), mean" in said
    assert "converted to PNG: 1 .gif (first frame)" in said
    assert (tmp_path / "out" / "classes.txt").read_text() == "b\nc\nd\na\ne\n"


@pytest.fixture
def splits(tree: Path) -> Path:
    """The tree as split `train`, and some of its images as `val`."""
    root = tree.parent / "root"
    shutil.copytree(tree, root / "train")
    shutil.copytree(tree / "b", root / "val" / "b")
    return root


def test_each_split_of_a_folder_is_packed(splits: Path, tmp_path: Path) -> None:
    packed = run(PackSettings(str(splits), tmp_path / "out", shard_samples=7, workers=0))
    assert {name: split.samples_per_class for name, split in packed.items()} == {"train": [4, 4, 4], "val": [0, 4, 0]}
    assert [p.name for p in sorted((tmp_path / "out").glob("*.tar"))] == [
        "train-000000.tar", "train-000001.tar", "val-000000.tar",
    ]  # fmt: skip


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_crash_at_any_split_is_mended_by_the_same_command(
    splits: Path, tmp_path: Path, split: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash(plan: Plan, skip_bad: bool) -> Packed:
        if plan.split == split:
            raise KeyboardInterrupt
        return publish(plan, skip_bad)

    run(PackSettings(str(splits), tmp_path / "whole", workers=0))
    settings = PackSettings(str(splits), tmp_path / "out", workers=0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "publish", crash)
        run(settings)
    capsys.readouterr()
    run(settings)
    assert ("train: packed before this command was interrupted\n" in capsys.readouterr().out) == (split == "val")
    assert packed_files(tmp_path / "out") == packed_files(tmp_path / "whole")
    with pytest.raises(UserError, match="already contains a split 'train'"):
        run(settings)


def test_a_split_of_another_command_is_not_taken_for_a_part_of_this(splits: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(PackSettings(str(splits / "train"), out, workers=0))
    with pytest.raises(UserError, match="already contains a split 'train'"):
        run(PackSettings(str(splits), out, workers=0))
    run(PackSettings(str(splits / "val"), out, split="val", workers=0, shard_range=(0, 0)))
    with pytest.raises(UserError, match=r"unfinished pack that differs: splits was None, now \['train', 'val'\]"):
        run(PackSettings(str(splits), out, workers=0))


def test_jobs_of_an_array_share_each_split(splits: Path, tmp_path: Path) -> None:
    run(PackSettings(str(splits), tmp_path / "whole", shard_samples=2, workers=0))
    job = PackSettings(str(splits), tmp_path / "out", shard_samples=2, workers=0)
    for first, last in ((0, 3), (3, 6)):
        assert run(replace(job, shard_range=(first, last))) == {}
    run(job)
    assert packed_files(tmp_path / "out") == packed_files(tmp_path / "whole")


def test_digits_have_their_own_splits_and_labels(tmp_path: Path) -> None:
    for settings in (PackSettings("digits", tmp_path, split="x"), PackSettings("digits", tmp_path, labels="none")):
        with pytest.raises(UserError, match=r"allowed: (None|auto) for the source digits"):
            run(settings)


class FullOutput(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("output", [None, FullOutput()])
def test_an_output_that_is_closed_or_full_ends_nothing(
    splits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: io.StringIO | None
) -> None:
    monkeypatch.setattr(sys, "stdout", output)
    assert list(run(PackSettings(str(splits), tmp_path / "out", workers=0))) == ["train", "val"]


@pytest.mark.parametrize(
    ("info", "message"), [('{"splits": [1]}', r".*must hold a mapping of splits"), ("[", "cannot be read as JSON")]
)
def test_a_damaged_info_file_is_refused(tree: Path, tmp_path: Path, info: str, message: str) -> None:
    (tmp_path / "_info.json").write_text(info)
    with pytest.raises(UserError, match=rf"_info\.json {message}"):
        run(PackSettings(str(tree), tmp_path, workers=0))


def test_a_path_that_the_system_refuses_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["x" * 300, "--out", str(tmp_path)])
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith("xxx: File name too long; correct that, then run the same command again\n")


def test_images_are_mixed_unless_asked_not_to(tree: Path, tmp_path: Path) -> None:
    for name, shuffle in (("mixed", True), ("again", True), ("plain", False)):
        run(PackSettings(str(tree), tmp_path / name, workers=0, shuffle=shuffle))
    assert packed_files(tmp_path / "mixed") == packed_files(tmp_path / "again") != packed_files(tmp_path / "plain")


def test_jobs_of_an_array_make_the_whole(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(PackSettings(str(tree), tmp_path / "whole", shard_samples=3, workers=0))
    capsys.readouterr()
    job = PackSettings(str(tree), tmp_path / "out", shard_samples=3, workers=0)
    for first, last, told in ((0, 0, "none"), (0, 2, "shards 0 to 1"), (2, 900, "shards 2 to 3"), (900, 999, "none")):
        assert run(PackSettings(**{**vars(job), "shard_range": (first, last)})) == {}
        assert (
            f"train: 12 images make 4 shards, of which {told} are packed; when all are packed"
            in capsys.readouterr().out
        )
        assert packed_files(tmp_path / "out") == {}
    packed = run(job)
    assert packed["train"].samples == 12
    assert packed_files(tmp_path / "out") == packed_files(tmp_path / "whole")


def test_reduced_images_are_counted(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "a" / "z.png").write_bytes(png(20, size=(20, 30), mode="RGBA"))
    run(PackSettings(str(tree), tmp_path / "out", workers=0, short_side=10))
    said = capsys.readouterr().out
    assert "12 images made smaller (short side 10)" in said
    assert "1 larger images left unchanged: not 8-bit gray or RGB" in said


def test_bad_images_are_told_of(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "a" / "00.png").write_bytes(b"x")
    with pytest.raises(SystemExit) as end:
        main([str(tree), "--out", str(tmp_path / "out"), "--workers", "0"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: 1 of 12 images are bad: a/00.png (")
    main([str(tree), "--out", str(tmp_path / "out"), "--workers", "0", "--skip_bad"])
    assert "1 bad image left out, listed in train-bad-images.txt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--shard_samples 0", "shard_samples is 0"),
        ("--shard_bytes 0", "shard_bytes is 0"),
        ("--short_side 0", "short_side is 0"),
        ("--quality 101", "quality is 101"),
        ("--workers -1", "workers is -1"),
        ("--shard_range 5 3", "shard_range is 5 3"),
        ("--shard_range 5", "shard_range"),
        ("--engine spark", "spark"),
        ("--split a/b", "split is 'a/b'"),
        ("--split .a", "split is '.a'"),
        ("--labels none --classes x", "classes is x; allowed: None with --labels none"),
        ("--labels none --label_file x", "labels is none; allowed: auto with --label_file"),
        ("--label_file x", "label_file x cannot be read: No such file"),
    ],
)
def test_k02_values_out_of_range_are_refused(
    flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["nowhere", "--out", str(tmp_path / "out"), *flags.split()])
    assert end.value.code == 2
    complaint = capsys.readouterr().err
    assert message in complaint
    assert len(complaint.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_not_there_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        run(PackSettings(str(tmp_path / "nowhere"), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ray_packs_the_same_bytes(tree: Path, tmp_path: Path) -> None:
    """A local Ray of two workers that the command starts for itself; it is quiet, and gone afterwards."""
    pytest.importorskip("ray")
    run(PackSettings(str(tree), tmp_path / "here", shard_samples=3, workers=0))
    command = [sys.executable, "-m", "mae", "pack", str(tree), "--out", str(tmp_path / "ray"), "--shard_samples", "3"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [*command, "--engine", "ray", "--workers", "2"], check=True, capture_output=True, text=True, env=environment
    )
    assert packed_files(tmp_path / "ray") == packed_files(tmp_path / "here")
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 2
