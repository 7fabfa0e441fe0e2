"""Making an index: by several processes at once, over any crash, and never in somebody's data folder."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import pytest
from conftest import png, results_of

from mae.data import indexing
from mae.data.images.decode import decode
from mae.data.index import load
from mae.data.indexing import beside, index_of, open_index
from mae.data.manifest import StaleIndexError
from mae.data.measuring import check_images, measure
from mae.data.read_rules import USUAL, ReadRules
from mae.data.reader import ImageReader
from mae.data.statistics import PixelSums
from mae.data.store.shards import Shard, expand
from mae.data.store.unpacked import CACHE_BYTES
from mae.errors import UserError


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def flip_a_bit(path: Path, at: int) -> None:
    """With the time of the file as it was: only the bytes tell."""
    times = path.stat()
    with path.open("r+b") as file:
        old = os.pread(file.fileno(), 1, at)
        os.pwrite(file.fileno(), bytes([old[0] ^ 1]), at)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_ids_run_over_all_shards_in_the_order_named(make_shards: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_shards([3, 1, 4], classes=9)
    index = open_index([str(folder)], tmp_path / "cache")
    assert len(index) == 8
    assert index.label.tolist() == list(range(8))
    assert [entry.url for entry in index.entries] == [f"{folder}/train-{n:06d}.tar" for n in range(3)]
    backwards = open_index([f"{folder}/train-{{000002..000000}}.tar"], tmp_path / "cache")
    assert backwards.label.tolist() == [4, 5, 6, 7, 3, 0, 1, 2]


def test_one_key_may_occur_in_two_shards_s06(write_tar: Callable[..., Path], tmp_path: Path) -> None:
    paths = [write_tar(f"{n}.tar", {"a.png": png(0), "a.cls": str(n).encode()}) for n in range(2)]
    assert open_index([*map(str, paths)], tmp_path / "cache").label.tolist() == [0, 1]


def test_nothing_is_written_into_the_data_folder(make_shards: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_shards([3, 2])
    before = files_of(folder)
    index = open_index([str(folder)], tmp_path / "cache")
    check_images(index, tmp_path / "cache", CACHE_BYTES, 0, lambda images: None)
    assert files_of(folder) == before
    assert index.folder.is_relative_to(tmp_path / "cache" / "index")


def test_an_index_is_made_once_and_said_so(
    make_shards: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, said, done, bars = make_shards([3, 2]), list[str](), list[int](), list[tuple[str, int, bool]]()

    def bar(title: str, total: int, is_bytes: bool) -> AbstractContextManager[Callable[[int], None]]:
        bars.append((title, total, is_bytes))
        return nullcontext(done.append)

    monkeypatch.setattr(indexing, "progress_bar", bar)
    shards = expand([str(folder)])
    first = index_of(shards, tmp_path / "cache", None, 1, said.append)
    assert said == ["indexing 2 shards"]
    assert done == [shard.size for shard in shards]
    assert bars == [("indexing", sum(done), True)]
    second = index_of(shards, tmp_path / "cache", None, 1, said.append)
    assert (len(said), len(done), len(bars)) == (1, 2, 1)
    assert second.fingerprint == first.fingerprint
    assert {p.name for p in first.folder.iterdir()} == {"lock", "manifest.json", "samples.bin"}


def test_the_processes_do_not_change_the_result(make_shards: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_shards([1, 40, 3, 17, 2])
    one, three = (open_index([str(folder)], tmp_path / "cache", tmp_path / f"{n}", n) for n in (1, 3))
    assert three.records.tolist() == one.records.tolist()
    assert (three.fingerprint, three.entries, three.pixels) == (one.fingerprint, one.entries, one.pixels)


def test_an_index_beside_the_shards_is_used(make_shards: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_shards([3, 2])
    shards = expand([str(folder)])
    place = beside(shards)
    assert place is not None
    assert place.parent == folder / indexing.FOLDER
    made = index_of(shards, tmp_path / "cache", place)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    assert index_of(shards, tmp_path / "cache").folder == made.folder
    assert not (tmp_path / "cache" / "index").exists()
    # A folder that is moved takes its index with it, and a part of its shards has another one.
    moved = folder.rename(tmp_path / "moved")
    assert open_index([str(moved)], tmp_path / "cache").folder.is_relative_to(moved)
    assert len(open_index([f"{moved}/train-000000.tar"], tmp_path / "cache")) == 3


def test_shards_of_several_folders_have_no_place_beside_them(make_shards: Callable[..., Path]) -> None:
    assert beside(expand([str(make_shards([1], name="a")), str(make_shards([1], name="b"))])) is None


@pytest.mark.parametrize("change", ["size", "time"])
def test_a_changed_shard_is_indexed_anew_and_both_values_are_said_d11(
    make_shards: Callable[..., Path], tmp_path: Path, change: str
) -> None:
    folder, said = make_shards([3, 2]), list[str]()
    path = folder / "train-000001.tar"
    before = open_index([str(folder)], tmp_path / "cache")
    old = path.stat()
    if change == "size":
        shutil.copyfile(make_shards([9], name="other") / "train-000000.tar", path)
    else:
        os.utime(path, ns=(0, 7))
    after = open_index([str(folder)], tmp_path / "cache", None, 1, said.append)
    values = (old.st_size, path.stat().st_size) if change == "size" else (old.st_mtime_ns, 7)
    what = "size" if change == "size" else "version"
    assert said == [
        f"indexing 2 shards; the one in {before.folder} is not used: "
        f"{path} has changed: its {what} was {values[0]} and is now {values[1]}"
    ]
    assert (after.fingerprint == before.fingerprint) == (change == "time")
    assert len(after) == (12 if change == "size" else 5)


@pytest.mark.parametrize("name", ["samples.bin", "manifest.json"])
def test_a_damaged_index_is_made_anew_and_the_reason_said_d17(
    make_shards: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    folder, said = make_shards([3, 2]), list[str]()
    first = open_index([str(folder)], tmp_path / "cache")
    files, records = files_of(first.folder), first.records.tolist()
    flip_a_bit(first.folder / name, len(files[name]) // 2)
    second = open_index([str(folder)], tmp_path / "cache", None, 1, said.append)
    assert len(said) == 1
    assert f"{name} is damaged: " in said[0]
    assert second.records.tolist() == records
    assert files_of(first.folder) == files


def build(folder: Path, cache: Path, start: float, results: "multiprocessing.Queue[object]") -> None:
    time.sleep(max(0.0, start - time.time()))
    said = list[str]()
    index = open_index([str(folder)], cache, None, 2, said.append)
    results.put((index.fingerprint, index.records.tolist(), len(said)))


def test_processes_that_build_at_once_get_one_result_d18(make_shards: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_shards([2] * 20)
    context, scans = multiprocessing.get_context("fork"), tmp_path / "scans"
    results = context.Queue()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexing, "scan", counted(indexing.scan, scans))
        arguments = (folder, tmp_path / "cache", time.time() + 0.3, results)
        processes = [context.Process(target=build, args=arguments) for _ in range(4)]
        for process in processes:
            process.start()
        found = results_of(processes, results)
    assert [result[:2] for result in found] == [found[0][:2]] * 4
    assert len(scans.read_text().splitlines()) == 20, "each shard is read by one of them, once"
    fresh = open_index([str(folder)], tmp_path / "other")
    assert found[0][:2] == (fresh.fingerprint, fresh.records.tolist())
    (place,) = (tmp_path / "cache" / "index").iterdir()
    assert {p.name for p in place.iterdir()} == {"lock", "manifest.json", "samples.bin"}


def counted(scan: Callable[..., object], log: Path) -> Callable[..., object]:
    """`scan`, which leaves a line in `log` each time, whichever process calls it."""

    def logged(source: Path | int, name: str = "", image_extension: str | None = None) -> object:
        with log.open("a") as file:
            file.write(f"{name}\n")
        return scan(source, name, image_extension)

    return logged


SLOW_BUILD = """
import os, sys, time
from pathlib import Path
from mae.data import indexing
scan = indexing.scan
def slow(*arguments):
    time.sleep(0.05)
    return scan(*arguments)
indexing.scan = slow
indexing.open_index([sys.argv[1]], Path(sys.argv[2]), workers=int(sys.argv[3]))
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_build_that_was_killed_goes_on_where_it_was_d18(
    make_shards: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """A lock that its children inherit must not outlive it, nor may they."""
    folder, cache, scans = make_shards([2] * 60), tmp_path / "cache", tmp_path / "scans"
    command = [sys.executable, "-c", SLOW_BUILD, str(folder), str(cache), str(workers)]
    process = subprocess.Popen(command)
    deadline = time.time() + 60
    while len(list(cache.rglob("parts/*.json"))) < 5 and time.time() < deadline:
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == (workers if workers > 1 else 0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(cache.rglob("manifest.json"))
    with pytest.raises(StaleIndexError):
        load(next((cache / "index").iterdir()), expand([str(folder)]))
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.time() < deadline, "the processes of a pool outlive their parent"
        time.sleep(0.01)
    finished = len(list(cache.rglob("parts/*.json")))
    assert 5 <= finished < 60

    monkeypatch.setattr(indexing, "scan", counted(indexing.scan, scans))
    index = open_index([str(folder)], cache)
    assert len(scans.read_text().splitlines()) == 60 - finished
    fresh = open_index([str(folder)], tmp_path / "fresh")
    assert index.records.tolist() == fresh.records.tolist()
    assert (index.fingerprint, index.entries, index.pixels) == (fresh.fingerprint, fresh.entries, fresh.pixels)


@pytest.mark.parametrize("damage", ["cut", "no-json", "half-a-json", "changed-shard"])
def test_a_part_that_is_not_whole_is_read_again(
    make_shards: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    folder, cache = make_shards([3, 2]), tmp_path / "cache"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(indexing, "save", interrupted)
        open_index([str(folder)], cache)
    for part in cache.rglob("parts/*.bin"):
        if damage == "cut":
            os.truncate(part, part.stat().st_size - 1)
        elif damage == "no-json":
            part.with_suffix(".json").unlink()
        elif damage == "half-a-json":
            os.truncate(part.with_suffix(".json"), 30)
    if damage == "changed-shard":
        for path in folder.iterdir():
            os.utime(path, ns=(0, 1))
    monkeypatch.setattr(indexing, "scan", counted(indexing.scan, tmp_path / "scans"))
    index = open_index([str(folder)], cache)
    assert len((tmp_path / "scans").read_text().splitlines()) == 2
    assert index.records.tolist() == open_index([str(folder)], tmp_path / "fresh").records.tolist()


def test_a_part_is_for_the_images_that_were_named(
    write_tar: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error for two images of one key asks for the same command with another extension."""
    path = write_tar("a.tar", {"0.jpg": png(0), "0.large.jpg": png(1)})
    cache = tmp_path / "cache"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(indexing, "save", interrupted)
        open_index([str(path)], cache, tmp_path / "out", rules=ReadRules("jpg"))
    found, fresh = (
        open_index([str(path)], tmp_path / name, tmp_path / out, rules=ReadRules("large.jpg"))
        for name, out in (("cache", "out"), ("fresh", "other"))
    )
    assert found.records.tolist() == fresh.records.tolist()


def test_web_shards_that_differ_by_their_query_have_parts_of_their_own(tmp_path: Path) -> None:
    one, other = (Shard(f"https://host/get?file={name}", 1024, "") for name in "ab")
    assert indexing._part(tmp_path, one, USUAL) != indexing._part(tmp_path, other, USUAL)


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("given", [True, False], ids=["folder", "cache"])
def test_a_place_that_cannot_be_written_is_named_d19(
    make_shards: Callable[..., Path], tmp_path: Path, given: bool
) -> None:
    folder = make_shards([1])
    (tmp_path / "file").write_text("x")
    below = tmp_path / "file" / "below"
    with pytest.raises(UserError, match=rf"the index cannot be written to {below}.*: Not a directory; set data\.index"):
        open_index([str(folder)], tmp_path / "cache" if given else below, below if given else None)


def test_a_disk_that_is_full_is_named_d19(
    make_shards: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    folder = make_shards([1])
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"cannot be written to .*: No space left"):
        patch.setattr(os, "fsync", full)
        open_index([str(folder)], tmp_path / "cache")
    assert len(open_index([str(folder)], tmp_path / "cache")) == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_all_faulty_shards_are_counted_and_the_first_named(
    make_shards: Callable[..., Path], tmp_path: Path, workers: int
) -> None:
    folder = make_shards([2] * 9)
    for number in (1, 3, 4, 5, 6, 8):
        os.truncate(folder / f"train-{number:06d}.tar", 700)
    with pytest.raises(UserError) as caught:
        open_index([str(folder)], tmp_path / "cache", None, workers)
    text = str(caught.value)
    assert text.startswith(f"shard {folder}/train-000001.tar is not a valid tar file: it ends at byte 700 ")
    assert text.endswith("and 1 more; 6 of 9 shards have errors")
    assert "train-000008" not in text
    assert "\n" not in text
    with pytest.raises(UserError, match=r"000001\.tar is not a valid tar file[^;]*; copy or pack it again$"):
        open_index([str(folder / "train-00000[0-2].tar")], tmp_path / "cache", None, workers)


def test_a_missing_shard_is_refused_before_anything_is_read_d08(
    make_shards: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_shards([2, 2])
    with pytest.raises(UserError, match=r"1 of 3 shards do not exist: .*train-000002\.tar"):
        open_index([f"{folder}/train-{{000000..000002}}.tar"], tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_checking_finds_flipped_bits_and_images_that_cannot_be_decoded_s01_d12(
    write_tar: Callable[..., Path], tmp_path: Path, workers: int
) -> None:
    files = {f"{n:03d}.png": png(n) for n in range(600)}
    files["300.png"] = png(300)[:60]
    path, done = write_tar("x.tar", files), list[int]()
    index = open_index([str(path)], tmp_path / "cache")
    offset, size, crc32, _ = index.records[555].tolist()
    flip_a_bit(path, offset + size - 10)  # the checksum of its last chunk: Pillow would not mind
    assert index_of(expand([str(path)]), tmp_path / "cache").fingerprint == index.fingerprint
    pixels, bad = check_images(index, tmp_path / "cache", CACHE_BYTES, workers, done.append)
    assert [name.partition(" (")[0] for name in bad] == [f"{path}: 300.png", f"{path}: 555.png"]
    assert f"{crc32:08x} when it was indexed" in bad[1]
    assert (pixels.images, sum(done)) == (598, 600)
    sums = PixelSums(1)
    for number in sorted({*range(600)} - {300, 555}):
        sums.add(decode(png(number), 1))
    assert pixels.statistics() == sums.statistics()


def test_an_index_holds_mean_and_deviation(make_shards: Callable[..., Path], tmp_path: Path) -> None:
    index = open_index([str(make_shards([5, 4], mode="RGB"))], tmp_path / "cache")
    sums = PixelSums(3)
    for number in range(9):
        sums.add(decode(png(number, mode="RGB"), 3))
    assert (index.pixels, index.pixels_of) == (sums.statistics(), 9)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_small_set_is_measured_whole(make_shards: Callable[..., Path], tmp_path: Path, channels: int) -> None:
    index = open_index([str(make_shards([5, 4], mode="RGB"))], tmp_path / "cache")
    sums = PixelSums(channels)
    for number in range(9):
        sums.add(decode(png(number, mode="RGB"), channels))
    assert measure(index, tmp_path / "cache", CACHE_BYTES, channels) == (sums.statistics(), 9)


def test_a_great_set_is_measured_by_2000_images_spread_over_it(write_tar: Callable[..., Path], tmp_path: Path) -> None:
    arrays = [npy(np.full((1, 1), value, dtype=np.uint8)) for value in (0, 255)]
    path = write_tar("x.tar", {f"{n}.npy": arrays[n >= 2100] for n in range(2500)})
    index = open_index([str(path)], tmp_path / "cache")
    assert index.pixels_of == 2000
    assert index.pixels is not None
    assert index.pixels.mean[0] == pytest.approx(400 / 2500, abs=0.001)


def npy(array: np.ndarray) -> bytes:
    import io

    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_bad_images_stay_out_of_what_is_measured(write_tar: Callable[..., Path], tmp_path: Path) -> None:
    index = open_index([str(write_tar("x.tar", {"a.png": png(0), "b.png": b"<html>"}))], tmp_path / "cache")
    sums = PixelSums(1)
    sums.add(decode(png(0), 1))
    assert (index.pixels, index.pixels_of) == (sums.statistics(), 1)
    assert measure(index, tmp_path / "cache", CACHE_BYTES, 1) == (sums.statistics(), 1)


def test_a_set_of_bad_images_has_no_mean(write_tar: Callable[..., Path], tmp_path: Path) -> None:
    index = open_index([str(write_tar("x.tar", {"a.png": b"x", "b.png": b""}))], tmp_path / "cache")
    assert (index.pixels, index.pixels_of) == (None, 0)
    assert measure(index, tmp_path / "cache", CACHE_BYTES, 3) == (None, 0)


@pytest.mark.parametrize("year", [1975, 2100])
def test_a_clock_that_is_wrong_is_no_change_of_the_shards_r06(
    make_shards: Callable[..., Path], tmp_path: Path, year: int
) -> None:
    folder, said = make_shards([3, 2]), list[str]()
    for path in folder.glob("*.tar"):
        seconds = (year - 1970) * 365 * 86400
        os.utime(path, (seconds, seconds))
    first = open_index([str(folder)], tmp_path / "cache", say=said.append)
    again = open_index([str(folder)], tmp_path / "cache", say=said.append)
    assert len(said) == 1
    assert first.fingerprint == again.fingerprint


def test_empty_shards_are_passed_over_unless_all_are_d06(write_tar: Callable[..., Path], tmp_path: Path) -> None:
    full = write_tar("b.tar", {"a.png": png(0), "b.png": png(1)})
    empty = [write_tar(f"{name}.tar", files) for name, files in (("a", {}), ("c", {"README": b"x"}), ("d", {}))]
    index = open_index([str(empty[0]), str(full), *map(str, empty[1:])], tmp_path / "cache")
    assert [entry.samples for entry in index.entries] == [0, 2, 0, 0]
    assert index.shard_of(np.arange(2)).tolist() == [1, 1]
    assert [ImageReader(index, tmp_path / "cache", CACHE_BYTES).name(n) for n in range(2)] == [
        f"{full}: {n}.png" for n in "ab"
    ]
    message = (
        rf"shard {empty[0]} has no images, nor has any of the 3; an image is a file \.jpg, .*; "
        rf"left out: files without an extension: 1 \(the first: {empty[1]}: README\)"
    )
    with pytest.raises(UserError, match=message):
        open_index([*map(str, empty)], tmp_path / "cache")


def test_the_images_may_be_named_by_their_extension(write_tar: Callable[..., Path], tmp_path: Path) -> None:
    files = {f"{n}.{name}": png(n) for n in range(3) for name in ("image.png", "mask.png")}
    path = write_tar("x.tar", files)
    with pytest.raises(UserError, match="3 samples have several images"):
        open_index([str(path)], tmp_path / "cache")
    image, mask = (
        open_index([str(path)], tmp_path / "cache", rules=ReadRules(f"{name}.png")) for name in ("image", "mask")
    )
    assert len(image) == len(mask) == 3
    assert image.folder != mask.folder
    assert image.fingerprint != mask.fingerprint
    assert beside(expand([str(path)]), "image.png") != beside(expand([str(path)]))
    with pytest.raises(UserError, match=r"has no images; an image is a file \.photo\.jpg; left out: image files with"):
        open_index([str(path)], tmp_path / "cache", rules=ReadRules("photo.jpg"))


def test_side_images_of_a_shard_without_its_images_are_refused_s04(
    write_tar: Callable[..., Path], tmp_path: Path
) -> None:
    whole = write_tar("a.tar", {f"{n}.{name}": png(n) for n in range(3) for name in ("png", "seg.png")})
    sides = write_tar("b.tar", {f"{n}.SEG.png": png(n) for n in range(3)})
    assert len(open_index([str(sides)], tmp_path / "cache")) == 3, "alone, they may be the images"
    with pytest.raises(
        UserError, match=rf"shard {sides} has no image but \.seg\.png files, the first: 0\.SEG\.png; in "
    ):
        open_index([str(whole), str(sides)], tmp_path / "cache")
    numbered = write_tar("c.tar", {f"cam.{n}.png": png(n) for n in range(3)})
    assert len(open_index([str(whole), str(numbered)], tmp_path / "cache")) == 6


@pytest.mark.parametrize("name", ["manifest.json", "samples.bin", "lock"])
def test_a_pipe_in_the_folder_of_an_index_is_never_waited_for_d17(
    make_shards: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    folder = make_shards([3])
    before = open_index([str(folder)], tmp_path / "cache")
    (before.folder / name).unlink()
    os.mkfifo(before.folder / name)
    assert open_index([str(folder)], tmp_path / "cache").records.tolist() == before.records.tolist()


def test_a_forged_part_of_an_interrupted_build_is_read_again_d17(
    make_shards: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_shards([3, 2])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(indexing, "save", interrupted)
        open_index([str(folder)], tmp_path / "cache")
    part, other = sorted(tmp_path.rglob("parts/*.bin"))
    part.write_bytes(b"\xff" * part.stat().st_size)
    other.with_suffix(".json").write_text("[" * 100_000)
    index = open_index([str(folder)], tmp_path / "cache")
    assert index.records.tolist() == open_index([str(folder)], tmp_path / "fresh").records.tolist()
