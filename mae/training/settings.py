"""Settings that every training pipeline shares."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, Final, Literal

from mae.data.images.augment import AugmentSettings
from mae.data.settings import DataSettings
from mae.models.execution import Checkpointing
from mae.models.settings import EncoderSettings
from mae.schema import MayChange
from mae.settings import check
from mae.training.optimizer import OptimSettings
from mae.training.trackers.settings import TrackerName

AUTO: Final = "auto"
"""Value of `micro_batch_size` that stands for the largest that fits."""
SCRATCH: Final = "none"
"""Value of `init` that stands for random weights."""
# So many epochs of 1e9 samples are still a number of steps in 64 bits.
_MOST_EPOCHS = 1e9
_BATCH_SIZE, _MICRO_BATCH_SIZE = ("--batch_size", "--batch-size"), "--micro_batch_size"


@dataclass(frozen=True)
class ExportAtEndSettings:
    """Export at the end of a run, which never changes the weights."""

    targets: MayChange[tuple[str, ...]] = ()
    """Libraries or formats to which the model is exported when the run is finished, into export-TARGET in run_dir, as
    `mae export` does: timm, transformers, onnx, ...; or all that can hold it. One that is not possible is refused at
    the start."""


@dataclass(frozen=True)
class TrainSettings:
    """Length of a run, size of its batches, and what it writes when."""

    REMOVED: ClassVar[dict[str, object]] = {}
    """Last default of each setting that was removed, by full name; runs that had another value are refused."""
    FIRST: ClassVar[tuple[str, ...]] = (
        "data.shards", "run_dir", "init", "model.size", "data.image_size", "epochs", "batch_size", "optim.base_lr",
    )  # fmt: skip
    """Settings that the help shows first."""

    run_dir: MayChange[Path]
    """Folder of this run: settings, log, checkpoints, pictures, report. The same command resumes it."""
    init: str = SCRATCH
    """Model whose weights a new run starts with, on its own schedule: a finished run; a folder or file of timm,
    transformers, torchvision or the original MAE code; hub:OWNER/NAME; timm:NAME. Images, patches and channels may be
    others. none: random weights. To resume a run, give its run_dir instead."""
    seed: int = 0
    """Key of all random numbers: weights, order, crops, masks, drop path."""
    epochs: float = 100.0
    """Number of times each sample is seen; the last batch is completed from the next epoch."""
    batch_size: int = 256
    """Global batch [images per optimiser step], over all processes and accumulation steps."""
    micro_batch_size: int | Literal["auto"] | None = None
    """Most images that a process takes at a time; a larger share of the batch is accumulated. None: no limit. auto: the
    largest that fits into memory, found at the start. --batch_size auto is short for --micro_batch_size auto."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of the blocks; auto: bf16 on a GPU that has it, else fp32. The loss is always fp32."""
    compile: bool = False
    """Compile each transformer block with torch.compile: minutes at the start, faster steps after. It may round sums
    differently. Off, because the gain on GPUs has not been measured yet."""
    activation_checkpointing: MayChange[Checkpointing] = "none"
    """Activations that are computed again for the gradient instead of kept; the weights stay the same, to the bit.
    gelu: each GELU's output, for a fifth less memory and a few hundredths more time. blocks: all but each block's
    input, for far less memory and a third more time."""
    log_every: MayChange[int] = 50
    """Steps between lines of metrics.jsonl; each line waits once for the device."""
    checkpoint_every: MayChange[int] = 1000
    """Steps between checkpoints; one more is written at the end."""
    keep_checkpoints: MayChange[int] = 2
    """Number of newest checkpoints that are kept."""
    keep_every: MayChange[int | None] = None
    """Also keep each checkpoint whose step is a multiple of this number. None: keep no others."""
    resume: MayChange[Path | None] = None
    """Checkpoint folder from which a new run continues, with its step and data position. Once the run has checkpoints,
    it is resumed from its own."""
    ema_decay: float | None = None
    """Decay of a moving average of the weights, which is then drawn, evaluated and published. None: no average."""
    ema_warmup: bool = False
    """Let the decay rise to ema_decay as in timm: it is 1 - step^(-2/3) as long as that is less."""
    skip_at_most: MayChange[int] = 10
    """Number of steps that may be skipped in a row because loss or gradient is not finite. Then the run returns once to
    the weights of its last checkpoint and continues with new data; the second time it ends."""
    timeout: MayChange[float] = 600.0
    """Seconds after which a process that does not answer, or a worker without a batch, ends the run."""
    restart_data_order: MayChange[bool] = False
    """Let a run resume on other data than its checkpoint was trained on; otherwise this is refused."""
    trackers: MayChange[tuple[TrackerName, ...]] = ()
    """Trackers that are also given the figures, settings and pictures of the run, a step once a checkpoint covers it.
    metrics.jsonl is always written."""
    tracker_project: MayChange[str] = "mae"
    """Project of the run in trackio and wandb, experiment in mlflow; a run that has begun stays in its own."""
    record_samples: MayChange[bool] = False
    """Append the sample ids of each step to samples-rankN.jsonl, to audit the order."""
    data: DataSettings = field(default_factory=DataSettings)
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    model: EncoderSettings = field(default_factory=EncoderSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    export: ExportAtEndSettings = field(default_factory=ExportAtEndSettings)

    def __post_init__(self) -> None:
        check(0 <= self.seed < 1 << 64, "seed", self.seed, "0 or more, below 2^64")
        check(0 < self.epochs <= _MOST_EPOCHS, "epochs", self.epochs, f"above 0, at most {_MOST_EPOCHS:g}")
        check(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        counts = ("micro_batch_size", "log_every", "checkpoint_every", "keep_checkpoints", "keep_every", "skip_at_most")
        for name in counts:
            value = getattr(self, name)
            check(value in (None, AUTO) or value >= 1, name, value, "1 or more")
        check(self.ema_decay is None or 0 < self.ema_decay < 1, "ema_decay", self.ema_decay, "between 0 and 1, or None")
        check(not self.ema_warmup or self.ema_decay is not None, "ema_warmup", True, "False, or set ema_decay")
        check(bool(self.tracker_project.strip()), "tracker_project", repr(self.tracker_project), "a name")
        check(1 <= self.timeout < math.inf, "timeout", self.timeout, "1 or more seconds")

    @property
    def micro_batch_limit(self) -> int | None:
        """Largest micro-batch; None if there is no limit, or it has not been found yet."""
        return None if self.micro_batch_size == AUTO else self.micro_batch_size


def spelled_out(argv: Sequence[str]) -> list[str]:
    """Return `argv` with `--batch_size auto`, which keeps the global batch, as `--micro_batch_size auto`."""
    words = list(argv)
    for at, (word, following) in enumerate(pairwise([*argv, ""])):
        if word in _BATCH_SIZE and following == AUTO:
            words[at] = _MICRO_BATCH_SIZE
        elif word in (f"{flag}={AUTO}" for flag in _BATCH_SIZE):
            words[at] = f"{_MICRO_BATCH_SIZE}={AUTO}"
    return words
