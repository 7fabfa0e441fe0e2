"""Which images, and how they reach the model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mae.data.store.shards import default_cache_dir
from mae.settings import check


@dataclass(frozen=True)
class DataSettings:
    """Which images, and how they reach the model."""

    shards: tuple[str, ...] = ()
    """Tar shards to train on: paths, globs, braces or folders; .tar.gz is unpacked into the cache."""
    workers: int = 4
    """Processes per rank that decode images; 0 decodes in the training process. Changes speed only."""
    threads: int = 1
    """Threads of each of these processes. Changes speed only."""
    image_size: tuple[int, ...] = (224,)
    """Height and width [pixels] of the images the model sees; one number for a square."""
    channels: int = 3
    """1 gray, 3 RGB, 4 RGBA, or any number that .npy images have."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel on a scale of 0..1; None: what `mae pack` stored, else measured at the start."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel on a scale of 0..1; None: as for mean."""
    crop_pct: float = 0.875
    """Evaluation resizes so that the central crop is this share of the image's side (timm's crop_pct)."""
    decode_on: Literal["cpu", "device"] = "cpu"
    """Where JPEGs are decoded, cut and resized; device: by nvJPEG on a GPU, for machines with few processors. The
    pixels then differ by a level or so."""
    keep_decoded: bool = False
    """Keep every decoded image in the memory of each worker; for sets of a few hundred megabytes of pixels."""
    cache_dir: Path | None = None
    """Where remote and gzipped shards are kept on this machine; None: $XDG_CACHE_HOME/mae or ~/.cache/mae."""
    cache_bytes: float = 100e9
    """Most bytes of remote shards that are kept on this machine at a time."""
    index: Path | None = None
    """Folder of the shards' index; None: beside the shards, or in the cache where that cannot be written."""
    max_bad_samples: int = 0
    """Bad images that are replaced by their next good neighbours and listed in the run folder; one more stops the
    run."""
    skip_without_image: bool = False
    """Pass over samples that have a label or text but no image; otherwise they stop the run."""
    reader: Literal["indexed", "stream"] = "indexed"
    """indexed: every sample once an epoch, in an exact order; stream: for sources without range requests, with weaker
    promises, which are printed at the start."""
    stream_samples: int | None = None
    """Samples that count as an epoch of a stream, which does not know how many it has."""
    views_per_image: int = 1
    """Crops, each under a mask of its own, that are cut from one decoding (repeated augmentation). They count as so
    many samples: an epoch of N samples then shows N / views_per_image images. The views of an image stand in the same
    batch."""
    chunk_samples: int = 64
    """Consecutive samples that the order moves as one, and that are read from remote shards as one."""
    window_chunks: int = 16
    """Chunks whose samples are mixed with each other, in each lane."""
    lanes: int = 64
    """Places of the shuffled set that every global batch is drawn from. Sets of at most lanes * window_chunks *
    chunk_samples samples are shuffled as a whole."""

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
        check(self.max_bad_samples >= 0, "data.max_bad_samples", self.max_bad_samples, "0 or more")
        check(0 < self.crop_pct <= 1, "data.crop_pct", self.crop_pct, "above 0, at most 1")
        check((self.mean is None) == (self.std is None), "data.mean", self.mean, "mean and std set together")
        for name, values in (("data.mean", self.mean), ("data.std", self.std)):
            if values is not None:
                check(len(values) == self.channels, name, values, f"{self.channels} numbers (data.channels)")
                check(all(0 <= v <= 1 for v in values), name, values, "numbers from 0 to 1")
        check(self.std is None or min(self.std) > 0, "data.std", self.std, "numbers above 0")

    @property
    def cache(self) -> Path:
        """The folder that `cache_dir` means."""
        return self.cache_dir or default_cache_dir()

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.image_size[0], self.image_size[-1]
