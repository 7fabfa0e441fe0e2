"""The settings that every training pipeline shares."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Final, Literal

from mae.data.images.augment import AugmentSettings
from mae.data.settings import DataSettings
from mae.models.execution import Checkpointing
from mae.models.settings import EncoderSettings
from mae.settings import check
from mae.training.optimizer import OptimSettings

AUTO: Final = "auto"
"""Value of `micro_batch_size` that asks for a search."""
SCRATCH: Final = "none"
"""Value of `init` that asks for random weights."""
_BATCH_SIZE, _MICRO_BATCH_SIZE = ("--batch_size", "--batch-size"), "--micro_batch_size"


@dataclass(frozen=True)
class TrainSettings:
    """How long, how large a batch, and what is written when."""

    run_dir: Path
    """Folder of this run: settings, log, checkpoints, pictures, report. The same command resumes it."""
    init: str = SCRATCH
    """Folder of a finished run, or a .safetensors file of one, whose weights a new run starts with, on a schedule of
    its own; its images may have had another size. none: random weights. To resume a run, give its run_dir instead."""
    seed: int = 0
    """Key of every random number: weights, order, crops, masks, drop path."""
    epochs: float = 100.0
    """How often each sample is seen; the last batch is completed from the next epoch."""
    batch_size: int = 256
    """Global batch [images per optimiser step], over all processes and accumulation steps."""
    micro_batch_size: int | Literal["auto"] | None = None
    """Most images that one process takes at a time; a larger share is accumulated. None: no limit; auto: as many as
    memory has room for, found by trial at the start. --batch_size auto is short for --micro_batch_size auto."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of the blocks; auto: bf16 on a GPU that has it, else fp32. The loss is always fp32."""
    compile: bool = False
    """Let torch compile each transformer block: minutes at the start, faster steps after. What it gains has not been
    measured on GPUs so far, hence it is off; sums may be rounded otherwise."""
    activation_checkpointing: Checkpointing = "none"
    """What is computed again for the gradient instead of kept, to the same bits. gelu: the output of each GELU, a fifth
    less memory for some hundredths more time; blocks: all but the input of each block, far less for a third more."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl; each costs one wait for the device."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; one more is written at the end."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    keep_every: int | None = None
    """A checkpoint of a step that this divides stays for ever."""
    resume: Path | None = None
    """Checkpoint folder that a new run begins from, step and data position included; later it goes on from its own."""
    ema_decay: float | None = None
    """Keep a running average of the weights, of which this share stays at each step; it is what is drawn, evaluated and
    published. None: off."""
    skip_at_most: int = 10
    """Steps in a row that may be skipped because loss or gradient is not finite. Then the weights go back to the last
    checkpoint and the data go on; the next time the run ends."""
    timeout: float = 600.0
    """Seconds after which a process that does not answer, or a worker without a batch, ends the run."""
    restart_data_order: bool = False
    """Let a resumed run go on with data that differ from those of its checkpoint; otherwise it is refused."""
    record_samples: bool = False
    """Append the sample ids of every step to samples-rankN.jsonl, to audit the order."""
    data: DataSettings = field(default_factory=DataSettings)
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    model: EncoderSettings = field(default_factory=EncoderSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)

    def __post_init__(self) -> None:
        check(self.seed >= 0, "seed", self.seed, "0 or more")
        check(0 < self.epochs < math.inf, "epochs", self.epochs, "above 0")
        check(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        counts = ("micro_batch_size", "log_every", "checkpoint_every", "keep_checkpoints", "keep_every", "skip_at_most")
        for name in counts:
            value = getattr(self, name)
            check(value in (None, AUTO) or value >= 1, name, value, "1 or more")
        check(self.ema_decay is None or 0 < self.ema_decay < 1, "ema_decay", self.ema_decay, "between 0 and 1, or None")
        check(1 <= self.timeout < math.inf, "timeout", self.timeout, "1 or more seconds")

    @property
    def micro_batch_limit(self) -> int | None:
        """`micro_batch_size`; None as long as it is not found."""
        return None if self.micro_batch_size == AUTO else self.micro_batch_size


def spelled_out(argv: Sequence[str]) -> list[str]:
    """`--batch_size auto` is short for `--micro_batch_size auto`: the global batch stays what it is."""
    words = list(argv)
    for at, (word, following) in enumerate(pairwise([*argv, ""])):
        if word in _BATCH_SIZE and following == AUTO:
            words[at] = _MICRO_BATCH_SIZE
        elif word in (f"{flag}={AUTO}" for flag in _BATCH_SIZE):
            words[at] = f"{_MICRO_BATCH_SIZE}={AUTO}"
    return words


# Settings that may differ when a run is resumed: they change speed, places or what is shown, never weights.
# The shards themselves are compared by their fingerprint, wherever they lie.
FREE_ON_RESUME = frozenset(
    {
        "run_dir",
        "log_every",
        "checkpoint_every",
        "keep_checkpoints",
        "keep_every",
        "resume",
        "timeout",
        "activation_checkpointing",
        "picture_every",
        "record_samples",
        "restart_data_order",
        "data.shards",
        "data.workers",
        "data.threads",
        "data.cache_dir",
        "data.cache_bytes",
        "data.index",
        "data.keep_decoded",
        "data.max_bad_samples",
        "eval_shards",
    }
)
