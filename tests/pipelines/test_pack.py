"""`mae pack` from its settings to what it says and leaves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import png

from mae.errors import UserError
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


def packed_files(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(out.iterdir()) if p.is_file()}


def test_a_tree_is_packed_and_told_of(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = run(PackSettings(str(tree), tmp_path / "out", shard_samples=7, workers=0))
    assert packed["train"].shard_lengths == [7, 5]
    assert packed["train"].samples_per_class == [4, 4, 4]
    said = capsys.readouterr()
    assert "1 files are not images and are left out, the first: README.txt" in said.out
    assert "train: 12 images in 2 shards" in said.out
    assert "3 classes" in said.out
    assert said.err == ""


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
    assert "1 bad images left out, listed in train-bad-images.txt" in capsys.readouterr().out


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
