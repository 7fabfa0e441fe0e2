"""Fine-tuning of an encoder with a linear head, from its weights or from random ones."""

from functools import partial

from torch import nn
from torch.optim import Optimizer

from mae.evaluation.protocols.starting import Start
from mae.evaluation.protocols.training import Recipe, TrainingRules
from mae.tasks.finetune_settings import FinetuneOptimSettings
from mae.training.optimizer import build_optimizer, parameter_groups

RATES = (5e-4, 1e-3, 3e-3)
"""Peak learning rates to choose from, per 256 images."""
WARMUP = 1 / 20
"""Share of the steps in which the learning rate rises, as published: 5 of 100 epochs."""
OPTIM = FinetuneOptimSettings()


def recipe(start: Start, classes: int, rules: TrainingRules) -> Recipe:
    """Return the recipe of fine-tuning; if the start has no weights, of training from scratch, without layer decay."""
    build = partial(start.classifier, classes, rules.regularization.drop_path)
    optimizer = adamw if start.weights is None else layerwise
    return Recipe(build, optimizer, RATES, WARMUP, rules.augment, rules.regularization)


def adamw(module: nn.Module, layer_decay: float = 1.0) -> Optimizer:
    """Return AdamW with the weight decay of our fine-tuning defaults."""
    device = next(module.parameters()).device
    return build_optimizer(parameter_groups(module, OPTIM.weight_decay, layer_decay), OPTIM, device)


def layerwise(module: nn.Module) -> Optimizer:
    """Return AdamW with the weight decay and the layer decay of our fine-tuning defaults."""
    return adamw(module, OPTIM.layer_decay)
