"""Sources of images to pack: a labelled tree, a flat folder, tar shards, or a folder with one of these per split."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from mae.data.packing.class_list import NO_CLASSES, ClassList, labels_of, quoted
from mae.data.packing.items import Source
from mae.data.packing.label_table import LabelTable, list_by_table
from mae.data.packing.tars import list_tars
from mae.data.packing.trees import Labels, entries, image_extension, list_tree
from mae.data.store.shards import SUFFIXES, expand
from mae.data.store.urls import redacted, scheme_of
from mae.errors import UserError

SPLITS = ("train", "val", "valid", "validation", "test")
"""Names of folders that are splits, in capitals or not."""
DEFAULT_SPLIT = SPLITS[0]


def find_images(
    source: str,
    cache_dir: Path,
    known: ClassList = NO_CLASSES,
    labels: Labels = "auto",
    table: LabelTable | None = None,
) -> Source:
    """Find the images of a labelled tree (`class/image`), a flat folder, or existing shards.

    The label of an image is the index of its class folder in `known`, or in alphabetical order if `known` is empty.
    With `labels` "auto", images in folders have labels, and those of a flat folder have none. With a table, the images
    that it names have the classes that it gives, at any depth.

    Raises:
        UserError: here or while the items are listed, if there is no image, a tree mixes both layouts, or a class is
            not in `known`.
    """
    found = Source(redacted(source) if scheme_of(source) else os.path.realpath(source), iter(()))
    if is_tree(source):
        found.items = list_by_table(found, known, table) if table else list_tree(found, known, labels)
        return found
    shards = expand([source])
    if table:
        raise UserError(f"label_file is for folders of images, but {source} is made of shards; leave it out")
    if labels == "folders":
        raise UserError(f"--labels folders is for folders of images, but {source} is made of shards; leave it out")
    if Path(source).is_dir():
        names, folders, _ = entries(source)
        if others := [name for name in names if name in folders or image_extension(name)]:
            found.remarks.append(f"only the shards in {source} are packed, not {quoted(others)} beside them")
    found.items = list_tars(found, shards, cache_dir, known, has_labels=labels == "auto")
    return found


def find_splits(
    source: str,
    split: str | None,
    cache_dir: Path,
    known: ClassList = NO_CLASSES,
    labels: Labels = "auto",
    table: LabelTable | None = None,
) -> dict[str, Source]:
    """Find the images of each split by its name: of `source` itself, or of folders in it that are called like splits.

    All splits have one class list: `known`, or the names of the class folders of all splits. A table is of one split.

    Raises:
        UserError: for a reason of `find_images`, or if folders in it may be splits or classes.
    """
    folders = _split_folders(source, split, known) if is_tree(source) and not table else {}
    if not folders:
        found = find_images(source, cache_dir, known, labels, table)
        if table and (like := _called_like_splits(entries(source)[1])):
            found.remarks.append(
                f"folders called like splits ({quoted(like)}) in {source} are taken as plain folders: all images that "
                f"{table.path.name} names are packed together; to pack splits, give each a table and its own --split"
            )
        return {split or DEFAULT_SPLIT: found}
    if not known.names and labels != "none":
        known = _union(folders)
    splits = {name: find_images(folder, cache_dir, known, labels) for name, folder in folders.items()}
    for found in splits.values():
        found.splits = tuple(splits) if len(splits) > 1 else ()
    first = next(iter(splits.values()))
    first.remarks.append(f"{source} contains the splits {', '.join(splits)}")
    for name in set(entries(source)[0]) - {Path(folder).name for folder in folders.values()}:
        first.left_out.add(name)
    return splits


def is_tree(source: str) -> bool:
    """Return whether a source is a folder of image files or of other folders, not of shards."""
    if not Path(source).is_dir():
        return False
    return not any(name.endswith(SUFFIXES) for name in entries(source)[0])


def _split_folders(source: str, split: str | None, known: ClassList) -> Mapping[str, str]:
    """Return the path of each split folder by the name of its split; empty if the source is one split."""
    names, folders, _ = entries(source)
    splits = _called_like_splits(folders)
    if not splits or set(splits) <= set(known.names):
        return {}
    others = [name for name in names if name not in splits and (name in folders or image_extension(name))]
    if others and not split:
        raise UserError(
            f"{source} contains {quoted(splits)}, called like splits, beside {quoted(others)}; if all are classes, say "
            f"so with --split {DEFAULT_SPLIT}; else pack each split by itself (mae pack {source}/{splits[0]} --split "
            f"{splits[0].lower()}) or rename what is no split"
        )
    if others:
        return {}
    if split:
        raise UserError(
            f"{source} contains the splits {quoted(splits)}, which --split {split} would mix as classes; leave --split "
            f"out to pack each of them, or pack one: mae pack {source}/{splits[0]} --split {split}; if they are "
            "classes, list them in a --classes FILE"
        )
    by_name = {name: [folder for folder in splits if folder.lower() == name] for name in SPLITS}
    for several in by_name.values():
        if len(several) > 1:
            raise UserError(f"{source} contains the same split more than once: {quoted(several)}; rename one")
    return {name: f"{source}/{found[0]}" for name, found in by_name.items() if found}


def _called_like_splits(folders: Iterable[str]) -> list[str]:
    return [folder for folder in folders if folder.lower() in SPLITS]


def _union(folders: Mapping[str, str]) -> ClassList:
    """Return the names of the class folders of all splits; splits that are shards have their own list."""
    names: set[str] = set()
    for folder in folders.values():
        if is_tree(folder):
            names.update(labels_of(entries(folder)[1], folder, NO_CLASSES)[1])
    return ClassList(tuple(sorted(names)), f"the class folders of {', '.join(folders.values())}")
