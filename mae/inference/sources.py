"""Images that a user names: files, folders and shards, in the order given."""

import glob
from bisect import bisect_right
from collections.abc import Callable, Sequence
from hashlib import sha256
from itertools import accumulate
from pathlib import Path

from mae.data.classes import class_names
from mae.data.index import ShardIndex
from mae.data.indexing import open_index
from mae.data.left_out import LeftOut, count_into, described
from mae.data.packing.trees import entries, image_extension, walk
from mae.data.settings import DataSettings
from mae.data.store.shards import SUFFIXES
from mae.data.store.urls import scheme_of
from mae.errors import UserError
from mae.files import open_regular
from mae.inference.image_set import ImageSet, ShardImages
from mae.output import one_line
from mae.processes import default_workers


class FileImages(ImageSet):
    """Image files by path. They have no labels: the names of folders are not taken for classes."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths

    @property
    def fingerprint(self) -> str:
        """Hash of names, sizes and times of change."""
        digest = sha256()
        for path in self._paths:
            digest.update(f"{path}\0{_state(path)}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, number: int) -> str:
        """Return the path of an image."""
        return self._paths[number]

    def label(self, number: int) -> int | None:
        """Return None: files have no labels."""
        return None

    def read(self, number: int) -> bytes:
        """Return the bytes of an image file."""
        try:
            with open_regular(Path(self._paths[number])) as file:
                return file.read()
        except OSError as error:
            raise UserError(f"it cannot be read: {error.strerror}") from None


def _state(path: str) -> str:
    """Return size and time of change of a file; of one that is not there, as behind a broken link, that it is not."""
    try:
        found = Path(path).stat()
    except OSError as error:
        return str(error.strerror)
    return f"{found.st_size}\0{found.st_mtime_ns}"


class JoinedImages(ImageSet):
    """Several sets, one after the other."""

    def __init__(self, sets: Sequence[ImageSet]) -> None:
        self._sets = sets
        self._starts = [0, *accumulate(map(len, sets))]

    @property
    def fingerprint(self) -> str:
        """Hash of the fingerprints of all sets; that of a single set."""
        prints = [each.fingerprint for each in self._sets]
        return prints[0] if len(prints) == 1 else sha256("".join(prints).encode()).hexdigest()

    def __len__(self) -> int:
        return self._starts[-1]

    def name(self, number: int) -> str:
        """Return the path or the key of an image."""
        images, number = self._of(number)
        return images.name(number)

    def label(self, number: int) -> int | None:
        """Return the label of an image; None if it has none."""
        images, number = self._of(number)
        return images.label(number)

    def class_name(self, label: int) -> str | None:
        """Return the name of a label; all sets that have names have the same."""
        return next((name for each in self._sets if (name := each.class_name(label)) is not None), None)

    def read(self, number: int) -> bytes:
        """Return the bytes of an image file."""
        images, number = self._of(number)
        return images.read(number)

    def will_need(self, numbers: range) -> None:
        """Prefetch some images."""
        for images, start in zip(self._sets, self._starts, strict=False):
            own = range(max(numbers.start - start, 0), min(numbers.stop - start, len(images)))
            if own:
                images.will_need(own)

    def _of(self, number: int) -> tuple[ImageSet, int]:
        place = bisect_right(self._starts, number) - 1
        return self._sets[place], number - self._starts[place]


def open_images(sources: Sequence[str], data: DataSettings, say: Callable[[str], None]) -> JoinedImages:
    """Return the images that `sources` name, in the order given.

    A source is an image file, a glob of image files, a folder of images (searched in all its folders, by name), or
    shards: a tar, a folder, a glob, braces or a URL.

    Raises:
        UserError: if a source does not exist or has no images, a shard is damaged, or the class lists of two sources
            differ.
    """
    left_out: LeftOut = {}
    found: list[ShardIndex | list[str]] = []
    for source in sources:
        files = _files(source, left_out)
        if files is None:
            found.append(open_index([source], data.cache, None, default_workers(), say, data.rules))
        elif files:
            found.append(files)
        else:
            raise UserError(f"{source} holds no image of a known format{_beside(left_out)}; give another source")
    # One list for all sources: with different ones, a label would have two names.
    names = class_names([entry.shard for each in found if isinstance(each, ShardIndex) for entry in each.entries], say)
    if left_out:
        say(f"left out: {described(left_out)}")
    return JoinedImages(
        [ShardImages(each, data, names) if isinstance(each, ShardIndex) else FileImages(each) for each in found]
    )


def _files(source: str, left_out: LeftOut) -> list[str] | None:
    """Return the image files of a source; None if it is made of shards."""
    if scheme_of(source) or source.endswith(SUFFIXES):
        return None
    count = count_into(left_out)
    if Path(source).is_dir():
        found = [f"{source.rstrip('/')}/{name}" for name in walk(source, "", frozenset())]
        if any(name.endswith(SUFFIXES) for name in entries(source)[0]):
            for path in filter(image_extension, found):
                count("images beside shards", one_line(path))
            return None
    elif Path(source).exists():
        return [source]  # an image whatever its name, or else a row that says why not
    else:
        found = sorted(glob.glob(source))  # noqa: PTH207 - the pattern may be absolute
        if not found:
            raise UserError(f"{source} does not exist; give image files, folders or shards")
    for path in found:
        if not image_extension(path):
            count("files that are no images", one_line(path))
    return [path for path in found if image_extension(path)]


def _beside(left_out: LeftOut) -> str:
    return f" ({described(left_out)})" if left_out else ""
