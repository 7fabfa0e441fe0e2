"""Settings of packing."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from tyro.conf import Positional

from mae.data.packing.trees import Labels
from mae.settings import check

DIGITS = "digits"
"""Source that is no path: scikit-learn's scanned digits."""


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
    label_file: Path | None = None
    """CSV file (or TSV) with the class of each image: a line of headings, then its path in the source, with or without
    extension, and its class. Images without a line are left out and counted. None: labels come as labels says."""
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
        check(self.label_file is None or self.labels == "auto", "labels", self.labels, "auto with --label_file")
