"""Settings of the commands that apply a model to images."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from mae.data.settings import DataSettings
from mae.data.store.unpacked import CACHE_BYTES
from mae.formats.opening import Normalization
from mae.models.description import ModelDescription
from mae.settings import check


@dataclass(frozen=True, kw_only=True)
class UnsaidSettings:
    """What a model of another library may not say of itself."""

    mean: tuple[float, ...] | None = None
    """Mean of each channel on a scale of 0 to 1, for a model that does not say its own."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel, likewise."""
    heads: int | None = None
    """Number of attention heads, likewise."""

    @property
    def normalization(self) -> Normalization | None:
        """Mean and std for a model that does not say its own.

        Raises:
            UserError: if only one of them is set.
        """
        check((self.mean is None) == (self.std is None), "mean", self.mean, "mean and std set together")
        return None if self.mean is None or self.std is None else Normalization(self.mean, self.std)


@dataclass(frozen=True, kw_only=True)
class ReadSettings(UnsaidSettings):
    """How images are read for a model, whose description decides their size and normalisation."""

    workers: int = 2
    """Processes that decode images, for each rank; 0: the rank itself decodes."""
    image_extension: str | None = None
    """Extension, after the first dot, of the images in shards, such as `image.jpg`; None: the usual extensions."""
    cache_dir: Path | None = None
    """Folder for features and for copies of shards; None: $XDG_CACHE_HOME/mae or ~/.cache/mae."""
    cache_bytes: float = CACHE_BYTES
    """Greatest total size of the copies of shards [bytes]."""

    def as_seen_by(self, model: ModelDescription) -> DataSettings:
        """Return the settings with which shards are read for a model."""
        return DataSettings(
            workers=self.workers,
            image_extension=self.image_extension,
            cache_dir=self.cache_dir,
            cache_bytes=self.cache_bytes,
            image_size=model.image_size,
            channels=model.channels,
            mean=model.mean,
            std=model.std,
            crop_pct=model.crop_pct,
            value_range=model.value_range,
        )


@dataclass(frozen=True)
class ApplySettings(ReadSettings):
    """Settings of the commands that apply a model to images."""

    model: Positional[Path]
    """Folder of a run, of a checkpoint or of an export, or a model file; of a fine-tuning run that measured accuracy,
    the best model is taken. Or a folder or file of timm, transformers, torchvision or the original MAE code;
    hub:OWNER/NAME; timm:NAME."""
    source: Positional[tuple[str, ...]]
    """Image files, globs, folders (with all folders in them), or tar shards: paths, globs, braces, folders or URLs."""

    def __post_init__(self) -> None:
        check(len(self.source) > 0, "source", "none given", "image files, folders or shards")
        check(self.workers >= 0, "workers", self.workers, "0 or more")
