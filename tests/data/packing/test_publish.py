import gc
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import png
from PIL import Image

from data.packing.packs import images_of, jpeg, pack, packed_files, planned, statistics_of
from mae.data.indexing import open_index
from mae.data.packing import publish as module
from mae.data.packing.class_list import known_classes
from mae.data.packing.engines import process_engine
from mae.data.packing.pack import pack_shards
from mae.data.packing.publish import publish
from mae.data.statistics import stored_statistics
from mae.data.store.shards import expand
from mae.errors import UserError

CLASSES = ("ant", "bee", "cat")
AS_LISTED = [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]


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
    assert stored_statistics(expand([str(tmp_path / "out")]), 3) == expected


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


def test_the_index_beside_the_shards_is_the_one_that_indexing_would_make(tree: Path, tmp_path: Path) -> None:
    (tree / "bee" / "bad.png").write_bytes(b"<html>")
    pack(tree, tmp_path / "out", skip_bad=True)
    said: list[str] = []
    found = open_index([str(tmp_path / "out")], tmp_path / "cache", say=said.append)
    assert said == []
    assert not (tmp_path / "cache").exists()
    made = open_index([str(tmp_path / "out")], tmp_path / "cache", folder=tmp_path / "index")
    assert found.entries == made.entries
    assert np.array_equal(found.records, made.records)
    assert (found.fingerprint, found.pixels, found.pixels_of) == (made.fingerprint, made.pixels, 12)


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
    assert [int(sample["cls"]) for sample in samples] == [n % 3 for n in AS_LISTED]
    assert samples[0]["png"] == png(0, mode="RGB")
    gc.collect()


def test_a_second_split_uses_the_class_list_of_the_first(tree: Path, tmp_path: Path) -> None:
    pack(tree, tmp_path / "out")
    shutil.rmtree(tree / "ant")
    assert pack(tree, tmp_path / "out", "val").samples_per_class == [0, 4, 4]
    assert (tmp_path / "out" / "classes.txt").read_text() == "ant\nbee\ncat\n"
    splits = json.loads((tmp_path / "out" / "_info.json").read_text())["splits"]
    assert [(name, entry["num_samples"]) for name, entry in splits.items()] == [("train", 12), ("val", 8)]


def test_splits_of_other_classes_packed_at_once_are_refused(tree: Path, tmp_path: Path) -> None:
    """Both were planned before either had written its class list."""
    plan = planned(tree, tmp_path / "out")
    shutil.copytree(tree / "cat", tmp_path / "other" / "cow")
    pack(tmp_path / "other", tmp_path / "out", "val")
    pack_shards(plan, range(plan.shards), process_engine(0), lambda images, size: None)
    with pytest.raises(UserError, match=r"classes\.txt has changed since this pack started"):
        publish(plan, skip_bad=False)
    assert known_classes(tmp_path / "out") == ("cow",)


def test_shards_of_another_class_list_are_refused(tree: Path, flat: Path, tmp_path: Path) -> None:
    """Their labels mean other classes; writing their list would rename those of the first split."""
    pack(tree, tmp_path / "one")
    (tree / "ant").rename(tree / "dog")
    pack(tree, tmp_path / "other")
    before = packed_files(tmp_path / "one")
    with pytest.raises(
        UserError, match=r"other/classes\.txt and .*one/classes\.txt list different classes: label 0 is 'bee'"
    ):
        pack(tmp_path / "other", tmp_path / "one", "val")
    assert packed_files(tmp_path / "one") == before
    pack(flat, tmp_path / "unnamed")
    pack(tmp_path / "unnamed", tmp_path / "one", "val")
    assert known_classes(tmp_path / "one") == CLASSES


def test_the_same_split_twice_is_refused(flat: Path, tmp_path: Path) -> None:
    pack(flat, tmp_path / "out")
    before = packed_files(tmp_path / "out")
    with pytest.raises(UserError, match="already contains a split 'train', which is complete"):
        pack(flat, tmp_path / "out")
    (tmp_path / "out" / "_info.json").unlink()
    with pytest.raises(UserError, match="already contains a split 'train'; choose another --split or another --out"):
        pack(flat, tmp_path / "out")
    del before["_info.json"]
    assert packed_files(tmp_path / "out") == before


def test_a_split_may_begin_with_the_name_of_another(flat: Path, tmp_path: Path) -> None:
    pack(flat, tmp_path / "out", "train-extra")
    assert pack(flat, tmp_path / "out", "train").samples == 9


@pytest.mark.parametrize("workers", [0, 2])
def test_s01_bad_images_are_named_and_nothing_is_published(flat: Path, tmp_path: Path, workers: int) -> None:
    (flat / "3.png").write_bytes(png(3)[:60])
    (flat / "5.png").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"2 of 9 images are bad: 3\.png \(.*; 5\.png \(.*no shard was published.*--skip_bad"
    ):
        pack(flat, tmp_path / "out", workers=workers)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".train.parts"]


def test_s01_leaving_bad_images_out_after_all_repeats_no_work(flat: Path, tmp_path: Path) -> None:
    (flat / "3.png").write_bytes(b"<html>")
    with pytest.raises(UserError, match="1 of 9 images are bad"):
        pack(flat, tmp_path / "out")
    written = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out" / ".train.parts").glob("*.tar")}
    assert pack(flat, tmp_path / "out", skip_bad=True).samples == 8
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.tar")} == written


def test_s01_a_shard_of_nothing_but_bad_images_is_not_written(flat: Path, tmp_path: Path) -> None:
    for number in range(5):
        (flat / f"{number}.png").write_bytes(b"x")
    assert pack(flat, tmp_path / "out", skip_bad=True).filenames == ["train-000001.tar"]
    assert images_of(tmp_path / "out") == [png(n) for n in range(5, 9)]


def test_s01_nothing_but_bad_images_is_refused_even_so(flat: Path, tmp_path: Path) -> None:
    for path in flat.iterdir():
        path.write_bytes(b"x")
    with pytest.raises(
        UserError, match=r"all 9 images are bad: 0\.png \(.*; repair them, delete .*\.train\.parts and pack again"
    ):
        pack(flat, tmp_path / "out", skip_bad=True)
    assert list((tmp_path / "out").glob("*")) == [tmp_path / "out" / ".train.parts"]


def test_killed_after_it_was_published_a_split_is_said_to_be_complete(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(tree, tmp_path / "whole")
    plan = planned(tree, tmp_path / "out")
    pack_shards(plan, range(plan.shards), process_engine(0), lambda images, size: None)
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        moved = rename(path, target)
        if path == plan.parts:
            raise KeyboardInterrupt
        return moved

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        publish(plan, skip_bad=False)
    images, said = (
        plan.images,
        "if this command packed it and was interrupted after that, nothing is left to do; to pack",
    )
    with pytest.raises(
        UserError, match=rf"complete \({images} images in {plan.shards} shards\): {said} something else"
    ):
        pack(tree, tmp_path / "out")
    assert packed_files(tmp_path / "out") == packed_files(tmp_path / "whole")


@pytest.mark.parametrize("after", ["one tar", "all tars", "classes", "info"])
def test_a_crash_while_publishing_is_mended_by_the_same_command(
    tree: Path, tmp_path: Path, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*given: object, **options: object) -> None:
        raise KeyboardInterrupt

    pack(tree, tmp_path / "whole")
    plan = planned(tree, tmp_path / "out")
    pack_shards(plan, range(plan.shards), process_engine(0), lambda images, size: None)
    step = {"one tar": "_save_index", "all tars": "_save_index", "classes": "_write_info", "info": "remains_folder"}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, step[after], crash)
        publish(plan, skip_bad=False)
    if after == "one tar":
        for path in list((tmp_path / "out").glob("*.tar"))[1:]:
            path.rename(plan.parts / path.name)
    pack(tree, tmp_path / "out")
    assert packed_files(tmp_path / "out") == packed_files(tmp_path / "whole")
    assert not plan.parts.exists()
