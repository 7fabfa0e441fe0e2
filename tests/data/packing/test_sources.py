from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import png

from data.packing.packs import NOWHERE, listed
from mae.data.packing.class_list import NO_CLASSES, ClassList
from mae.data.packing.items import Source
from mae.data.packing.sources import find_splits
from mae.data.packing.trees import Labels
from mae.data.scan import NO_LABEL
from mae.errors import UserError


def images(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(number))
    return root


def splits_of(
    root: Path, split: str | None = None, known: ClassList = NO_CLASSES, labels: Labels = "auto"
) -> dict[str, Source]:
    return find_splits(str(root), split, NOWHERE, known, labels)


def labels_by_name(source: Source) -> dict[str, int]:
    return {item.name: item.label for item in source.items}


def test_folders_called_like_splits_are_splits_of_one_class_list(tmp_path: Path) -> None:
    root = images(
        tmp_path / "in", "train/cat/0.png", "train/dog/1.png", "VALID/dog/2.png", "VALID/emu/3.png", "notes.txt"
    )
    found = splits_of(root)
    assert list(found) == ["train", "valid"]
    assert labels_by_name(found["train"]) == {"cat/0.png": 0, "dog/1.png": 1}
    assert labels_by_name(found["valid"]) == {"dog/2.png": 1, "emu/3.png": 2}
    assert found["train"].classes == found["valid"].classes == ["cat", "dog", "emu"]
    assert found["train"].splits == found["valid"].splits == ("train", "valid")
    assert found["train"].notices() == [
        f"{root} contains the splits train, valid", "1 file is left out: 1 notes.txt",
    ]  # fmt: skip


def test_a_split_may_be_flat(tmp_path: Path) -> None:
    found = splits_of(images(tmp_path, "train/cat/0.png", "test/1.png"))
    assert labels_by_name(found["test"]) == {"1.png": NO_LABEL}
    assert labels_by_name(found["train"]) == {"cat/0.png": 0}


def test_a_split_may_be_shards(tmp_path: Path, write_tar: Callable[..., Path]) -> None:
    for split in ("train", "val"):
        write_tar(f"{split}/x.tar", {f"{split}.png": png(0)})
    assert [labels_by_name(source) for source in splits_of(tmp_path).values()] == [
        {"x.tar/train": NO_LABEL}, {"x.tar/val": NO_LABEL},
    ]  # fmt: skip


def test_splits_without_labels(tmp_path: Path) -> None:
    found = splits_of(images(tmp_path, "train/2023/0.png", "val/2024/01/1.png"), labels="none")
    assert labels_by_name(found["train"]) | labels_by_name(found["val"]) == {
        "2023/0.png": NO_LABEL, "2024/01/1.png": NO_LABEL,
    }  # fmt: skip
    assert found["train"].classes == []


@pytest.mark.parametrize("other", ["cats/1.png", "1.png"])
def test_splits_beside_something_else_are_refused(tmp_path: Path, other: str) -> None:
    root = images(tmp_path, "train/a/0.png", other)
    name = other.partition("/")[0]
    message = (
        rf"contains train, called like splits, beside {name}; if all are classes, say so with --split train; "
        rf"else .*mae pack {root}/train --split train\) or rename"
    )
    with pytest.raises(UserError, match=message):
        splits_of(root)


def test_classes_may_be_called_like_splits(tmp_path: Path) -> None:
    root = images(tmp_path, "train/0.png", "bus/1.png")
    expected = {"bus/1.png": 0, "train/0.png": 1}
    assert labels_by_name(splits_of(root, split="val")["val"]) == expected
    assert labels_by_name(splits_of(root, known=ClassList(("bus", "train")))["train"]) == expected


def test_a_name_for_a_folder_of_splits_is_refused(tmp_path: Path) -> None:
    root = images(tmp_path, "train/a/0.png", "test/a/1.png")
    with pytest.raises(UserError, match=r"contains the splits test, train, which --split x would mix as classes"):
        splits_of(root, split="x")


def test_a_split_in_two_folders_is_refused(tmp_path: Path) -> None:
    root = images(tmp_path, "train/a/0.png", "Train/a/1.png")
    with pytest.raises(UserError, match=r"contains the same split more than once: Train, train; rename one"):
        splits_of(root)


def test_images_beside_shards_are_told_of(tmp_path: Path, write_tar: Callable[..., Path]) -> None:
    write_tar("in/x.tar", {"a.png": png(0)})
    images(tmp_path / "in", "cat/0.png", "b.png")
    found, items = listed(tmp_path / "in")
    assert list(items) == ["x.tar/a"]
    assert found.remarks == [f"only the shards in {tmp_path}/in are packed, not b.png, cat beside them"]


def test_labels_of_shards_are_not_in_folders(write_tar: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"--labels folders is for folders of images, but .*in\.tar is made of shards"):
        listed(write_tar("in.tar", {"a.png": png(0)}), labels="folders")


def test_a_source_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(UserError, match=r"contains no image \(\.jpg, "):
        listed(tmp_path)
    with pytest.raises(UserError, match="do not exist"):
        listed(tmp_path / "none")


def test_a_source_has_the_same_name_from_everywhere(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree.parent)
    assert listed("tree")[0].name == listed("./tree/")[0].name == listed(tree)[0].name == str(tree.resolve())
