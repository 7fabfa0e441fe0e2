"""Linear probe of the MAE paper (arXiv 2111.06377, table 10): batch norm and a linear layer, trained by LARS."""

from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from timm.optim import Lars
from torch import Tensor, nn
from torch.optim import Optimizer

from mae.evaluation.protocols.frozen import FrozenProbe, batch_normed_linear, crop_and_flip
from mae.evaluation.protocols.starting import Start
from mae.evaluation.protocols.training import Recipe, TrainingRules

RATES = (0.1, 1.0, 10.0)
"""Peak learning rates to choose from, per 256 images. 0.1 is published, and too low for the few steps of small sets."""
_MOMENTUM = 0.9


def recipe(start: Start, classes: int, rules: TrainingRules) -> Recipe:
    """Return the recipe of the published linear probe of an encoder."""
    width = start.description.width

    def build() -> nn.Module:
        return FrozenProbe(start.frozen_encoder(), _normed_cls, nn.Sequential(*batch_normed_linear(width, classes)))

    return Recipe(
        build,
        lars,
        RATES,
        warmup=1 / 9,
        augment=crop_and_flip(rules.augment),
        about={"tokens": "cls normed"},
        normalizes_batches=True,
    )


def lars(module: nn.Module) -> Optimizer:
    """Return LARS (You et al. 2017, arXiv 1708.03888) without weight decay, which scales the steps of matrices only."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "always_adapt": True, "lr_scale": 1.0},
        {"params": [p for p in trained if p.ndim <= 1], "always_adapt": False, "lr_scale": 1.0},
    ]
    optimizer: Optimizer = Lars(groups, lr=0.0, momentum=_MOMENTUM, weight_decay=0.0)
    return optimizer


def _normed_cls(
    encoder: VisionTransformer, images: Float[Tensor, "batch channels height width"]
) -> Float[Tensor, "batch encoder_width"]:
    features: Tensor = encoder(images)
    return features
