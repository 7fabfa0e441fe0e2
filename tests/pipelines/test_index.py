"""`mae index`: what it tells, where it writes, and how it ends."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import png
from webdataset import TarWriter

from mae.data.indexing import beside, open_index
from mae.data.scan import RECORD
from mae.data.store.shards import expand
from mae.errors import UserError
from mae.pipelines.index import BAD_FILE, IndexSettings, main, run


def test_the_index_lies_beside_the_shards_where_training_finds_it(
    make_shards: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_shards([5, 4])
    index = run(IndexSettings((str(folder),), workers=0))
    assert index.folder == beside(expand([str(folder)]))
    said = list[str]()
    assert open_index([str(folder)], tmp_path / "cache", say=said.append).fingerprint == index.fingerprint
    assert said == []
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:])
    assert told["samples"] == "9"
    assert told["labels"] == "9, from 0 to 3"
    assert told["files"] == "9 .cls, 9 .png"


def test_a_switch_and_a_shard_stand_in_any_order(
    make_shards: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_shards([3])
    for argv in (["--check", str(folder)], [str(folder), "--check"]):
        main([*argv, "--out", str(tmp_path / "index"), "--workers", "0"])
    assert capsys.readouterr().out.count("from 3 images") == 2


def test_what_changed_since_and_what_cannot_be_decoded_are_listed_d12_s01(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for key, image in {"a": png(0), "b": png(1)[:40], "c": png(2)}.items():
            tar.write({"__key__": key, "png": image})
    settings = IndexSettings((str(path),), out=tmp_path / "index", check=True, workers=0)
    with pytest.raises(UserError, match=r"^1 of 3 images are bad: .*x\.tar: b\.png \("):
        run(settings)
    damage(path, tmp_path / "index" / "samples.bin", 2)
    with pytest.raises(UserError, match=r"^2 of 3 images are bad: .*c\.png \(its crc32 is .*Restore images that have"):
        run(settings)
    listed = (tmp_path / "index" / BAD_FILE).read_text().splitlines()
    assert [line.split(" (")[0] for line in listed] == [f"{path}: b.png", f"{path}: c.png"]


def damage(path: Path, records: Path, number: int) -> None:
    """Flip a bit in an image, and leave the file its time, as a failing disk does."""
    before = path.stat().st_mtime_ns
    place = np.fromfile(records, RECORD)[number]
    with path.open("r+b") as file:
        file.seek(int(place["offset"]) + int(place["size"]) // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before, before))


def test_a_damaged_shard_is_one_line_and_exit_code_2_d01(
    make_shards: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_shards([5, 5])
    shard = folder / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(SystemExit) as ended:
        main([str(folder), "--out", str(tmp_path / "index"), "--workers", "0"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: shard {shard} is not a valid tar file: ")


def test_no_shards_are_a_mistake() -> None:
    with pytest.raises(UserError, match="allowed: one or more tar files"):
        IndexSettings(())
