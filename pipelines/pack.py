"""Pack images into WebDataset shards.

mae pack images/train --out shards
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from tyro.conf import Positional

from mae.data.packing.class_list import fixed_classes
from mae.data.packing.engines import process_engine, ray_engine
from mae.data.packing.items import Source, shown
from mae.data.packing.pack import describe_part, pack_shards
from mae.data.packing.plan import PackRules, plan_splits
from mae.data.packing.publish import Packed, describe, publish
from mae.data.packing.sources import find_splits
from mae.data.packing.trees import Labels
from mae.data.store.unpacked import default_cache_dir
from mae.errors import UserError, one_line_errors
from mae.output import say
from mae.processes import default_workers
from mae.progress import progress_bar, working
from mae.settings import check, parse

DIGITS = "digits"


@dataclass(frozen=True)
class PackSettings:
    """Write images into tar shards that WebDataset, timm, Hugging Face datasets and mae read; resume if interrupted."""

    EXAMPLE: ClassVar = "mae pack images/train --out shards"
    FIRST: ClassVar = ("out", "split")

    source: Positional[str]
    """A labelled tree (class/image), a flat folder of images, tar shards (path, glob, braces, folder or URL), a
    folder with one of these in each of train/, val/, valid/, validation/ or test/, or the word digits for
    scikit-learn's scanned digits. GIF (first frame), AVIF and HEIC (pip install 'mae-pretraining[heic]') become PNG."""
    out: Path
    """Folder of the shards, with their index, classes.txt and _info.json (counts, mean, std)."""
    split: str | None = None
    """Name of the split: shards are called SPLIT-000000.tar. None: train, or the splits of the source: its folders
    train/, val/, valid/, validation/ and test/ (capitals or not); for digits train, val and test."""
    labels: Labels = "auto"
    """folders: the topmost folder of an image is its class; none: images have no label, at any depth, and .cls files
    of shards stay out. auto: folders if the images are in folders, none if all are in one."""
    classes: Path | None = None
    """File with one class name per line, in the order of labels; it may list classes that have no images. None: the
    classes.txt in `out`, or else the names of the class folders in alphabetical order."""
    shard_samples: int = 10_000
    """Maximum number of images in a shard."""
    shard_bytes: float = 1e9
    """Bytes of source files after which a new shard starts."""
    shuffle: bool = True
    """Shuffle the images in a fixed order, so that each shard contains a mixture of classes."""
    provenance: bool = False
    """Store each image's source path beside it, in a .json file."""
    skip_bad: bool = False
    """Leave out images that cannot be decoded, and list them; otherwise one bad image prevents publishing."""
    short_side: int | None = None
    """Reduce larger images to this many pixels on their short side, as JPEG with `quality`; encode other JPEGs again if
    that saves bytes. 16-bit gray, palettes, CMYK, alpha and .npy stay unchanged. Training reads smaller images faster,
    but they lose detail: with 384 and quality 90, photos have half the bytes, and training crops differ from those of
    the originals by about 35 dB PSNR; with 256, by 29 dB. None: image bytes stay unchanged."""
    quality: int = 90
    """JPEG quality of the images that short_side encodes again."""
    workers: int | None = None
    """Number of worker processes; 0: no workers, this process packs; None: one per core."""
    engine: Literal["processes", "ray"] = "processes"
    """Where workers run: processes on this machine; or the Ray cluster of RAY_ADDRESS or of this machine, whose nodes
    must all see source and out under the same paths (pip install 'mae-pretraining[ray]')."""
    shard_range: tuple[int, int] | None = None
    """START STOP: pack only shards START to STOP - 1 of the plan, as one job of several; when all are packed, the same
    command without shard_range publishes them. 0 0 only makes the plan and prints the number of shards. Jobs with
    shard_range use an existing plan without listing the source again."""

    def __post_init__(self) -> None:
        check(self.shard_samples >= 1, "shard_samples", self.shard_samples, "1 or more")
        check(self.shard_bytes > 0, "shard_bytes", self.shard_bytes, "above 0")
        check(self.short_side is None or self.short_side >= 1, "short_side", self.short_side, "1 or more, or None")
        check(1 <= self.quality <= 100, "quality", self.quality, "1 to 100")
        check(self.workers is None or self.workers >= 0, "workers", self.workers, "0 or more, or None")
        start, stop = self.shard_range or (0, 0)
        check(0 <= start <= stop, "shard_range", f"{start} {stop}", "START STOP with 0 <= START <= STOP")
        is_name = self.split is None or (bool(self.split) and not set(self.split) & set("/%{}*?[]."))
        check(is_name, "split", repr(self.split), "a name without / % { } * ? [ ] .")
        check(self.classes is None or self.labels != "none", "classes", self.classes, "None with --labels none")


def run(settings: PackSettings) -> dict[str, Packed]:
    """Pack every split of the source; return the published splits by name."""
    sources = _sources(settings)
    rules = PackRules(
        shard_samples=settings.shard_samples,
        shard_bytes=settings.shard_bytes,
        seed=0 if settings.shuffle and settings.source != DIGITS else None,  # digits are shuffled before they are split
        provenance=settings.provenance,
        short_side=settings.short_side,
        quality=settings.quality,
    )
    workers = default_workers() if settings.workers is None else settings.workers
    is_part = settings.shard_range is not None
    with working("looking at the source"):
        plans, published = plan_splits(sources, settings.out, rules, is_trusted=is_part), dict[str, Packed]()
    for split in sorted(sources.keys() - {plan.split for plan in plans}):
        say(f"{split}: packed before this command was interrupted")
    for plan in plans:
        for notice in plan.notices:
            say(f"{plan.split}: {notice}")
        shards = range(*(min(number, plan.shards) for number in settings.shard_range or (0, plan.shards)))
        with progress_bar(f"packing {plan.split}", plan.starts[shards.stop] - plan.starts[shards.start]) as advance:
            engine = ray_engine(workers) if settings.engine == "ray" else process_engine(workers)
            pack_shards(plan, shards, engine, advance)
        if is_part:
            say(describe_part(plan, shards), is_result=True)
        else:
            published[plan.split] = publish(plan, settings.skip_bad)
            say(describe(plan, published[plan.split]), is_result=True)
    return published


def _sources(settings: PackSettings) -> Mapping[str, Source]:
    """Return the source of each split by its name."""
    if settings.source == DIGITS:
        from mae.data.packing.digits import digit_sources  # noqa: PLC0415 (scikit-learn is slow to import)

        for name, usual in (("split", None), ("labels", "auto"), ("classes", None)):
            found = getattr(settings, name)
            check(found == usual, name, found, f"{usual} for the source digits")
        return digit_sources()
    known = fixed_classes(settings.classes, settings.out)
    return find_splits(settings.source, settings.split, default_cache_dir(), known, settings.labels)


def main(argv: Sequence[str] | None = None) -> None:
    """Run `mae pack`."""
    with one_line_errors():
        settings = parse(PackSettings, sys.argv[1:] if argv is None else argv, prog="mae pack")
        try:
            run(settings)
        except OSError as error:
            where, reason = shown(str(error.filename or settings.out)), error.strerror or error
            raise UserError(f"{where}: {reason}; correct that, then run the same command again") from None


if __name__ == "__main__":
    main()
