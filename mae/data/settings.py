"""Images to train on, and how they reach the model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from mae.data.images.levels import SIXTEEN_BITS, check_value_range
from mae.data.read_rules import ReadRules, check_image_extension
from mae.data.store.unpacked import CACHE_BYTES, default_cache_dir
from mae.schema import Before, MayChange
from mae.settings import check


@dataclass(frozen=True)
class DataSettings:
    """Images to train on, and how they reach the model."""

    shards: MayChange[tuple[str, ...]] = ()
    """Tar shards to train on: paths, globs, braces or folders; .tar.gz is unpacked into the cache."""
    workers: MayChange[int] = 4
    """Processes per rank that decode images; 0: the training process decodes. Changes speed only."""
    threads: MayChange[int] = 1
    """Decoding threads per worker. Changes speed only."""
    image_size: tuple[int, ...] = (224,)
    """Height and width [pixels] of the images the model sees; one number for a square."""
    channels: int = 3
    """Channels of an image: 1 gray, 3 RGB, 4 RGBA, or any number in .npy images."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel on a scale of 0 to 1; None: as stored by `mae pack`, else measured at the start."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel on a scale of 0 to 1; None: as for data.mean."""
    crop_pct: float = 0.875
    """Side of the central crop in evaluation, as a share of the resized image's side (timm's crop_pct)."""
    value_range: Annotated[tuple[float, ...] | None, Before(SIXTEEN_BITS)] = None
    """LOW HIGH, or a pair for each channel: values from LOW (black) to HIGH (white, exclusive) are divided into 256
    levels, in images of more than 8 bits; others stay as they are. `0 4096` for 12 bits, `0 1` for numbers from 0 to 1.
    None: of 16 bits the upper eight are kept, if most are in use; other images need a range."""
    decode_on: Literal["cpu", "device"] = "cpu"
    """Where JPEGs are decoded, cropped and resized. device: by nvJPEG on a GPU, for machines with few processors; the
    pixels then differ by about one level of 255."""
    keep_decoded: MayChange[bool] = False
    """Keep all decoded images in the memory of each worker; for sets of a few hundred megabytes of pixels."""
    cache_dir: MayChange[Path | None] = None
    """Folder for copies of remote and gzipped shards; None: $XDG_CACHE_HOME/mae or ~/.cache/mae."""
    cache_bytes: MayChange[float] = CACHE_BYTES
    """Greatest total size of these copies [bytes]; unpacked shards count first."""
    index: MayChange[Path | None] = None
    """Folder of the shard index; None: beside the shards, or in the cache if that folder is read-only."""
    max_bad_samples: MayChange[int] = 0
    """Number of bad images that may be replaced by the next good one; they are listed in the run folder. One more stops
    the run."""
    image_extension: str | None = None
    """Extension, after the first dot, of the images to train on, such as `image.jpg` where each key also has a
    `mask.png`; other files are side files. None: the usual extensions of images."""
    skip_without_image: MayChange[bool] = False
    """Leave out samples that have a label or text but no image; otherwise they stop the run."""
    reader: Literal["indexed", "stream"] = "indexed"
    """indexed: each sample once per epoch, in an exact order. stream: for sources without range requests, with weaker
    promises, which are printed at the start."""
    stream_samples: int | None = None
    """Number of samples that count as an epoch of a stream, whose length is unknown."""
    views_per_image: int = 1
    """Crops taken from each decoded image, each with its own mask (repeated augmentation). Each counts as a sample, so
    that an epoch of N samples shows N / views_per_image images. All views of an image are in the same batch."""
    chunk_samples: int = 64
    """Number of consecutive samples that the shuffled order keeps together, and that are read from remote shards at
    once."""
    window_chunks: int = 16
    """Number of chunks per lane whose samples are shuffled with each other."""
    lanes: int = 64
    """Number of places in the shuffled set from which each global batch is drawn. Sets of at most lanes *
    window_chunks * chunk_samples samples are shuffled completely."""

    def __post_init__(self) -> None:
        check(self.workers >= 0, "data.workers", self.workers, "0 or more")
        check(
            len(self.image_size) in (1, 2) and min(self.image_size) >= 1,
            "data.image_size",
            self.image_size,
            "one number, or height and width, each at least 1 pixel",
        )
        check(self.channels >= 1, "data.channels", self.channels, "1 or more")
        check(
            self.decode_on == "cpu" or (self.channels in (1, 3) and not self.keep_decoded and self.reader == "indexed"),
            "data.decode_on", self.decode_on, "device only for 1 or 3 channels, without keep_decoded and streams",
        )  # fmt: skip
        check(self.threads >= 1, "data.threads", self.threads, "1 or more")
        for name in ("views_per_image", "chunk_samples", "window_chunks", "lanes"):
            check(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "1 or more")
        samples = self.stream_samples
        check(samples is None or samples >= 1, "data.stream_samples", samples, "1 or more")
        check(
            self.reader != "stream" or samples is not None,
            "data.stream_samples", samples, "the number of samples that count as an epoch, with data.reader stream",
        )  # fmt: skip
        check(self.cache_bytes > 0, "data.cache_bytes", self.cache_bytes, "above 0")
        check_image_extension("data.image_extension", self.image_extension)
        check(self.max_bad_samples >= 0, "data.max_bad_samples", self.max_bad_samples, "0 or more")
        check(0 < self.crop_pct <= 1, "data.crop_pct", self.crop_pct, "above 0, at most 1")
        check_value_range("data.value_range", self.value_range, self.channels)
        check((self.mean is None) == (self.std is None), "data.mean", self.mean, "mean and std set together")
        for name, values in (("data.mean", self.mean), ("data.std", self.std)):
            if values is not None:
                check(len(values) == self.channels, name, values, f"{self.channels} numbers (data.channels)")
                check(all(0 <= v <= 1 for v in values), name, values, "numbers from 0 to 1")
        check(self.std is None or min(self.std) > 0, "data.std", self.std, "numbers above 0")

    @property
    def rules(self) -> ReadRules:
        """Rules by which shards are read."""
        return ReadRules(self.image_extension, self.cache_bytes)

    @property
    def cache(self) -> Path:
        """Folder for copies of shards."""
        return self.cache_dir or default_cache_dir()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        return self.image_size[0], self.image_size[-1]
