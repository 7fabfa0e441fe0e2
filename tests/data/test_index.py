"""The index on disk is used only if it is whole and describes the shards as they are."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import png

from mae.data import manifest
from mae.data.index import ShardIndex, load, save, save_pixels
from mae.data.manifest import FORMAT, ShardEntry, StaleIndexError, fingerprint
from mae.data.scan import NO_LABEL, RECORD, ShardScan, scan
from mae.data.statistics import PixelStatistics
from mae.data.store import regular
from mae.data.store.shards import Shard, expand
from mae.errors import UserError


def sample(number: int, label: int | None = None) -> dict[str, bytes]:
    return {f"{number:06d}.png": png(number)} | ({} if label is None else {f"{number:06d}.cls": str(label).encode()})


def save_all(folder: Path, shards: list[Shard]) -> list[ShardScan]:
    """Scan the shards and save their index."""
    folder.mkdir(parents=True, exist_ok=True)
    found = [scan(Path(shard.url)) for shard in shards]
    parts = [folder / f"{number}.part" for number in range(len(shards))]
    for part, shard in zip(parts, found, strict=True):
        shard.records.tofile(part)
    save(folder, [ShardEntry.of(shard, part) for shard, part in zip(shards, found, strict=True)], parts)
    return found


@pytest.fixture
def shards(make_shards: Callable[..., Path]) -> list[Shard]:
    """8 samples with the labels n % 3 in three shards."""
    return expand([str(make_shards([3, 1, 4], classes=3))])


@pytest.fixture
def folder(shards: list[Shard], tmp_path: Path) -> Path:
    """The index of `shards`."""
    save_all(tmp_path / "index", shards)
    return tmp_path / "index"


def test_what_was_saved_is_loaded(shards: list[Shard], tmp_path: Path) -> None:
    found = save_all(tmp_path / "index", shards)
    index = load(tmp_path / "index", shards)
    assert len(index) == 8
    assert index.records.tolist() == np.concatenate([scan.records for scan in found]).tolist()
    assert index.label.tolist() == [n % 3 for n in range(8)]
    assert index.starts.tolist() == [0, 3, 4, 8]
    assert index.shard_of(np.arange(8)).tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    assert [entry.shard for entry in index.entries] == shards
    assert [entry.extensions for entry in index.entries] == [{"png": n, "cls": n} for n in (3, 1, 4)]
    assert (index.pixels, index.pixels_of, index.bad(), index.without_image()) == (None, 0, [], [])
    assert index.fingerprint == fingerprint(index.entries)


def test_faults_of_the_samples_are_kept_with_the_names_of_their_shards(
    write_tar: Callable[..., Path], tmp_path: Path
) -> None:
    good = write_tar("good.tar", sample(0))
    bad = write_tar("bäd.tar", sample(1) | {"a.jpg": b"<html>", "b.cls": b"1", ".hidden": b""})
    shards = expand([str(good), str(bad)])
    save_all(tmp_path / "index", shards)
    index = load(tmp_path / "index", shards)
    assert index.bad() == [f"{bad}: a.jpg (it begins with b'<html>', unlike any allowed image format)"]
    assert index.without_image() == [f"{bad}: b"]
    assert index.entries[1].left_out == {"hidden files": (1, ".hidden"), "files without an image": (1, "b.cls")}
    assert index.left_out()["hidden files"] == (1, f"{bad}: .hidden")


def test_names_that_are_no_utf8_survive(write_tar: Callable[..., Path], tmp_path: Path) -> None:
    import tarfile

    path = write_tar("x.tar", {"\udce4.jpg": b"", "\udcf6.cls": b"1"}, tarfile.GNU_FORMAT)
    shards = expand([str(path)])
    save_all(tmp_path / "index", shards)
    index = load(tmp_path / "index", shards)
    assert index.bad() == [f"{path}: \udce4.jpg (it is empty)"]
    assert index.without_image() == [f"{path}: \udcf6"]


def test_mean_and_deviation_are_stored_with_the_index(shards: list[Shard], folder: Path) -> None:
    pixels = PixelStatistics((1 / 3, 0.1, 0.7), (0.2, 1 / 7, 0.25))
    before = load(folder, shards)
    index = save_pixels(before, pixels, 7)
    for found in (index, load(folder, shards)):
        assert (found.pixels, found.pixels_of) == (pixels, 7)
        assert (found.fingerprint, found.entries) == (before.fingerprint, before.entries)
    save_pixels(index, None, 8)
    assert (load(folder, shards).pixels, load(folder, shards).pixels_of) == (None, 8)


def test_records_are_mapped_from_disk_and_cannot_be_changed(shards: list[Shard], folder: Path) -> None:
    records = load(folder, shards).records
    assert isinstance(records, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        records["label"][0] = 1


def test_another_process_maps_the_same_file(shards: list[Shard], folder: Path) -> None:
    index = load(folder, shards)
    copy = pickle.loads(pickle.dumps(index))
    assert len(pickle.dumps(index)) < 2000
    assert (copy.records.tolist(), copy.entries) == (index.records.tolist(), index.entries)
    program = "import pickle, sys; i = pickle.load(sys.stdin.buffer); print(i.records.filename, i.label, i.fingerprint)"
    done = subprocess.run([sys.executable, "-c", program], input=pickle.dumps(index), capture_output=True, check=True)
    assert done.stdout.decode().strip() == f"{folder}/samples.bin {index.label} {index.fingerprint}"


def damaged(folder: Path, shards: list[Shard], name: str, data: bytes) -> str:
    """Why the index is not used when one of its files holds `data` instead."""
    whole = (folder / name).read_bytes()
    assert data != whole
    (folder / name).write_bytes(data)
    with pytest.raises(StaleIndexError) as caught:
        load(folder, shards)
    (folder / name).write_bytes(whole)
    return str(caught.value)


def test_a_flipped_bit_anywhere_in_the_records_is_found_d17(shards: list[Shard], folder: Path) -> None:
    whole = (folder / "samples.bin").read_bytes()
    for position in range(len(whole)):
        flipped = bytes([whole[position] ^ 1 << position % 8])
        why = damaged(folder, shards, "samples.bin", whole[:position] + flipped + whole[position + 1 :])
        assert why.startswith("samples.bin is damaged: its crc32 is ")


def test_another_character_anywhere_in_the_manifest_is_found_d17(shards: list[Shard], folder: Path) -> None:
    """Every digit and letter of a value; the mean that pixels are normalised with is one of them."""
    save_pixels(load(folder, shards), PixelStatistics((0.25,), (0.5,)), 8)
    whole = (folder / "manifest.json").read_bytes()
    for position in range(len(whole)):
        if whole[position : position + 1].isalnum():
            other = b"1" if whole[position : position + 1] != b"1" else b"2"
            damaged(folder, shards, "manifest.json", whole[:position] + other + whole[position + 1 :])
    assert load(folder, shards).pixels == PixelStatistics((0.25,), (0.5,))


@pytest.mark.parametrize("name", ["samples.bin", "manifest.json"])
def test_a_cut_or_lengthened_file_is_found_d17(shards: list[Shard], folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    for length in [*range(0, len(whole), 37), len(whole) - 1]:
        damaged(folder, shards, name, whole[:length])
    damaged(folder, shards, name, whole + b"x")
    damaged(folder, shards, name, bytes(len(whole)))


@pytest.mark.parametrize("name", ["samples.bin", "manifest.json"])
def test_a_missing_file_is_found_d17(shards: list[Shard], folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(StaleIndexError, match=r"there is no index|samples\.bin cannot be read: No such file"):
        load(folder, shards)


def test_another_format_is_named_d17(shards: list[Shard], folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": FORMAT + 1}))
    with pytest.raises(StaleIndexError, match=f"it has format {FORMAT + 1}, but this version needs format {FORMAT}"):
        load(folder, shards)


@pytest.mark.parametrize("text", ["[]", "{}", "null", "{", "\0" * 50])
def test_a_manifest_of_something_else_is_found_d17(shards: list[Shard], folder: Path, text: str) -> None:
    assert damaged(folder, shards, "manifest.json", text.encode()).startswith("manifest.json is damaged")


def test_files_of_two_indexes_do_not_make_one_d17(
    shards: list[Shard], folder: Path, make_shards: Callable[..., Path], tmp_path: Path
) -> None:
    """As a crash between the two renames of a rebuild would leave them."""
    save_all(tmp_path / "other", expand([str(make_shards([3, 1, 4], name="other", classes=2))]))
    assert "crc32" in damaged(folder, shards, "samples.bin", (tmp_path / "other" / "samples.bin").read_bytes())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda shards: shards[:2], "it lists 3 shards, but there are 2"),
        (lambda shards: shards[::-1], "its name was train-000000.tar and is now train-000002.tar"),
        (lambda shards: [shards[0]._replace(size=1), *shards[1:]], r"its size was \d+ and is now 1$"),
        (
            lambda shards: [*shards[:2], shards[2]._replace(version="7")],
            r"train-000002\.tar .*its version was \d+ and is now 7$",
        ),
    ],
    ids=["fewer", "order", "size", "time"],
)
def test_other_shards_are_named_with_both_values_d11(
    shards: list[Shard], folder: Path, change: Callable[[list[Shard]], list[Shard]], why: str
) -> None:
    with pytest.raises(StaleIndexError, match=why):
        load(folder, change(shards))


def test_moved_shards_keep_their_index_and_fingerprint(shards: list[Shard], folder: Path, tmp_path: Path) -> None:
    before = load(folder, shards)
    moved = tmp_path / "elsewhere"
    shutil.copytree(Path(shards[0].url).parent, moved)  # with their times
    after = load(folder, expand([str(moved)]))
    assert after.fingerprint == before.fingerprint
    assert [entry.url for entry in after.entries] == [f"{moved}/train-{n:06d}.tar" for n in range(3)]


def test_the_fingerprint_depends_on_content_order_and_labels_only(
    write_tar: Callable[..., Path], tmp_path: Path
) -> None:
    a, b, c = sample(0, 0), sample(1, 1), sample(2, 0)
    sets = {
        "original": [a | b | c],
        "order": [b | a | c],
        "label": [a | b | sample(2, 1)],
        "cut into shards": [a | b, c],
        "cut elsewhere": [a, b | c],
        "order of shards": [b | c, a],
    }
    found = {}
    for name, contents in sets.items():
        shards = expand([str(write_tar(f"{name}/{n}.tar", files)) for n, files in enumerate(contents)])
        save_all(tmp_path / "index" / name, shards)
        found[name] = load(tmp_path / "index" / name, shards).fingerprint
    assert len(set(found.values())) == len(sets)
    shards = expand([str(write_tar("again and elsewhere.tar", a | b | c))])
    save_all(tmp_path / "again", shards)
    assert load(tmp_path / "again", shards).fingerprint == found["original"]


def written(folder: Path, **changed: Any) -> None:
    """Change values of the manifest, and seal it again, as a forger would."""
    path = folder / "manifest.json"
    values = json.loads(path.read_text()) | changed
    del values["sha256"]
    path.write_text(json.dumps(values | {"sha256": manifest._seal(values)}))


def stale(folder: Path, shards: list[Shard], why: str) -> None:
    with pytest.raises(StaleIndexError, match=why):
        load(folder, shards)


@pytest.mark.parametrize(
    "change",
    [
        {"samples": -8}, {"samples": "8"}, {"samples": 9}, {"samples": None}, {"samples": 8.0},
        {"records_crc32": "1"}, {"records_crc32": -1}, {"pixels_of": "many"}, {"pixels_of": -1},
        {"mean": 5, "std": 5}, {"mean": ["a"], "std": ["b"]}, {"mean": [0.5], "std": [0]}, {"mean": [0.5], "std": []},
        {"mean": [float("nan")], "std": [0.5]}, {"mean": [0.5]}, {"mean": {}, "std": {}},
        {"fingerprint": "0"}, {"shards": {}}, {"shards": [1, 2, 3]}, {"shards": None}, {"shards": [[]] * 3},
        {"image_extension": 3},
    ],
    ids=repr,
)  # fmt: skip
def test_a_forged_manifest_is_not_used_d17(shards: list[Shard], folder: Path, change: dict[str, Any]) -> None:
    written(folder, **change)
    stale(folder, shards, "manifest.json is damaged: |it was made with")


@pytest.mark.parametrize(
    "change",
    [
        {"samples": -1}, {"samples": "3"}, {"size": 1.5}, {"size": True}, {"url": 7}, {"version": None}, {"digest": []},
        {"bad": 3}, {"bad": [3]}, {"without_image": [None]}, {"extensions": [["png", 3]]}, {"extensions": {"png": -3}},
        {"left_out": {"links": 3}}, {"left_out": {"links": [1, 2]}}, {"left_out": {"links": ["1", "a"]}},
        {"left_out": 3}, {"more": 1},
    ],
    ids=repr,
)  # fmt: skip
def test_a_forged_entry_of_a_shard_is_not_used_d17(shards: list[Shard], folder: Path, change: dict[str, Any]) -> None:
    entries = json.loads((folder / "manifest.json").read_text())["shards"]
    written(folder, shards=[entries[0] | change, *entries[1:]])
    stale(folder, shards, "manifest.json is damaged: ")


def forge(folder: Path, field: str, value: int) -> None:
    """Write a value into the record of the fifth sample, with the checksum that belongs to it."""
    records = np.fromfile(folder / "samples.bin", RECORD)
    records[field][5] = value
    (folder / "samples.bin").write_bytes(records.tobytes())
    written(folder, records_crc32=zlib.crc32(records.tobytes()))


@pytest.mark.parametrize(
    ("field", "value"),
    [("offset", 0), ("offset", 511), ("offset", 2**64 - 1), ("offset", 2**40), ("size", 2**32 - 1), ("label", -2)],
)
def test_a_record_outside_its_shard_is_not_used_d17(shards: list[Shard], folder: Path, field: str, value: int) -> None:
    forge(folder, field, value)
    stale(folder, shards, "samples.bin is damaged: an image of .*train-000002.tar lies outside it")


@pytest.mark.parametrize("name", ["samples.bin", "manifest.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "device"])
def test_what_is_no_regular_file_is_not_used_and_never_waited_for_d17(
    shards: list[Shard], folder: Path, name: str, kind: str
) -> None:
    path = folder / name
    path.unlink()
    make: dict[str, Callable[[], object]] = {
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "loop": lambda: path.symlink_to(name),
        "device": lambda: path.symlink_to("/dev/zero"),
    }
    make[kind]()
    stale(folder, shards, f"{name} is not a regular file|{name} cannot be read|manifest.json is damaged: ")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"format": ' + "9" * 5000 + "}"])
def test_a_manifest_that_is_deep_or_endless_is_not_used_d17(shards: list[Shard], folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    stale(folder, shards, "manifest.json is damaged: ")


def test_a_manifest_that_is_too_large_is_not_read_d17(
    shards: list[Shard], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regular, "_MAX_JSON_BYTES", 100)
    stale(folder, shards, r"manifest\.json is damaged: .*it holds more than 100 bytes")


def labelled(folder: Path, shards: list[Shard], labels: list[int]) -> ShardIndex:
    records = np.zeros(8, dtype=RECORD)
    records["label"] = labels
    return replace(load(folder, shards), records=records)


def test_class_count_is_one_more_than_the_greatest_label(shards: list[Shard], folder: Path) -> None:
    assert labelled(folder, shards, [2, 0, 0, 0, 5, 0, 0, 1]).class_count() == 6


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            [0, 1, 2, 0, 1, 2, 0, 99999],
            "go up to 99999, but only 4 of these 100000 classes .* 99996 have none, the first is 3;",
        ),
        ([0, 1, 2, 0, 1, 2, 0, 999999999999], "the first is 3; number the labels from 0 without gaps"),
        ([141, 141, 141, 141, 141, 141, 141, 142], "the first is 0;"),
    ],
)
def test_class_count_refuses_labels_with_large_gaps(
    shards: list[Shard], folder: Path, labels: list[int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        labelled(folder, shards, labels).class_count()


def test_class_count_allows_classes_that_have_names_or_few_that_have_no_samples(
    shards: list[Shard], folder: Path
) -> None:
    index = labelled(folder, shards, [0, 1, 2, 0, 1, 2, 0, 139])
    assert index.class_count() == 140
    assert index.class_count([str(n) for n in range(100_000)]) == 100_000
    with pytest.raises(UserError, match="label 139 has no name: there are 3 class names, for the labels 0 to 2"):
        index.class_count(["a", "b", "c"])


def test_class_count_names_the_first_label_that_is_no_number(write_tar: Callable[..., Path], tmp_path: Path) -> None:
    files = sample(0, 1) | {"1.png": png(1), "1.cls": b"cat", "2.png": png(2), "2.cls": b"-1"}
    shards = expand([str(write_tar("x.tar", files))])
    save_all(tmp_path / "index", shards)
    with pytest.raises(
        UserError, match=r"2 of 3 samples .*; 2 have labels that are no integer >= 0 .*: 1\.cls is b'cat'; "
    ):
        load(tmp_path / "index", shards).class_count()


def test_another_image_extension_is_another_index(shards: list[Shard], folder: Path) -> None:
    with pytest.raises(StaleIndexError, match=r"it was made with image_extension None, not seg\.png"):
        load(folder, shards, "seg.png")


def test_class_count_names_the_first_sample_without_a_label_s14(shards: list[Shard], folder: Path) -> None:
    index = labelled(folder, shards, [2, 0, 0, 1, 5, NO_LABEL, 0, NO_LABEL])
    with pytest.raises(
        UserError,
        match=r"2 of 8 samples have no valid \.cls label; the first is image number 1 of .*train-000002\.tar; ",
    ):
        index.class_count()
