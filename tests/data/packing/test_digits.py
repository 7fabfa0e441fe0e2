from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from mae.data.images.decode import decode
from mae.data.indexing import open_index
from mae.data.packing.class_list import known_classes
from mae.data.packing.digits import CLASSES, digit_splits
from mae.data.packing.items import Item
from mae.data.reader import ImageReader
from mae.data.statistics import read_info
from mae.data.store.unpacked import CACHE_BYTES
from mae.pipelines.pack import PackSettings, run


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Item]]:
    return digit_splits()


def test_the_splits_share_out_all_digits(splits: dict[str, list[Item]]) -> None:
    assert {name: len(items) for name, items in splits.items()} == {"train": 1097, "val": 200, "test": 500}
    names = [item.name for items in splits.values() for item in items]
    assert sorted(names) == sorted(f"digit {n}" for n in range(1797))


def test_no_picture_is_in_two_splits(splits: dict[str, list[Item]]) -> None:
    pictures = [{item.image for item in items} for items in splits.values()]
    assert sum(map(len, pictures)) == len(set().union(*pictures))


def test_pictures_and_labels_are_those_of_scikit_learn(splits: dict[str, list[Item]]) -> None:
    digits = load_digits()
    for item in splits["test"]:
        number = int(item.name.removeprefix("digit "))
        assert item.label == digits.target[number]
        assert isinstance(item.image, bytes)
        pixels = decode(item.image, 1)[0].numpy()
        assert np.abs(pixels / 255 - digits.images[number] / 16).max() < 0.5 / 255 + 1e-9


def test_every_split_holds_every_class(splits: dict[str, list[Item]]) -> None:
    for items in splits.values():
        assert {item.label for item in items} == set(range(10))


def test_the_pipeline_packs_all_three_splits(tmp_path: Path, splits: dict[str, list[Item]]) -> None:
    packed = run(PackSettings("digits", tmp_path, workers=0))
    assert {name: part.samples for name, part in packed.items()} == {"train": 1097, "val": 200, "test": 500}
    assert list(known_classes(tmp_path)) == list(CLASSES)
    assert list(read_info(tmp_path)["splits"]) == ["train", "val", "test"]
    index = open_index([str(tmp_path / "val-*.tar")], tmp_path)
    assert index.class_count() == 10
    reader = ImageReader(index, tmp_path, CACHE_BYTES)
    assert [reader.read(place) for place in reader.locate(np.arange(200))] == [item.image for item in splits["val"]]
