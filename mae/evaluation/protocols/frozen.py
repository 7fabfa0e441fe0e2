"""Heads that are trained on a frozen encoder, with augmented images."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae.data.images.augment import AugmentSettings


class FrozenProbe(nn.Module):
    """A frozen encoder and a head that is trained on what is read from it."""

    def __init__(
        self, encoder: VisionTransformer, read: Callable[[VisionTransformer, Tensor], Tensor], head: nn.Module
    ) -> None:
        super().__init__()
        self.encoder, self.read, self.head = encoder, read, head

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of normalised images."""
        with torch.no_grad():
            features = self.read(self.encoder, images)
        logits: Tensor = self.head(features)
        return logits


def batch_normed_linear(width: int, classes: int) -> tuple[nn.Module, nn.Module]:
    """Return the published head of a linear probe: batch norm without affine parameters, and a linear layer."""
    linear = nn.Linear(width, classes)
    nn.init.trunc_normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    return nn.BatchNorm1d(width, eps=1e-6, affine=False), linear


def crop_and_flip(augment: AugmentSettings) -> AugmentSettings:
    """Return the crops and flips of augment settings, without anything else."""
    return AugmentSettings(augment.crop_scale, augment.crop_ratio, augment.flip)
