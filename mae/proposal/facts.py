"""Facts from which settings are proposed: what the images are, how many, and what this machine can do."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from mae.data.images.levels import WideValues
from mae.data.packing.sources import DEFAULT_SPLIT
from mae.data.statistics import PixelStatistics
from mae.models.settings import MaskedAutoencoderSettings

_HELD_OUT = ("val", "valid", "validation", "test")


@dataclass(frozen=True)
class SplitFacts:
    """Images of one split; all are counted."""

    name: str
    images: int
    per_class: Mapping[int, int] = field(default_factory=dict)
    """Number of images of each label that occurs; empty without labels."""
    shards: tuple[str, ...] = ()
    """Patterns that name its shards; none if it has to be packed first."""
    folder: str = ""
    """Folder of its image files; empty for shards."""

    @property
    def labelled(self) -> bool:
        """Whether each image has a label."""
        return self.images > 0 and sum(self.per_class.values()) == self.images


@dataclass(frozen=True)
class ImageFacts:
    """What some images are; they were drawn by a fixed seed, or spread evenly over the shards."""

    sampled: int
    """Number of images that were read, good and bad."""
    sizes: tuple[tuple[int, int], ...]
    """(height, width) of each good image [pixels]."""
    planes: Mapping[int, int]
    """Number of images by the number of colour planes in the file."""
    transparent: int = 0
    """Number of images in which alpha is not 1 everywhere."""
    arrays: int = 0
    """Number of `.npy` arrays, which can be read only with the number of channels that they have."""
    wide: WideValues = field(default_factory=WideValues)
    """Values of the images of more than 8 bits."""
    statistics: PixelStatistics | None = None
    """None if the channels differ or some images have more than 8 bits."""
    measured: int = 0
    """Number of images on which `statistics` were measured."""
    bad: tuple[str, ...] = ()
    """`name (reason)` of each bad image."""
    decode_seconds: float = 0.0
    """Median time to decode an image, on one core."""
    view_seconds: float = 0.0
    """Median time to resize a decoded image, on one core."""


@dataclass(frozen=True)
class MachineFacts:
    """What this machine can do."""

    cores: int
    memory: int
    """Bytes that the processes of this machine may take."""
    flops: float
    """Floating-point operations per second that training of a small model reaches, on one GPU or on all cores."""
    measured: Mapping[tuple[MaskedAutoencoderSettings, tuple[int, int]], float] = field(default_factory=dict)
    """The same of models that were measured, by model and image size."""
    gpu: str = ""
    """Name of the GPU; empty: none."""
    gpus: int = 0
    has_bf16: bool = False
    load: float = 0.0
    """Mean number of programs that wanted a core in the last minute."""

    def flops_of(self, model: MaskedAutoencoderSettings, image_size: tuple[int, int]) -> float:
        """Return the operations per second with this model: measured, else those of the small one."""
        return self.measured.get((model, image_size), self.flops)


@dataclass(frozen=True)
class Facts:
    """Everything that the rules know."""

    source: str
    name: str
    """Short name of the set, for folders."""
    splits: tuple[SplitFacts, ...]
    """The first is trained on."""
    images: ImageFacts
    """Images of the first split."""
    machine: MachineFacts
    class_names: tuple[str, ...] = ()
    pack_flags: tuple[str, ...] = ()
    """Flags that `mae pack` needs to read the source as it was read here."""
    notices: tuple[str, ...] = ()
    """Lines about files that are left out, and the like."""
    hours: float | None = None
    """Time that pretraining may take; None: 1 hour on a CPU, any time on a GPU."""

    def shards_of(self, split: SplitFacts) -> tuple[str, ...]:
        """Return patterns that name the shards of a split, which may still have to be packed."""
        return split.shards or (f"{self.packed}/{split.name}-*.tar",)

    @property
    def packed(self) -> str:
        """Folder for the shards."""
        return f"shards/{self.name}"

    @property
    def run_dir(self) -> str:
        """Folder for the pretraining run."""
        return f"runs/{self.name}"

    @property
    def tuned_dir(self) -> str:
        """Folder for the fine-tuning run."""
        return f"{self.run_dir}-finetuned"

    @property
    def train(self) -> SplitFacts:
        """Split to train on."""
        return next((split for split in self.splits if split.name == DEFAULT_SPLIT), self.splits[0])

    @property
    def held_out(self) -> SplitFacts | None:
        """Split to choose settings by: val, under any of its names, else test."""
        others = {split.name: split for split in self.splits if split is not self.train}
        return next((others[name] for name in _HELD_OUT if name in others), None)

    @property
    def final(self) -> SplitFacts | None:
        """Split to measure the end result on: test, else the one that is held out."""
        return next((split for split in self.splits if split.name == "test"), None) or self.held_out

    @property
    def classes(self) -> int:
        """Number of classes of the training images; 0 without labels."""
        return len(self.train.per_class) if self.train.labelled else 0
