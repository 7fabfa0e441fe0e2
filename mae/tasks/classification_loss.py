"""Cross-entropy loss of a classifier, with label smoothing, mixup, cutmix and weights of classes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional

from mae.data.labelled_sets import empty_classes
from mae.errors import UserError, first_of
from mae.settings import check


@dataclass(frozen=True)
class RegularizationSettings:
    """Regularization of a classifier: stochastic depth, label smoothing, mixup and cutmix."""

    drop_path: float = 0.1
    """Rate of stochastic depth at the last block; it rises linearly from 0 at the first."""
    label_smoothing: float = 0.1
    """Share of the target that is spread evenly over all classes."""
    mixup: float = 0.8
    """Alpha of mixup's beta distribution; 0 turns it off."""
    cutmix: float = 1.0
    """Alpha of cutmix's beta distribution; 0 turns it off. With both on, one is chosen at random for each batch."""

    def __post_init__(self) -> None:
        for name in ("drop_path", "label_smoothing"):
            value = getattr(self, name)
            check(0 <= value < 1, f"regularization.{name}", value, "from 0, below 1")
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            check(0 <= value < math.inf, f"regularization.{name}", value, "0 or more")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs."""
        return self.mixup > 0 or self.cutmix > 0

    def require_pairs(self, images: int) -> None:
        """Raise a `UserError` if images are mixed in pairs, and a process takes an odd number of `images` at a time."""
        if self.mixes and images % 2:
            raise UserError(
                f"mixup and cutmix pair the images of a batch, but a process takes {images} at a time; choose a "
                "batch_size that gives each process an even number, or set regularization.mixup and "
                "regularization.cutmix to 0"
            )


class ClassificationLoss:
    """Loss of a batch, which mixes the images in pairs first if mixup or cutmix is on.

    With weights of classes, the loss of an image is -sum(weight * target * log probability) over the classes, and the
    loss of a batch is the mean over its images. So it does not matter which images are in one batch.
    """

    def __init__(self, regularization: RegularizationSettings, classes: int, weights: Tensor | None = None) -> None:
        """Take the `weights` of the classes [classes], or None if all count the same."""
        smoothing = regularization.label_smoothing
        self._mix = None
        if regularization.mixes:
            self._mix = Mixup(
                regularization.mixup, regularization.cutmix, label_smoothing=smoothing, num_classes=classes
            )
        self._smoothing, self._classes, self._weights = smoothing, classes, weights
        self._soft = SoftTargetCrossEntropy()
        self._hard = nn.CrossEntropyLoss(label_smoothing=smoothing)

    def __call__(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of normalised images [batch channels height width] and their labels [batch]."""
        targets = labels
        if self._mix is not None:
            inputs, targets = self._mix(inputs, labels)
        logits = model(inputs).float()
        if self._weights is not None:
            if self._mix is None:
                targets = self._smoothed(labels)
            return functional.cross_entropy(logits, targets, self._weights.to(logits.device))
        loss: Tensor = (self._hard if self._mix is None else self._soft)(logits, targets)
        return loss

    def _smoothed(self, labels: Tensor) -> Tensor:
        one_hot = functional.one_hot(labels, self._classes).float()
        return (1 - self._smoothing) * one_hot + self._smoothing / self._classes


def balanced_weights(counts: NDArray[np.int64], names: Sequence[str] | None) -> Tensor:
    """Return the weight N / (K n) of each of K classes, n samples of N: scikit-learn's `balanced`, float32 [classes].

    Raises:
        UserError: if a class has no sample.
    """
    if empty := empty_classes(counts, names):
        raise UserError(
            f"class_weights balanced needs samples of each class, but {len(empty)} of {len(counts)} have none: "
            f"{first_of(empty)}; add samples, remove the classes from classes.txt, or set class_weights none"
        )
    return torch.from_numpy(counts.sum() / (len(counts) * counts)).float()
