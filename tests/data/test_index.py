"""The index on disk is used only if it is whole and describes the shards as they are."""

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import png

from mae.data.index import FORMAT, ShardEntry, ShardIndex, StaleIndexError, fingerprint, load, save, save_pixels
from mae.data.scan import NO_LABEL, RECORD, ShardScan, scan
from mae.data.statistics import PixelStatistics
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
    assert index.entries[1].ignored == 2


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


def labelled(folder: Path, shards: list[Shard], labels: list[int]) -> ShardIndex:
    records = np.zeros(8, dtype=RECORD)
    records["label"] = labels
    return replace(load(folder, shards), records=records)


def test_class_count_is_one_more_than_the_greatest_label(shards: list[Shard], folder: Path) -> None:
    assert labelled(folder, shards, [2, 0, 0, 0, 5, 0, 0, 1]).class_count() == 6


def test_class_count_names_the_first_sample_without_a_label_s14(shards: list[Shard], folder: Path) -> None:
    index = labelled(folder, shards, [2, 0, 0, 1, 5, NO_LABEL, 0, NO_LABEL])
    with pytest.raises(
        UserError, match=r"2 of 8 samples have no \.cls label; the first is image number 1 of .*train-000002\.tar; "
    ):
        index.class_count()
