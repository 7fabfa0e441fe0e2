"""A ResNet-18 that is trained from scratch: what a small convolutional network makes of the same labels."""

from functools import partial

import timm
from torch import nn
from torch.optim import SGD, Optimizer

from mae.evaluation.protocols.frozen import crop_and_flip
from mae.evaluation.protocols.training import Recipe, TrainingRules
from mae.models.description import ModelDescription
from mae.tasks.classification_loss import RegularizationSettings

NAME = "resnet18"
RATES = (0.03, 0.1, 0.3)
"""Peak learning rates to choose from, per 256 images."""
_WEIGHT_DECAY, _MOMENTUM = 5e-4, 0.9
_SMALL = 64


def recipe(description: ModelDescription, classes: int, rules: TrainingRules) -> Recipe:
    """Return the recipe: SGD with momentum, crops and flips, and label smoothing, but no mixed images."""
    smoothing = rules.regularization.label_smoothing
    return Recipe(
        build=partial(_network, description, classes),
        optimizer=_sgd,
        rates=RATES,
        warmup=1 / 20,
        augment=crop_and_flip(rules.augment),
        regularization=RegularizationSettings(drop_path=0.0, label_smoothing=smoothing, mixup=0.0, cutmix=0.0),
        normalizes_batches=True,
    )


def _network(description: ModelDescription, classes: int) -> nn.Module:
    """Return timm's ResNet-18; for images below 64 pixels, it keeps their resolution in its first layer."""
    network: nn.Module = timm.create_model(NAME, num_classes=classes, in_chans=description.channels)
    if min(description.image_size) < _SMALL:
        network.conv1 = nn.Conv2d(description.channels, 64, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    return network


def _sgd(module: nn.Module) -> Optimizer:
    groups = [{"params": list(module.parameters()), "lr_scale": 1.0}]
    return SGD(groups, lr=0.0, momentum=_MOMENTUM, weight_decay=_WEIGHT_DECAY, nesterov=True)
