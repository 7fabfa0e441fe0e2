"""Sources of images to pack: a labelled tree, a flat folder, or tar shards."""

import base64
import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from mae.data.scan import IMAGE_EXTENSIONS, NO_LABEL, samples
from mae.data.store.shards import SUFFIXES, Shard, expand, plain_tar
from mae.data.store.urls import redacted, scheme_of
from mae.data.tar import Member, members
from mae.errors import UserError, first_of

CLASSES_FILE = "classes.txt"
# File names need not be UTF-8; this round-trips any bytes.
NAMES = {"encoding": "utf-8", "errors": "surrogateescape"}
_MAX_NAMES = 5


class Extent(NamedTuple):
    """Range of `size` bytes of a file, from `offset`."""

    path: str
    offset: int
    size: int
    is_whole_file: bool = False

    def read(self) -> bytes:
        """Read the bytes.

        Raises:
            UserError: if they cannot be read, or their number has changed since they were listed.
        """
        try:
            with open(self.path, "rb") as file:  # noqa: PTH123 (ten million paths are kept as plain strings)
                file.seek(self.offset)
                # One more byte of a whole file shows whether it has grown.
                data = file.read(self.size + self.is_whole_file)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}; fix that, {_AGAIN}") from None
        if len(data) != self.size:
            raise UserError(f"{self.path} has changed while it was being packed; restore it, {_AGAIN}")
        return data


_AGAIN = "then run the same command again: finished shards are kept"


class Item(NamedTuple):
    """Image to pack."""

    name: str
    """Origin of the image, for messages and provenance."""
    extension: str
    image: Extent | bytes
    label: int = NO_LABEL
    """Class; `NO_LABEL` for images of shards too, because their .cls files are copied as side files."""
    side_files: tuple[tuple[str, Extent], ...] = ()

    @property
    def size(self) -> int:
        """Number of bytes of the image and its side files."""
        image = len(self.image) if isinstance(self.image, bytes) else self.image.size
        return image + sum(extent.size for _, extent in self.side_files)


@dataclass
class Source:
    """Source whose images are listed one by one, so that ten million of them need no memory."""

    name: str
    """Absolute path, or URL without secrets."""
    items: Iterator[Item]
    """Images; after one pass over them, the following attributes are complete."""
    classes: list[str] = field(default_factory=list)
    """Class names in the order of labels; empty if there are no labels or names."""
    ignored: int = 0
    """Number of files that belong to no image."""
    first_ignored: list[str] = field(default_factory=list)

    def ignore(self, *names: str) -> None:
        """Count files that are not packed."""
        self.ignored += len(names)
        self.first_ignored += names[: _MAX_NAMES - len(self.first_ignored)]


def find_images(source: str, cache_dir: Path, known: Sequence[str] = ()) -> Source:
    """Find the images of a labelled tree (`class/image`), a flat folder, or existing shards.

    The label of an image is the index of its class folder in `known`, or in alphabetical order if `known` is empty.

    Raises:
        UserError: here or while the items are listed, if there is no image, a tree mixes both layouts, or a class is
            not in `known`.
    """
    found = Source(redacted(source) if scheme_of(source) else os.path.realpath(source), iter(()))
    if _is_tree(source):
        found.items = _list_tree(found, known)
    else:
        found.items = _list_shards(found, expand([source]), cache_dir, known)
    return found


def known_classes(folder: Path) -> tuple[str, ...]:
    """Return the class list of a folder of shards; empty if there is none."""
    path = folder / CLASSES_FILE
    return tuple(filter(None, path.read_text(**NAMES).split("\n"))) if path.exists() else ()


def to_line(item: Item, root: str) -> bytes:
    """Return an item as a line of JSON, which omits the path of a file `root/name`."""
    image: object
    if isinstance(item.image, bytes):
        image = base64.b64encode(item.image).decode()
    elif item.image.path == f"{root}/{item.name}":
        image = item.image.size
    else:
        image = item.image
    fields = (item.name, item.extension, item.label, image, item.side_files)
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def from_line(line: bytes, root: str) -> Item:
    """Parse a line written by `to_line`."""
    name, extension, label, image, side_files = json.loads(line)
    content: Extent | bytes
    if isinstance(image, str):
        content = base64.b64decode(image)
    elif isinstance(image, int):
        content = Extent(f"{root}/{name}", 0, image, is_whole_file=True)
    else:
        content = Extent(*image)
    return Item(name, extension, content, label, tuple((other, Extent(*extent)) for other, extent in side_files))


def _is_tree(source: str) -> bool:
    if not Path(source).is_dir():
        return False
    with os.scandir(source) as entries:
        return not any(entry.name.endswith(SUFFIXES) for entry in entries)


def _list_tree(source: Source, known: Sequence[str]) -> Iterator[Item]:
    number = {name: label for label, name in enumerate(known)}
    unknown: list[str] = []
    flat, first_flat, nested = 0, "", 0
    for name in _walk(source.name, "", frozenset()):
        extension = _extension(name)
        size = _size(f"{source.name}/{name}") if extension else None
        if size is None:
            source.ignore(name)
            continue
        folder, slash, _ = name.partition("/")
        if not slash:
            flat, first_flat = flat + 1, first_flat or name
        else:
            nested += 1
            if folder not in number:
                number[folder] = len(number)
                unknown.append(folder)
        label = number[folder] if slash else NO_LABEL
        yield Item(name, extension, Extent(f"{source.name}/{name}", 0, size, is_whole_file=True), label)
    if not flat + nested:
        raise UserError(f"{source.name} contains no image (.{', .'.join(IMAGE_EXTENSIONS)})")
    if flat and nested:
        raise UserError(
            f"{source.name} contains {flat} images (the first is {first_flat}) beside {nested} in class folders; "
            "use either class folders or one flat folder"
        )
    if known and unknown:
        raise UserError(
            f"{source.name} has classes that the packed {CLASSES_FILE} does not list: "
            f"{first_of(unknown, separator=', ')}; pack splits of the same classes into one folder"
        )
    source.classes = list(number) if nested else []


def _walk(root: str, below: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Yield the files of a tree sorted by path, without hidden files; links are followed."""
    folder = f"{root}/{below}".rstrip("/")
    try:
        names, folders, here = _entries(folder)
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be read: {error.strerror}; fix or remove it") from None
    if here in above:
        raise UserError(f"{folder} is a link to a folder that contains it; remove the link")
    for name in names:
        if name in folders:
            yield from _walk(root, f"{below}{name}/", above | {here})
        else:
            yield below + name


def _entries(folder: str) -> tuple[list[str], set[str], tuple[int, int]]:
    """Return the names in a folder, those that are folders, and the folder's device and inode."""
    found = os.stat(folder)  # noqa: PTH116
    names, folders = [], set()
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                names.append(entry.name)
                if entry.is_dir():
                    folders.add(entry.name)
    return sorted(names), folders, (found.st_dev, found.st_ino)


def _extension(name: str) -> str:
    """Return the extension of an image in lower case; "" for other files."""
    extension = name.rpartition(".")[2].lower()
    return extension if extension in IMAGE_EXTENSIONS else ""


def _size(path: str) -> int | None:
    """Return the bytes of a regular file; None for anything else, such as a broken link."""
    try:
        found = os.stat(path)  # noqa: PTH116
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; fix or remove it") from None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _list_shards(source: Source, shards: Sequence[Shard], cache_dir: Path, known: Sequence[str]) -> Iterator[Item]:
    folder = Path(shards[0].url).parent
    source.classes = [] if shards[0].is_remote else list(known_classes(folder))
    if known and source.classes and list(known) != source.classes:
        raise UserError(
            f"{folder / CLASSES_FILE} and the packed {CLASSES_FILE} list different classes; "
            "pack splits of the same classes into one folder"
        )
    images = 0
    for shard in shards:
        for item in _list_shard(source, shard, plain_tar(shard, cache_dir).resolve()):
            images += 1
            yield item
    if not images:
        raise UserError(f"{source.name} contains no image (.{', .'.join(IMAGE_EXTENSIONS)})")


def _list_shard(source: Source, shard: Shard, tar: Path) -> Iterator[Item]:
    listing = members(tar, str(shard))
    seen = 0

    def extent(member: Member) -> Extent:
        return Extent(str(tar), member.offset, member.size)

    for sample in samples(listing, str(shard)):
        seen += len(sample.files)
        if not sample.image:
            source.ignore(*(member.name for member in sample.files.values()))
            continue
        side = tuple((ending, extent(member)) for ending, member in sample.files.items() if ending != sample.image)
        image = extent(sample.files[sample.image])
        yield Item(f"{shard.name}/{sample.key}", sample.image, image, side_files=side)
    source.ignored += len(listing) - seen  # hidden files, and files without an extension
