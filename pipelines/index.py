"""Check shards strictly, and store the position of every sample.

mae index 'shards/train-*.tar'
"""

import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tyro.conf import Positional

from mae.data.index import ShardIndex, save_pixels
from mae.data.indexing import beside, index_of
from mae.data.left_out import described
from mae.data.measuring import check_images
from mae.data.read_rules import ReadRules, check_image_extension
from mae.data.scan import NO_LABEL
from mae.data.store.shards import Shard, expand
from mae.data.store.unpacked import CACHE_BYTES, default_cache_dir
from mae.errors import UserError, first_of, one_line_errors
from mae.output import say
from mae.processes import default_workers
from mae.progress import progress_bar
from mae.settings import check, parse

BAD_FILE = "bad-images.txt"


@dataclass(frozen=True)
class IndexSettings:
    """Check tar shards strictly; store the position, checksum and label of every sample, and the pixel statistics."""

    EXAMPLE: ClassVar = "mae index 'shards/train-*.tar'"

    shards: Positional[tuple[str, ...]]
    """Tar shards: paths, globs, braces, folders, or the same with s3://, gs://, hf:// or http(s)://."""
    out: Path | None = None
    """Folder of the index; None: beside the shards if possible, where training finds it, else in the cache."""
    check: bool = False
    """Verify the checksum of every image and decode it; list bad images, and measure mean and std on all good ones."""
    workers: int | None = None
    """Number of processes that read shards or decode images; None: one per core."""
    cache_dir: Path | None = None
    """Folder for copies of remote and gzipped shards; None: $XDG_CACHE_HOME/mae or ~/.cache/mae."""
    cache_bytes: float = CACHE_BYTES
    """Greatest total size of these copies [bytes]."""
    image_extension: str | None = None
    """Extension, after the first dot, of the images, such as `image.jpg` where each key also has a `mask.png`; training
    needs the same in data.image_extension. None: the usual extensions of images."""

    def __post_init__(self) -> None:
        check(bool(self.shards), "shards", self.shards, "one or more tar files, such as 'shards/train-*.tar'")
        check(self.cache_bytes > 0, "cache_bytes", self.cache_bytes, "above 0")
        check_image_extension("image_extension", self.image_extension)
        check(self.workers is None or self.workers >= 0, "workers", self.workers, "0 or more, or None")


def run(settings: IndexSettings) -> ShardIndex:
    """Make or verify the index, and print a summary.

    Raises:
        UserError: if a shard is damaged; or, after the index is stored, if images are bad.
    """
    shards = expand(settings.shards)
    cache_dir = settings.cache_dir or default_cache_dir()
    workers = default_workers() if settings.workers is None else settings.workers
    rules = ReadRules(settings.image_extension, settings.cache_bytes)
    place = settings.out or _writable(beside(shards, rules.image_extension))
    index = index_of(shards, cache_dir, place, workers, say, rules)
    bad = index.bad()
    if settings.check:
        with progress_bar("decoding", len(index)) as advance:
            pixels, bad = check_images(index, cache_dir, settings.cache_bytes, workers, advance)
        with _writing(index.folder):
            index = save_pixels(index, pixels.statistics(), pixels.images)
        if pixels.wide.images:
            say(pixels.wide.advice)
    for line in describe(index, shards):
        say(line, is_result=True)
    if bad:
        listed = index.folder / BAD_FILE
        with _writing(index.folder):
            listed.write_text("\n".join(bad) + "\n", encoding="utf-8", errors="surrogateescape")
        raise UserError(
            f"{len(bad)} of {len(index)} images are bad: {first_of(bad)}; all are listed in {listed}. Restore images "
            "that have changed; pack the shards without the others (mae pack SHARDS --out DIR --skip_bad True), or "
            "train with --data.max_bad_samples"
        )
    return index


def describe(index: ShardIndex, shards: Sequence[Shard]) -> list[str]:
    """Summarize an index in a few lines."""
    extensions: Counter[str] = Counter()
    for entry in index.entries:
        extensions.update(entry.extensions)
    labelled = int((index.label != NO_LABEL).sum())
    empty = sum(not entry.samples for entry in index.entries)
    rows = {
        "shards": f"{len(shards):,}, {sum(shard.size for shard in shards) / 1e6:,.1f} MB"
        + (f", of which {empty:,} have no images" if empty else ""),
        "samples": f"{len(index):,}",
        "labels": f"{labelled:,}" + (f", from 0 to {index.label.max()}" if labelled else ""),
        **({"classes": _classes(index)} if labelled == len(index) else {}),
        "files": ", ".join(f"{count:,} .{name}" for name, count in extensions.items()),
        "no image": f"{len(index.without_image()):,} keys",
        "left out": described(index.left_out()) or "nothing",
        "pixels": f"{index.pixels or 'of mixed channels, or of more than 8 bits'}, from {index.pixels_of:,} images",
        "fingerprint": index.fingerprint[:16],
        "index": str(index.folder),
    }
    return [f"{name:<12} {value}" for name, value in rows.items()]


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}; choose another --out") from None


def _classes(index: ShardIndex) -> str:
    """Return the number of classes, or why fine-tuning would refuse the labels."""
    try:
        return str(index.class_count())
    except UserError as error:
        return f"warning: {error}"


def _writable(folder: Path | None) -> Path | None:
    """Return the folder beside the shards if it can be created, else None."""
    return folder if folder and os.access(folder.parent.parent, os.W_OK) else None


def main(argv: Sequence[str] | None = None) -> None:
    """Run `mae index`."""
    with one_line_errors():
        run(parse(IndexSettings, sys.argv[1:] if argv is None else argv, prog="mae index"))


if __name__ == "__main__":
    main()
