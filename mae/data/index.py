"""The index: where every sample of a set of shards lies, known before training starts.

A *sample* is one image with its side files; its *sample id* is its place in the list of all samples of
all shards, in order. Names follow WebDataset: in `a/b.seg.png` the key is `a/b`, the extension `seg.png`.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mae.data.shards import expand, plain_tar
from mae.data.tar import Member, members
from mae.errors import BadImageError, UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "npy")
LABEL_EXTENSION = "cls"
NO_LABEL = -1
# Bytes of a .cls file; 18 digits and some white space.
_LONGEST_LABEL = 20
# A process may often open only 1,024 files, and a set may have more shards than that.
_OPEN_AT_MOST = 256


class Sample(NamedTuple):
    """One sample as it stands in a shard: the image's place, and the label or `NO_LABEL`."""

    key: str
    extension: str
    offset: int
    size: int
    label: int


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """All samples of a list of shards; `len(index)` samples with the ids 0 ... len - 1."""

    shards: tuple[Path, ...]
    """The shards as the user named them."""
    files: tuple[Path, ...]
    """The plain tar files to read, one per shard."""
    shard_of: NDArray[np.int32]
    """[samples] number of the shard."""
    offset: NDArray[np.int64]
    """[samples] first byte of the image in its file."""
    size: NDArray[np.int64]
    """[samples] bytes of the image."""
    label: NDArray[np.int64]
    """[samples] class, or `NO_LABEL`."""
    keys: tuple[str, ...] = field(repr=False)
    """[samples] key.extension, for messages."""
    fingerprint: str = ""
    """sha256 over the order, names, places, sizes and labels of all samples, wherever the shards lie."""

    def __len__(self) -> int:
        return len(self.offset)

    def name(self, sample_id: int) -> str:
        """`shard.tar: key.jpg`, to tell a person which image is meant."""
        return f"{self.shards[self.shard_of[sample_id]]}: {self.keys[sample_id]}"

    def class_count(self) -> int:
        """One more than the greatest label.

        Raises:
            UserError: naming the first samples without a label.
        """
        unlabelled = np.flatnonzero(self.label == NO_LABEL)
        if len(unlabelled):
            raise UserError(
                f"{len(unlabelled)} of {len(self)} samples have no .{LABEL_EXTENSION} label, "
                f"the first is {self.name(int(unlabelled[0]))}; fine-tuning needs one for each image"
            )
        return int(self.label.max()) + 1


class ImageReader:
    """Reads images of an index by sample id; every process that uses it opens the files for itself."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self._descriptors: dict[int, int] = {}
        self._process = os.getpid()

    def read(self, sample_id: int) -> bytes:
        """The bytes of one image, as they lie in the shard.

        Raises:
            BadImageError: if the shard has become shorter than its index says, or cannot be read.
        """
        index = self.index
        shard, size = int(index.shard_of[sample_id]), int(index.size[sample_id])
        try:
            data = os.pread(self._descriptor(shard), size, int(index.offset[sample_id]))
        except OSError as error:
            raise BadImageError(f"the shard cannot be read: {error.strerror}") from None
        if len(data) != size:
            raise BadImageError("the shard has become shorter since the run started; restore it")
        return data

    def __getstate__(self) -> dict[str, object]:
        return {"index": self.index, "_descriptors": {}, "_process": 0}

    def __del__(self) -> None:
        if self._process == os.getpid():
            for descriptor in self._descriptors.values():
                os.close(descriptor)

    def _descriptor(self, shard: int) -> int:
        if self._process != os.getpid():
            # After a fork the numbers are the parent's; pread shares no position, but let each own its files.
            self._descriptors, self._process = {}, os.getpid()
        if shard not in self._descriptors:
            if len(self._descriptors) == _OPEN_AT_MOST:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            self._descriptors[shard] = os.open(self.index.files[shard], os.O_RDONLY)
        return self._descriptors[shard]


def build_index(patterns: Sequence[str], cache_dir: Path) -> ShardIndex:
    """Read the headers of every shard that `patterns` name and list their samples.

    Raises:
        UserError: for a missing, damaged or empty shard, a sample without exactly one image, a key that
            occurs twice in a shard, or a label that is no integer >= 0.
    """
    shards = expand(patterns)
    files = [plain_tar(path, cache_dir) for path in shards]
    samples = [read_samples(file, shard) for file, shard in zip(files, shards, strict=True)]
    flat = [sample for of_shard in samples for sample in of_shard]
    return ShardIndex(
        shards=tuple(shards),
        files=tuple(files),
        shard_of=np.repeat(np.arange(len(shards), dtype=np.int32), [len(s) for s in samples]),
        offset=np.array([s.offset for s in flat], dtype=np.int64),
        size=np.array([s.size for s in flat], dtype=np.int64),
        label=np.array([s.label for s in flat], dtype=np.int64),
        keys=tuple(f"{s.key}.{s.extension}" for s in flat),
        fingerprint=_fingerprint(samples),
    )


def read_samples(file: Path, shard: Path) -> list[Sample]:
    """The samples of one plain tar `file`; messages name `shard`."""
    found: list[Sample] = []
    seen: set[str] = set()
    with file.open("rb") as tar:
        for key, group in grouped(members(file, shard)):
            if key in seen:
                raise UserError(
                    f"shard {shard}: key {key!r} occurs twice, or its files are not side by side; pack it again"
                )
            seen.add(key)
            found.append(_sample(key, group, tar.fileno(), shard))
    if not found:
        raise UserError(f"shard {shard} holds no image; an image is a file .{', .'.join(IMAGE_EXTENSIONS)}")
    return found


def split_name(name: str) -> tuple[str, str]:
    """`a.b/img.seg.PNG` -> (`a.b/img`, `seg.png`): the key, and the lower-cased extension."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def grouped(listing: Sequence[Member]) -> Iterator[tuple[str, dict[str, Member]]]:
    """Neighbouring members of one key; hidden files and files without an extension are no samples.

    A second file of the same name begins a new group of the same key, which `read_samples` refuses.
    """
    current, group = "", dict[str, Member]()
    for member in listing:
        key, extension = split_name(member.name)
        if not extension or not key or key.endswith("/"):
            continue
        if group and (key != current or extension in group):
            yield current, group
            group = {}
        current, group = key, {**group, extension: member}
    if group:
        yield current, group


def _sample(key: str, group: dict[str, Member], descriptor: int, shard: Path) -> Sample:
    images = [extension for extension in group if extension in IMAGE_EXTENSIONS]
    if len(images) != 1:
        raise UserError(
            f"shard {shard}: sample {key!r} holds {len(images)} images ({', '.join(group)}); "
            f"a sample is one of .{', .'.join(IMAGE_EXTENSIONS)} and its side files"
        )
    image = group[images[0]]
    if image.size == 0:
        raise UserError(f"shard {shard}: image {image.name!r} is empty; pack the shard without it")
    label = NO_LABEL
    if LABEL_EXTENSION in group:
        member = group[LABEL_EXTENSION]
        text = os.pread(descriptor, min(member.size, _LONGEST_LABEL), member.offset).strip()
        if member.size > _LONGEST_LABEL or not re.fullmatch(rb"[0-9]{1,18}", text):
            raise UserError(
                f"shard {shard}: label {member.name!r} is {text!r}; allowed: an integer >= 0 of at most 18 digits"
            )
        label = int(text)
    return Sample(key, images[0], image.offset, image.size, label)


def _fingerprint(samples: Sequence[Sequence[Sample]]) -> str:
    """A hash of what the samples are and how they are ordered, not of where the shards lie."""
    digest = hashlib.sha256()
    for of_shard in samples:
        digest.update(b"shard\0")
        for s in of_shard:
            digest.update(f"{s.key}.{s.extension}\0{s.offset}\0{s.size}\0{s.label}\0".encode("utf-8", "replace"))
    return digest.hexdigest()
