"""Read one shard once, strictly, and write down its samples: where each image lies, its crc32, its label.

A *sample* is one image with its side files. Names follow WebDataset: in `a/b.seg.png` the key is `a/b`, the
extension `seg.png`.
"""

import hashlib
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mae.data.tar import Member, mapped, walk
from mae.errors import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "npy")
LABEL_EXTENSION = "cls"
NO_LABEL = -1

RECORD = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc32", "<u4"), ("label", "<i8")])
"""What is known of a sample: the first byte of its image in the tar, its bytes, their crc32, its label."""

Records = NDArray[Any]
"""An array of `RECORD`."""

# Bytes of a .cls file; 18 digits and some white space.
_LONGEST_LABEL = 20
_LARGEST_IMAGE = 2**32 - 1
_LONGEST_MAGIC = 12
# How the files begin that `decode` reads: JPEG, PNG, BMP, TIFF and BigTIFF of both byte orders, npy; and WebP.
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"\x93NUMPY")
_WEBP = re.compile(rb"RIFF....WEBP", re.DOTALL)


Split = Callable[[str], tuple[str, str]]


class Sample(NamedTuple):
    """The files of one key."""

    key: str
    files: dict[str, Member]
    """Extension -> file."""
    image: str
    """Extension of the one image; empty if there is none."""


@dataclass(frozen=True, eq=False)
class ShardScan:
    """What one shard holds."""

    records: Records
    """[samples] of `RECORD`, in the order of the tar."""
    digest: str
    """sha256 over the names, places, contents and labels of all samples."""
    extensions: dict[str, int] = field(default_factory=dict)
    """How many files of each extension belong to samples."""
    ignored: int = 0
    """Files that belong to no sample: hidden ones, and those without an extension."""
    bad: tuple[str, ...] = ()
    """Images that cannot be decoded by what their first bytes say: `key.jpg (reason)`."""
    without_image: tuple[str, ...] = ()
    """Keys that have files but no image; they are no samples."""


def scan(source: Path | int, name: str = "") -> ShardScan:
    """Read a plain tar, given by path or open descriptor, once; messages call it `name` where that is given.

    Raises:
        UserError: for a damaged tar, a key with two images or that occurs twice, a label that is no integer >= 0,
            or a shard without any image.
    """
    shard = name or str(source)
    records: list[tuple[int, int, int, int]] = []
    digest, extensions = hashlib.sha256(), Counter[str]()
    bad: list[str] = []
    without_image: list[str] = []
    with mapped(source, shard) as data, memoryview(data) as view:
        listing = list(walk(data))
        for sample in samples(listing, shard):
            if not sample.image:
                without_image.append(sample.key)
                continue
            extensions.update(sample.files.keys())
            member = sample.files[sample.image]
            with view[member.offset : member.offset + member.size] as content:
                if reason := _unfit(content):
                    bad.append(f"{sample.key}.{sample.image} ({reason})")
                record = (member.offset, member.size, zlib.crc32(content), label_of(sample, view, shard))
            records.append(record)
            digest.update(f"{sample.key}.{sample.image}\0{record}\0".encode("utf-8", "surrogateescape"))
    if not records:
        raise UserError(f"shard {shard} holds no image; an image is a file .{', .'.join(IMAGE_EXTENSIONS)}")
    return ShardScan(
        records=np.array(records, dtype=RECORD),
        digest=digest.hexdigest(),
        extensions=dict(extensions),
        ignored=len(listing) - sum(extensions.values()),
        bad=tuple(bad),
        without_image=tuple(without_image),
    )


def samples(listing: Iterable[Member], shard: str) -> Iterator[Sample]:
    """The files of a tar grouped into samples, each complete, and the keys that have no image.

    Raises:
        UserError: if a sample has two images, or files of one key are not side by side.
    """
    seen: set[str] = set()
    for key, files in _grouped(listing):
        if key in seen:
            raise UserError(
                f"shard {shard}: key {key!r} occurs twice, or its files are not side by side; pack it again"
            )
        seen.add(key)
        images = [extension for extension in files if extension in IMAGE_EXTENSIONS]
        if len(images) > 1:
            raise UserError(
                f"shard {shard}: sample {key!r} holds {len(images)} images ({', '.join(files)}); "
                f"a sample is one of .{', .'.join(IMAGE_EXTENSIONS)} and its side files"
            )
        if images and files[images[0]].size > _LARGEST_IMAGE:
            raise UserError(f"shard {shard}: image {files[images[0]].name!r} is larger than 4 GiB; pack it otherwise")
        yield Sample(key, files, images[0] if images else "")


def split_name(name: str) -> tuple[str, str]:
    """`a.b/img.seg.PNG` -> (`a.b/img`, `seg.png`): the key, and the lower-cased extension."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _grouped(listing: Iterable[Member]) -> Iterator[tuple[str, dict[str, Member]]]:
    """Neighbouring files of one key.

    By WebDataset's rule the extension begins at the first dot. Where that leaves a whole shard without an image, as
    with `photo.v2.000010.jpg`, it begins at the last one. Never both in one shard: `b.seg.png` whose `b.jpg` is
    missing must not become an image.
    """
    members = list(listing)
    has_image = any(split_name(member.name)[1] in IMAGE_EXTENSIONS for member in members)
    split = split_name if has_image else _split_at_last_dot
    for group in _neighbours(members, split):
        yield from _by_extension(group, split)


def _neighbours(listing: Iterable[Member], split: Split) -> Iterator[list[Member]]:
    """Runs of one key; hidden files and files without an extension stay out."""
    current, group = "", list[Member]()
    for member in listing:
        key, extension = split(member.name)
        if not extension or _is_hidden(member.name):
            continue
        if group and key != current:
            yield group
            group = []
        current = key
        group.append(member)
    if group:
        yield group


def _is_hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".")


def _by_extension(group: Sequence[Member], split: Split) -> Iterator[tuple[str, dict[str, Member]]]:
    """The files of one key; a second file of the same name begins the key anew, which `samples` refuses."""
    files: dict[str, Member] = {}
    for member in group:
        key, extension = split(member.name)
        if extension in files:
            yield key, files
            files = {}
        files[extension] = member
    yield key, files


def _split_at_last_dot(name: str) -> tuple[str, str]:
    stem, _, extension = name.rpartition(".")
    return stem, extension.lower()


def _unfit(image: memoryview) -> str:
    """Why a file is no image, as far as its first bytes tell; empty if they do not."""
    if not len(image):
        return "it is empty"
    start = bytes(image[:_LONGEST_MAGIC])
    if start.startswith(_MAGIC) or _WEBP.match(start):
        return ""
    return f"it begins with {start!r}, as no image of an allowed format does"


def label_of(sample: Sample, view: memoryview, shard: str) -> int:
    """The label of a sample in the tar that `view` shows, or `NO_LABEL`.

    Raises:
        UserError: if it is no integer >= 0.
    """
    member = sample.files.get(LABEL_EXTENSION)
    if member is None:
        return NO_LABEL
    text = bytes(view[member.offset : member.offset + min(member.size, _LONGEST_LABEL)]).strip()
    if member.size > _LONGEST_LABEL or not re.fullmatch(rb"[0-9]{1,18}", text):
        raise UserError(
            f"shard {shard}: label {member.name!r} is {text!r}; allowed: an integer >= 0 of at most 18 digits"
        )
    return int(text)
