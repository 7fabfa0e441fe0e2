import gc
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import png
from PIL import Image

from mae.data.decode import decode
from mae.data.index import NO_LABEL, ImageReader, build_index
from mae.data.pack import Packed, Source, find_images, known_classes, shuffled, write_split
from mae.data.statistics import PixelStatistics, PixelSums, stored_statistics
from mae.errors import UserError
from mae.pipelines.pack import PackSettings, run

NOWHERE = Path("/nowhere")
CLASSES = ("ant", "bee", "cat")


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png(number, mode="RGB"))).save(buffer, format="JPEG")
    return buffer.getvalue()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """ant/ 0 3 6 9, bee/ 1 4 7 10 and cat/ 2 5 8 11: colour PNG files, with hidden and foreign files about."""
    root = tmp_path / "tree"
    for number in range(12):
        path = root / CLASSES[number % 3] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number, mode="RGB"))
    for hidden in (".DS_Store", "ant/._00.png", ".git/00.png", ".hidden.png"):
        (root / hidden).parent.mkdir(exist_ok=True)
        (root / hidden).write_bytes(b"x")
    (root / "README.txt").write_text("text")
    (root / "cat" / "Thumbs.db").write_text("text")
    return root


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """Nine gray PNG files in one folder."""
    root = tmp_path / "flat"
    root.mkdir()
    for number in range(9):
        (root / f"{number}.png").write_bytes(png(number))
    return root


def pack(source: Path | Source, out: Path, split: str = "train", **other: Any) -> Packed:
    found = source if isinstance(source, Source) else find_images(str(source), NOWHERE, known_classes(out))
    settings: dict[str, Any] = {
        "shard_samples": 5,
        "shard_bytes": 1e9,
        "provenance": False,
        "skip_bad": False,
        "workers": 0,
        "advance": lambda _: None,
    }
    return write_split(found.items, out, split, found.classes, **(settings | other))


def contents(tar: Path) -> dict[str, bytes]:
    with tarfile.open(tar) as file:
        return {m.name: file.extractfile(m).read() for m in file}  # type: ignore[union-attr]


def packed_files(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(out.iterdir())}


def statistics_of(images: list[bytes], channels: int) -> PixelStatistics:
    sums = PixelSums(channels)
    for image in images:
        sums.add(decode(image, channels))
    return sums.statistics()


def test_a_labelled_tree_becomes_shards_with_labels_and_untouched_bytes(tree: Path, tmp_path: Path) -> None:
    packed = pack(tree, tmp_path / "out")
    assert packed.filenames == [f"train-00000{n}.tar" for n in range(3)]
    assert packed.shard_lengths == [5, 5, 2]
    assert (packed.samples, packed.bad) == (12, [])
    index = build_index([str(tmp_path / "out")], NOWHERE)
    assert index.keys == tuple(f"{n:09d}.png" for n in range(12))
    assert index.label.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    numbers = [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]
    assert [ImageReader(index).read(n) for n in range(12)] == [png(n, mode="RGB") for n in numbers]
    assert (tmp_path / "out" / "classes.txt").read_text() == "ant\nbee\ncat\n"


def test_hidden_files_are_passed_over_and_other_files_are_reported(tree: Path) -> None:
    found = find_images(str(tree), NOWHERE)
    assert found.ignored == ("README.txt", "cat/Thumbs.db")
    assert len(found.items) == 12
    assert found.classes == CLASSES


def test_images_in_deeper_folders_belong_to_the_topmost_class(tree: Path) -> None:
    (tree / "bee" / "old" / "x").mkdir(parents=True)
    shutil.move(tree / "bee" / "01.png", tree / "bee" / "old" / "x" / "01.png")
    labels = {item.name: item.label for item in find_images(str(tree), NOWHERE).items}
    assert labels["bee/old/x/01.png"] == 1


def test_a_flat_folder_has_no_labels(flat: Path, tmp_path: Path) -> None:
    pack(flat, tmp_path / "out")
    index = build_index([str(tmp_path / "out")], NOWHERE)
    assert set(index.label.tolist()) == {NO_LABEL}
    assert [ImageReader(index).read(n) for n in range(9)] == [png(n) for n in range(9)]
    assert not (tmp_path / "out" / "classes.txt").exists()
    entry = json.loads((tmp_path / "out" / "_info.json").read_text())["splits"]["train"]
    assert "samples_per_class" not in entry


def test_shards_are_packed_again_with_their_side_files(write_tar: Callable[..., Path], tmp_path: Path) -> None:
    files = {
        "x/a.cls": b"2",
        "x/a.jpg": jpeg(0),
        "x/a.seg.png": png(5),
        "x/a.txt": b"a caption\n",
        "b.png": png(1),
        "b.json": b'{"id": 1}',
        ".hidden.png": b"x",
    }
    source = write_tar("source/in.tar", files)
    packed = pack(source, tmp_path / "out")
    assert packed.labels == [2, NO_LABEL]
    assert contents(tmp_path / "out" / "train-000000.tar") == {
        "000000000.cls": b"2",
        "000000000.jpg": files["x/a.jpg"],
        "000000000.seg.png": files["x/a.seg.png"],
        "000000000.txt": files["x/a.txt"],
        "000000001.json": files["b.json"],
        "000000001.png": files["b.png"],
    }


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/in-{0..1}.tar"])
def test_shards_are_named_by_folder_glob_or_braces(
    write_tar: Callable[..., Path], tmp_path: Path, pattern: str
) -> None:
    for number in range(2):
        write_tar(f"source/in-{number}.tar", {f"{number}.png": png(number)})
    (tmp_path / "source" / "classes.txt").write_text("one\ntwo")
    found = find_images(f"{tmp_path}/source{pattern}", NOWHERE)
    assert [item.name for item in found.items] == ["in-0.tar/0", "in-1.tar/1"]
    assert found.classes == ("one", "two")


def test_info_holds_counts_mean_and_deviation(tree: Path, tmp_path: Path) -> None:
    packed = pack(tree, tmp_path / "out")
    entry = json.loads((tmp_path / "out" / "_info.json").read_text())["splits"]["train"]
    expected = statistics_of([png(n, mode="RGB") for n in range(12)], 3)
    assert entry == {
        "name": "train",
        "num_samples": 12,
        "filenames": packed.filenames,
        "shard_lengths": [5, 5, 2],
        "samples_per_class": [4, 4, 4],
        "mean": list(expected.mean),
        "std": list(expected.std),
    }
    assert packed.statistics == expected
    assert stored_statistics([tmp_path / "out" / name for name in packed.filenames], 3) == expected


def test_a_gray_set_has_statistics_of_one_channel(flat: Path, tmp_path: Path) -> None:
    assert pack(flat, tmp_path / "gray").statistics == statistics_of([png(n) for n in range(9)], 1)
    (flat / "colour.png").write_bytes(png(9, mode="RGB"))
    mixed = pack(flat, tmp_path / "mixed").statistics
    assert mixed == statistics_of([*(png(n) for n in range(9)), png(9, mode="RGB")], 3)


def test_npy_arrays_are_measured_in_all_their_channels(tmp_path: Path) -> None:
    arrays = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 5), dtype=np.uint8)
    (tmp_path / "in").mkdir()
    for number, array in enumerate(arrays):
        np.save(tmp_path / "in" / f"{number}.npy", array)
    found = pack(tmp_path / "in", tmp_path / "out").statistics
    assert found is not None
    assert found.mean == pytest.approx(arrays.mean(axis=(0, 1, 2)) / 255)
    assert found.std == pytest.approx(arrays.std(axis=(0, 1, 2)) / 255)


# webdataset leaves the shards that it reads to the garbage collector.
leaves_files_open = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@leaves_files_open
def test_timm_reads_images_labels_and_lengths(tree: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Also of .JPEG files, as ImageNet has them: timm looks for jpg, png and webp alone."""
    from timm.data import create_dataset

    for number in range(12, 15):
        (tree / CLASSES[number % 3] / f"{number}.JPEG").write_bytes(jpeg(number))
    pack(tree, tmp_path / "out", "train")
    pack(tree, tmp_path / "out", "val")
    for split in ("train", "val"):
        dataset = create_dataset("wds/any", root=str(tmp_path / "out"), split=split, is_training=False, batch_size=4)
        assert len(dataset) == 15
        found = [(np.asarray(image.convert("RGB")).tobytes(), label) for image, label in dataset]
        assert found == [
            (np.asarray(Image.open(path).convert("RGB")).tobytes(), label)
            for label, name in enumerate(CLASSES)
            for path in sorted((tree / name).glob("[0-9]*"))
        ]
    assert "error" not in capfd.readouterr().err
    del dataset
    gc.collect()


@leaves_files_open
def test_webdataset_reads_the_shards_back(tree: Path, tmp_path: Path) -> None:
    import webdataset

    packed = pack(tree, tmp_path / "out")
    names = [str(tmp_path / "out" / name) for name in packed.filenames]
    samples = list(webdataset.WebDataset(names, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{n:09d}" for n in range(12)]
    assert [int(sample["cls"]) for sample in samples] == packed.labels
    assert samples[0]["png"] == png(0, mode="RGB")
    gc.collect()


def test_a_second_split_uses_the_class_list_of_the_first(tree: Path, tmp_path: Path) -> None:
    pack(tree, tmp_path / "out")
    shutil.rmtree(tree / "ant")
    assert set(pack(tree, tmp_path / "out", "val").labels) == {1, 2}
    assert (tmp_path / "out" / "classes.txt").read_text() == "ant\nbee\ncat\n"
    splits = json.loads((tmp_path / "out" / "_info.json").read_text())["splits"]
    assert [(name, entry["num_samples"]) for name, entry in splits.items()] == [("train", 12), ("val", 8)]


def test_a_class_that_the_first_split_lacks_is_refused(tree: Path, tmp_path: Path) -> None:
    pack(tree, tmp_path / "out")
    (tree / "cow").mkdir()
    (tree / "cow" / "0.png").write_bytes(png(0))
    with pytest.raises(UserError, match=r"classes that the packed classes\.txt does not list: cow"):
        pack(tree, tmp_path / "out", "val")


def test_a_class_list_without_a_last_newline_is_whole(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("cat\nbee\nant")
    assert known_classes(tmp_path) == ("cat", "bee", "ant")
    found = find_images(str(tree), NOWHERE, known_classes(tmp_path))
    assert {item.name[:3]: item.label for item in found.items} == {"cat": 0, "bee": 1, "ant": 2}


def test_shards_of_another_class_list_are_refused(tree: Path, flat: Path, tmp_path: Path) -> None:
    """Their labels mean other classes; writing their list would rename those of the first split."""
    pack(tree, tmp_path / "one")
    (tree / "ant").rename(tree / "dog")
    pack(tree, tmp_path / "other")
    before = packed_files(tmp_path / "one")
    with pytest.raises(UserError, match=r"other/classes\.txt and the packed classes\.txt list different classes"):
        pack(tmp_path / "other", tmp_path / "one", "val")
    assert packed_files(tmp_path / "one") == before
    pack(flat, tmp_path / "unnamed")
    pack(tmp_path / "unnamed", tmp_path / "one", "val")
    assert known_classes(tmp_path / "one") == CLASSES


def test_the_same_split_twice_is_refused(flat: Path, tmp_path: Path) -> None:
    pack(flat, tmp_path / "out")
    before = packed_files(tmp_path / "out")
    with pytest.raises(UserError, match="holds a split 'train' already; give another --split or another --out"):
        pack(flat, tmp_path / "out")
    (tmp_path / "out" / "_info.json").unlink()
    with pytest.raises(UserError, match="holds a split 'train' already"):
        pack(flat, tmp_path / "out")
    del before["_info.json"]
    assert packed_files(tmp_path / "out") == before


def test_a_split_may_begin_with_the_name_of_another(flat: Path, tmp_path: Path) -> None:
    pack(flat, tmp_path / "out", "train-extra")
    assert pack(flat, tmp_path / "out", "train").samples == 9


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_named_and_nothing_is_left_behind(flat: Path, tmp_path: Path, workers: int) -> None:
    (flat / "3.png").write_bytes(png(3)[:60])
    (flat / "5.png").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"2 of 9 images are bad: 3\.png \(.*; 5\.png \(.*nothing was packed.*--skip_bad"
    ):
        pack(flat, tmp_path / "out", workers=workers)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_left_out_and_listed_if_asked_for(flat: Path, tmp_path: Path, workers: int) -> None:
    (flat / "3.png").write_bytes(b"<html>")
    (flat / os.fsdecode(b"4\xff.png")).write_bytes(b"not UTF-8")
    packed = pack(flat, tmp_path / "out", skip_bad=True, workers=workers)
    assert packed.samples == 8
    listed = (tmp_path / "out" / "train-bad-images.txt").read_bytes().splitlines()
    assert [line.split(b" ")[0] for line in listed] == [b"3.png", b"4\xff.png"]
    index = build_index([str(tmp_path / "out")], NOWHERE)
    assert index.keys == tuple(f"{n:09d}.png" for n in range(8))
    assert packed.statistics == statistics_of([png(n) for n in range(9) if n != 3], 1)


def test_classes_need_not_be_utf8(tmp_path: Path) -> None:
    for name in (b"caf\xe9", b"tea"):
        folder = tmp_path / "in" / os.fsdecode(name)
        folder.mkdir(parents=True)
        (folder / "0.png").write_bytes(png(0))
    pack(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out" / "classes.txt").read_bytes() == b"caf\xe9\ntea\n"
    assert pack(tmp_path / "in", tmp_path / "out", "val").labels == [0, 1]


def test_nothing_but_bad_images_is_refused_even_so(flat: Path, tmp_path: Path) -> None:
    for path in flat.iterdir():
        path.write_bytes(b"x")
    with pytest.raises(UserError, match="no image could be packed: all are bad"):
        pack(flat, tmp_path / "out", skip_bad=True)
    assert list((tmp_path / "out").iterdir()) == []


def test_packing_twice_gives_equal_files_for_any_number_of_workers(tree: Path, tmp_path: Path) -> None:
    (tree / "ant" / "bad.png").write_bytes(b"<html>")
    found = find_images(str(tree), NOWHERE)
    source = Source(shuffled(found.items * 10, seed=0), found.classes)  # three chunks of work
    for name, workers in (("a", 0), ("b", 0), ("c", 2)):
        pack(source, tmp_path / name, skip_bad=True, workers=workers)
    assert packed_files(tmp_path / "a") == packed_files(tmp_path / "b") == packed_files(tmp_path / "c")


def test_shuffling_is_keyed_and_loses_nothing(tree: Path) -> None:
    items = find_images(str(tree), NOWHERE).items
    orders = [shuffled(items, seed) for seed in range(4)]
    assert all(sorted(order) == sorted(items) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert shuffled(items, 2) == orders[2]


def test_shards_end_after_so_many_bytes(tree: Path, tmp_path: Path) -> None:
    packed = pack(tree, tmp_path / "out", shard_samples=100, shard_bytes=3.0 * len(png(0, mode="RGB")))
    assert len(packed.filenames) > 2
    assert sum(packed.shard_lengths) == 12


def test_provenance_is_stored_beside_each_image(tree: Path, tmp_path: Path) -> None:
    pack(tree, tmp_path / "out", provenance=True)
    assert json.loads(contents(tmp_path / "out" / "train-000000.tar")["000000001.json"]) == {"source": "ant/03.png"}


def test_provenance_never_replaces_a_side_file(write_tar: Callable[..., Path], tmp_path: Path) -> None:
    source = write_tar("source/in.tar", {"a.png": png(0), "a.json": b"{}"})
    with pytest.raises(UserError, match=r"in\.tar/a has a \.json file already"):
        pack(source, tmp_path / "out", provenance=True)
    assert list((tmp_path / "out").iterdir()) == []


def test_progress_is_told_of_every_image(flat: Path, tmp_path: Path) -> None:
    done: list[int] = []
    pack(flat, tmp_path / "out", advance=done.append)
    assert sum(done) == 9


def test_an_out_folder_may_have_any_name(flat: Path, tmp_path: Path) -> None:
    out = tmp_path / "50% {of} *it* %d %%"
    assert pack(flat, out).samples == 9
    assert len(contents(out / "train-000000.tar")) == 5


def test_images_beside_folders_of_images_are_refused(tree: Path) -> None:
    (tree / "stray.png").write_bytes(png(0))
    with pytest.raises(UserError, match=r"mixes 1 images beside 12 in folders \(the first is stray\.png\)"):
        find_images(str(tree), NOWHERE)


def test_a_source_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(UserError, match=r"holds no image \(\.jpg, "):
        find_images(str(tmp_path), NOWHERE)
    with pytest.raises(UserError, match="do not exist"):
        find_images(str(tmp_path / "none"), NOWHERE)


def test_an_out_folder_that_cannot_be_written_is_named(flat: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"file/out cannot be written: Not a directory"):
        pack(flat, tmp_path / "file" / "out")


def test_a_leftover_of_a_killed_run_is_replaced(flat: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / ".train.part").mkdir(parents=True)
    (tmp_path / "out" / ".train.part" / "train-000000.tar").write_bytes(b"half")
    assert pack(flat, tmp_path / "out").samples == 9
    assert sorted(packed_files(tmp_path / "out")) == ["_info.json", "train-000000.tar", "train-000001.tar"]


def test_the_pipeline_packs_a_tree_and_says_what_it_did(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = run(PackSettings(str(tree), tmp_path / "out", shard_samples=7, workers=0))
    assert packed["train"].shard_lengths == [7, 5]
    assert sorted(packed["train"].labels) == [0] * 4 + [1] * 4 + [2] * 4
    assert packed["train"].labels != sorted(packed["train"].labels)
    said = capsys.readouterr().out
    assert "2 files are no images and stay out, the first: README.txt" in said
    assert "train: 12 images in 2 shards" in said
    assert "3 classes" in said
