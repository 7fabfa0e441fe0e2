"""Settings of the evaluation while pretraining."""

import math
from dataclasses import dataclass

from mae.schema import MayChange
from mae.settings import check


@dataclass(frozen=True)
class OnlineEvaluationSettings:
    """Evaluation while pretraining, which never changes the weights."""

    eval_shards: MayChange[tuple[str, ...]] = ()
    """Tar shards on which the held-out reconstruction loss and the rank of the features are measured; none: no
    evaluation while pretraining."""
    train_shards: MayChange[tuple[str, ...]] = ()
    """Labelled tar shards from which k-NN and the few-shot probe classify the images of eval_shards; none: neither."""
    every: MayChange[float | None] = None
    """Epochs between evaluations; None: as often as they take at most 3 % of the floating-point operations of training.
    The last is at the end of the run."""
    images: MayChange[int] = 2000
    """Most images that are taken of eval_shards, and of train_shards, spread evenly."""
    shots: MayChange[int] = 10
    """Labelled images of each class that the few-shot probe is fitted on, or all that were taken, if fewer."""

    def __post_init__(self) -> None:
        every = self.every
        check(every is None or 0 < every < math.inf, "evaluation.every", every, "above 0, or None")
        check(self.images >= 1, "evaluation.images", self.images, "1 or more")
        check(self.shots >= 1, "evaluation.shots", self.shots, "1 or more")
        check(
            bool(self.eval_shards) or not self.train_shards,
            "evaluation.train_shards", self.train_shards, "none without evaluation.eval_shards",
        )  # fmt: skip
