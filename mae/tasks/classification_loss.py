"""Cross-entropy loss of a classifier, with label smoothing, mixup and cutmix."""

import math
from dataclasses import dataclass

from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

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


class ClassificationLoss:
    """Loss of a batch, which mixes the images in pairs first if mixup or cutmix is on."""

    def __init__(self, regularization: RegularizationSettings, classes: int) -> None:
        smoothing, self._mix = regularization.label_smoothing, None
        self._criterion = nn.CrossEntropyLoss(label_smoothing=smoothing)
        if regularization.mixes:
            self._criterion = SoftTargetCrossEntropy()
            self._mix = Mixup(
                regularization.mixup, regularization.cutmix, label_smoothing=smoothing, num_classes=classes
            )

    def __call__(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of normalised images [batch channels height width] and their labels [batch]."""
        targets = labels
        if self._mix is not None:
            inputs, targets = self._mix(inputs, labels)
        loss: Tensor = self._criterion(model(inputs).float(), targets)
        return loss
