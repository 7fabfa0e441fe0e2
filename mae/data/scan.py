"""Strict scan of one shard for its samples: the position, crc32 and label of each image.

A *sample* is one image with its side files. Names follow WebDataset: in `a/b.seg.png` the key is `a/b` and the
extension is `seg.png`.
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

from mae.data.left_out import LeaveOut, LeftOut, count_into, leave_out
from mae.data.tar import Member, mapped, walk
from mae.errors import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "npy")
LABEL_EXTENSION = "cls"
NO_LABEL = -1

RECORD = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc32", "<u4"), ("label", "<i8")])
"""Record of a sample: offset of its image in the tar [bytes], size of the image [bytes], crc32 of the image, label."""

Records = NDArray[Any]
"""Array of `RECORD`."""
Split = Callable[[str], tuple[str, str]]
"""Function from a file name to key and extension."""

BAD_LABELS = "labels that are no integer >= 0 of at most 18 digits"
DOTTED_IMAGES = "image files with another dot in their names"
"""Kinds of what is left out: see `mae.data.left_out`."""

# Bytes of a .cls file: 18 digits and some white space.
_MAX_LABEL = 20
_MAX_IMAGE = 2**32 - 1
_MAX_MAGIC = 12
# First bytes of the files that `decode` reads: JPEG, PNG, BMP, TIFF and BigTIFF in both byte orders, npy; and WebP.
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"\x93NUMPY")
_WEBP = re.compile(rb"RIFF....WEBP", re.DOTALL)


class Sample(NamedTuple):
    """Files with the same key."""

    key: str
    files: dict[str, Member]
    """File for each extension."""
    image: str
    """Extension of the image; empty if there is none."""


@dataclass(frozen=True, eq=False)
class ShardScan:
    """Contents of one shard."""

    records: Records
    """Array [samples] of `RECORD`, in the order of the tar."""
    digest: str
    """sha256 of the names, positions, contents and labels of all samples."""
    extensions: dict[str, int] = field(default_factory=dict)
    """Number of files of samples, by extension."""
    left_out: LeftOut = field(default_factory=dict)
    """What is not used, by kind: members that are no files, files that belong to no image, and bad labels."""
    bad: tuple[str, ...] = ()
    """Images whose first bytes show that they cannot be decoded: `key.jpg (reason)`."""
    without_image: tuple[str, ...] = ()
    """Keys that have files but no image; they do not count as samples."""
    last_dot: str = ""
    """Name of the first image whose extension begins at the last of several dots; see `samples`."""


def scan(source: Path | int, name: str = "", image_extension: str | None = None) -> ShardScan:
    """Read a plain tar, given by path or open descriptor, once; messages use `name` if it is given.

    With `image_extension`, only files of this extension are images; see `samples`.

    Raises:
        UserError: for a damaged tar, a key that has two images or occurs twice, or an image that is too large.
    """
    shard = name or str(source)
    records: list[tuple[int, int, int, int]] = []
    digest, extensions, left_out = hashlib.sha256(), Counter[str](), LeftOut()
    bad: list[str] = []
    without_image: list[str] = []
    leave_out, last_dot = count_into(left_out), ""
    with mapped(source, shard) as data, memoryview(data) as view:
        for sample in samples(walk(data, leave_out), shard, image_extension, leave_out):
            if not sample.image:
                without_image.append(sample.key)
                continue
            extensions.update(sample.files.keys())
            member = sample.files[sample.image]
            if not last_dot and split_name(member.name)[1] != sample.image:
                last_dot = member.name
            with view[member.offset : member.offset + member.size] as content:
                if reason := _image_problem(content):
                    bad.append(f"{sample.key}.{sample.image} ({reason})")
                record = (member.offset, member.size, zlib.crc32(content), label_of(sample, view, leave_out))
            records.append(record)
            digest.update(f"{sample.key}.{sample.image}\0{record}\0".encode("utf-8", "surrogateescape"))
    return ShardScan(
        records=np.array(records, dtype=RECORD),
        digest=digest.hexdigest(),
        extensions=dict(extensions),
        left_out=left_out,
        bad=tuple(bad),
        without_image=tuple(without_image),
        last_dot=last_dot,
    )


def samples(
    listing: Iterable[Member], shard: str, image_extension: str | None = None, leave_out: LeaveOut = leave_out
) -> Iterator[Sample]:
    """Group the files of a tar into samples; a key without an image is a sample whose `image` is empty.

    With `image_extension`, the files whose names after the first dot are just this are the images, and all others are
    their side files. Files that belong to no image are given to `leave_out`.

    Raises:
        UserError: if a sample has two images or one of more than 4 GiB, or files of one key are not side by side.
    """
    allowed = (image_extension,) if image_extension else IMAGE_EXTENSIONS
    seen: set[str] = set()
    for key, files in _grouped(listing, shard, image_extension, leave_out):
        if key in seen:
            raise UserError(
                f"shard {shard}: key {key!r} occurs twice, or its files are not side by side; pack it again: unpack "
                f"it, then tar --sort=name -cf NEW.tar -C FOLDER . (or mae pack {shard} --out NEW)"
            )
        seen.add(key)
        images = [extension for extension in files if extension in allowed]
        if len(images) > 1:
            raise UserError(
                f"shard {shard}: sample {key!r} has {len(images)} images ({', '.join(files)}); "
                f"a sample is one of .{', .'.join(IMAGE_EXTENSIONS)} and its side files; name the one to train on by "
                f"data.image_extension (mae index: --image_extension), such as {images[0]}"
            )
        if images and files[images[0]].size > _MAX_IMAGE:
            raise UserError(
                f"shard {shard}: image {files[images[0]].name!r} is larger than 4 GiB; make it smaller or leave it out"
            )
        if not images:
            for member in files.values():
                leave_out(DOTTED_IMAGES if _ends_as_image(member) else "files without an image", member.name)
        yield Sample(key, files, images[0] if images else "")


def split_name(name: str) -> tuple[str, str]:
    """Split a file name into key and lower-case extension: `a.b/img.seg.PNG` -> (`a.b/img`, `seg.png`)."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _grouped(
    listing: Iterable[Member], shard: str, image_extension: str | None, leave_out: LeaveOut
) -> Iterator[tuple[str, dict[str, Member]]]:
    """Yield each key with its neighbouring files.

    The extension begins at the first dot, as in WebDataset. If the whole shard then has no image, as with
    `photo.v2.000010.jpg`, it begins at the last dot. One shard never uses both rules: a `b.seg.png` whose `b.jpg` is
    missing must not become an image.
    """
    members = list(_named(listing, leave_out))
    split = split_name
    if not image_extension and not any(split_name(member.name)[1] in IMAGE_EXTENSIONS for member in members):
        _require_no_roles(members, shard)
        split = _split_at_last_dot
    for group in _neighbours(members, split):
        yield from _by_extension(group, split)


def _named(listing: Iterable[Member], leave_out: LeaveOut) -> Iterator[Member]:
    """Yield the files that can belong to a sample: those with an extension, except hidden ones."""
    for member in listing:
        if _is_hidden(member.name):
            leave_out("hidden files", member.name)
        elif not split_name(member.name)[1]:
            leave_out("files without an extension", member.name)
        else:
            yield member


def _require_no_roles(members: Sequence[Member], shard: str) -> None:
    """Refuse a shard whose samples have several images, as `K.image.jpg` and `K.mask.png`; the last dot hides that.

    These two differ from the numbered images `cat.1.jpg`, `cat.2.jpg` by having no number, or by occurring in as many
    samples as there are such extensions.
    """
    found: dict[str, set[str]] = {}
    for member in filter(_ends_as_image, members):
        key, extension = split_name(member.name)
        found.setdefault(key, set()).add(extension)
    several = {key: extensions for key, extensions in found.items() if len(extensions) > 1}
    roles = sorted(set().union(*several.values()))
    is_numbered = any(re.search("[0-9]", role) for role in roles)
    if several and (len(several) >= len(roles) or not is_numbered):
        key, extensions = next(iter(several.items()))
        raise UserError(
            f"shard {shard}: {len(several)} samples have several images, the first is {key!r} with "
            f".{', .'.join(sorted(extensions))}; name the one to train on by data.image_extension (mae index: "
            f"--image_extension), such as {roles[0]}; the others are then its side files. If each of them is a sample, "
            "unpack the shard, and mae pack its folder, which divides names at the last dot"
        )


def _ends_as_image(member: Member) -> bool:
    return _split_at_last_dot(member.name)[1] in IMAGE_EXTENSIONS


def _neighbours(members: Iterable[Member], split: Split) -> Iterator[list[Member]]:
    """Yield runs of files with the same key."""
    current, group = "", list[Member]()
    for member in members:
        key, _ = split(member.name)
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
    """Map the files of one key by extension. A repeated extension yields the key again, which `samples` refuses."""
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


def _image_problem(image: memoryview) -> str:
    """Return why a file is not an image, judged by its first bytes; empty if they look right."""
    if not len(image):
        return "it is empty"
    start = bytes(image[:_MAX_MAGIC])
    if start.startswith(_MAGIC) or _WEBP.match(start):
        return ""
    return f"it begins with {start!r}, unlike any allowed image format"


def label_of(sample: Sample, view: memoryview, leave_out: LeaveOut = leave_out) -> int:
    """Return the label of a sample of the tar `view`, or `NO_LABEL`; pretraining needs none.

    A label that is no integer >= 0 of at most 18 digits is given to `leave_out`.
    """
    member = sample.files.get(LABEL_EXTENSION)
    if member is None:
        return NO_LABEL
    text = bytes(view[member.offset : member.offset + min(member.size, _MAX_LABEL + 1)])
    label = parse_label(text)
    if label is None:
        leave_out(BAD_LABELS, f"{member.name} is {text[:_MAX_LABEL].strip()!r}")
        return NO_LABEL
    return label


def parse_label(text: bytes) -> int | None:
    """Return the label in a .cls file; None if it is no integer >= 0 of at most 18 digits."""
    digits = text.strip()
    return int(digits) if len(text) <= _MAX_LABEL and re.fullmatch(rb"[0-9]{1,18}", digits) else None
