"""Images in folders: a labelled tree (`class/image`), a flat folder, or a tree without labels."""

import os
import stat
from collections.abc import Iterator
from typing import Literal, TypeAlias

from mae.data.packing.class_list import ClassList, labels_of
from mae.data.packing.convert import is_image
from mae.data.packing.items import Extent, Item, Source, no_image, shown
from mae.errors import UserError

Labels: TypeAlias = Literal["auto", "folders", "none"]

_MAX_BYTES = 2**32 - 1
# Well below Python's limit of recursion.
_MAX_DEPTH = 256


def list_tree(source: Source, known: ClassList, labels: Labels) -> Iterator[Item]:
    """Yield the images of a folder, and fill in the other attributes of `source`.

    The label of an image is that of the topmost folder that contains it, see `labels_of`. With `labels` "none", and
    in a flat folder, images have no label.
    """
    number: dict[str, int] = {}
    flat, first_flat, nested, deep, first_deep = 0, "", 0, 0, ""
    for name in walk(source.name, "", frozenset()):
        item = image_of(source, name)
        if item is None:
            continue
        folder, *below = name.split("/")
        if labels == "none" or not below:
            flat, first_flat = flat + 1, first_flat or name
            yield item
            continue
        nested += 1
        if len(below) > 1:
            deep, first_deep = deep + 1, first_deep or name
        if not number:
            number, source.classes = labels_of(entries(source.name)[1], source.name, known)
        yield item._replace(label=number[folder])
    if not flat + nested:
        raise no_image(source.name)
    if flat and (nested or labels == "folders"):
        where = f"beside {nested} in class folders" if nested else "and no class folder"
        raise UserError(
            f"{source.name} contains {flat} images (the first is {shown(first_flat)}) {where}; put each image into the "
            "folder of its class, or pack all without labels: --labels none"
        )
    if deep:
        source.remarks.append(
            f"{deep:,} of {nested:,} images are deeper than CLASS/IMAGE, the first is {shown(first_deep)}: the topmost "
            "folder is their class; --labels none packs images without labels"
        )


def entries(folder: str) -> tuple[list[str], list[str], tuple[int, int]]:
    """Return the names in a folder, those that are folders, and the folder's device and inode, without hidden ones.

    Raises:
        UserError: if the folder cannot be read.
    """
    names, folders = [], []
    try:
        found = os.stat(folder)  # noqa: PTH116
        with os.scandir(folder) as listed:
            for entry in listed:
                if not entry.name.startswith("."):
                    names.append(entry.name)
                    if entry.is_dir():
                        folders.append(entry.name)
    except OSError as error:
        path = shown(error.filename or folder)
        raise UserError(f"{path} cannot be read: {error.strerror}; fix or remove it") from None
    return sorted(names), sorted(folders), (found.st_dev, found.st_ino)


def image_extension(name: str) -> str:
    """Return the extension of an image in lower case; "" for a file that is not packed."""
    extension = name.rpartition(".")[2].lower()
    return extension if is_image(extension) else ""


def image_of(source: Source, name: str) -> Item | None:
    """Return the image of a file; count any other file as left out."""
    path, extension = f"{source.name}/{name}", image_extension(name)
    size = _size(path)
    if size is None:
        source.left_out.add(name, "broken links or special files")
    elif not extension:
        source.left_out.add(name)
    elif size > _MAX_BYTES:
        raise UserError(f"image {shown(path)} is larger than 4 GiB; make it smaller or remove it")
    else:
        return Item(name, extension, Extent(path, 0, size, is_whole_file=True))
    return None


def walk(root: str, below: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Yield the files of a tree sorted by path, without hidden files; links are followed."""
    folder = f"{root}/{below}".rstrip("/")
    names, folders, here = entries(folder)
    if here in above:
        raise UserError(f"{shown(folder)} is a link to a folder that contains it; remove the link")
    if len(above) == _MAX_DEPTH:
        raise UserError(f"{shown(root)} has folders nested more than {_MAX_DEPTH} deep; move the deepest further up")
    is_folder = set(folders)
    for name in names:
        if name in is_folder:
            yield from walk(root, f"{below}{name}/", above | {here})
        else:
            yield below + name


def _size(path: str) -> int | None:
    """Return the bytes of a regular file; None for anything else, such as a broken link."""
    try:
        found = os.stat(path)  # noqa: PTH116
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{shown(path)} cannot be read: {error.strerror}; fix or remove it") from None
    return found.st_size if stat.S_ISREG(found.st_mode) else None
