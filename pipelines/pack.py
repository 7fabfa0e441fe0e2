"""Pack images into WebDataset shards.

mae pack images/train --out shards
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from tyro.conf import Positional

from mae.data.pack import (
    Item,
    Packed,
    default_workers,
    find_images,
    known_classes,
    shuffled,
    write_split,
)
from mae.data.shards import default_cache_dir
from mae.errors import one_line_errors
from mae.settings import check, parse

DIGITS = "digits"


@dataclass(frozen=True)
class PackSettings:
    """Write images into tar shards that WebDataset, timm, Hugging Face datasets and mae read."""

    source: Positional[str]
    """A labelled tree (class/image), a flat folder of images, tar shards (path, glob, braces or folder), or
    the word digits for scikit-learn's scanned digits."""
    out: Path
    """Folder of the shards, with classes.txt and _info.json (counts, mean, std)."""
    split: str = "train"
    """Name of this part: the shards are called SPLIT-000000.tar. digits writes train, val and test."""
    shard_samples: int = 10_000
    """Most images in a shard."""
    shard_bytes: float = 1e9
    """Bytes after which a new shard is begun."""
    shuffle: bool = True
    """Mix the images, by a key, so that no shard holds one class only."""
    provenance: bool = False
    """Store each image's source path beside it, in a .json file."""
    skip_bad: bool = False
    """Leave out images that cannot be decoded, and list them; otherwise nothing is packed if any is bad."""
    workers: int | None = None
    """Processes that decode images to check and measure them; None: one per core."""

    def __post_init__(self) -> None:
        check(self.shard_samples >= 1, "shard_samples", self.shard_samples, "1 or more")
        check(self.shard_bytes > 0, "shard_bytes", self.shard_bytes, "above 0")
        check(self.workers is None or self.workers >= 0, "workers", self.workers, "0 or more, or None")
        check(
            bool(self.split) and not set(self.split) & set("/%{}*?[]."), "split", repr(self.split),
            "a name without / % { } * ? [ ] .",
        )  # fmt: skip


def run(settings: PackSettings) -> dict[str, Packed]:
    """Pack every split of the source; returns what was written."""
    if settings.source == DIGITS:
        from mae.data.digits import CLASSES, digit_splits  # noqa: PLC0415 (scikit-learn is slow to import)

        return {name: _pack(items, name, CLASSES, settings) for name, items in digit_splits().items()}
    found = find_images(settings.source, default_cache_dir(), known_classes(settings.out))
    if found.ignored:
        sys.stdout.write(f"{len(found.ignored)} files are no images and stay out, the first: {found.ignored[0]}\n")
    items = shuffled(found.items, seed=0) if settings.shuffle else list(found.items)
    return {settings.split: _pack(items, settings.split, found.classes, settings)}


def _pack(items: Sequence[Item], split: str, classes: Sequence[str], settings: PackSettings) -> Packed:
    with _progress(f"packing {split}", len(items)) as advance:
        packed = write_split(
            items,
            settings.out,
            split,
            classes,
            settings.shard_samples,
            settings.shard_bytes,
            settings.provenance,
            settings.skip_bad,
            default_workers() if settings.workers is None else settings.workers,
            advance,
        )
    measured = packed.statistics
    sys.stdout.write(
        f"{split}: {packed.samples:,} images in {len(packed.filenames)} shards at {settings.out}"
        + (f", {len(classes)} classes" if classes else "")
        + (f", {measured}" if measured else "")
        + (f"; {len(packed.bad)} bad images left out, listed in {split}-bad-images.txt" if packed.bad else "")
        + "\n"
    )
    return packed


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    console = Console(file=sys.stderr)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)


def main(argv: Sequence[str] | None = None) -> None:
    """`mae pack`."""
    with one_line_errors():
        run(parse(PackSettings, sys.argv[1:] if argv is None else argv, prog="mae pack"))


if __name__ == "__main__":
    main()
