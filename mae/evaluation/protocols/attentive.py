"""Attentive probe: efficient probing (Psomas et al., ICLR 2026), learned queries attend to frozen patch tokens."""

import math

import torch
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from mae.evaluation.protocols.frozen import FrozenProbe, batch_normed_linear, crop_and_flip
from mae.evaluation.protocols.starting import Start
from mae.evaluation.protocols.training import Recipe, TrainingRules
from mae.models.readout import encode_all

QUERIES = 32
"""Number of queries, as published; the greatest common divisor with the width, if that is no multiple of it."""
RATES = (1e-3, 3e-3, 1e-2)
"""Peak learning rates to choose from, per 256 images."""


def recipe(start: Start, classes: int, rules: TrainingRules) -> Recipe:
    """Return the recipe of the attentive probe of an encoder."""
    width = start.description.width
    queries = math.gcd(QUERIES, width)

    def build() -> nn.Module:
        head = nn.Sequential(EfficientProbe(width, queries), *batch_normed_linear(width, classes))
        return FrozenProbe(start.frozen_encoder(), _raw_patches, head)

    about = {"queries": queries, "tokens": "patches raw"}
    return Recipe(
        build, _adamw, RATES, warmup=1 / 9, augment=crop_and_flip(rules.augment), about=about, normalizes_batches=True
    )


class EfficientProbe(nn.Module):
    """Attention of learned queries to tokens, each of which fills its share of the output.

    Output share q of an image is sum_t softmax_t(query_q . token_t / sqrt(width)) * value_t[share q]. The keys are the
    tokens themselves; the values are one projection of the tokens, without bias.
    """

    def __init__(self, width: int, queries: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, width) * 0.02)
        self.value = nn.Linear(width, width, bias=False)

    def forward(self, tokens: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch width"]:
        """Return one vector for each image."""
        batch, count, width = tokens.shape
        weights = torch.einsum("qw,btw->bqt", self.queries, tokens * width**-0.5).softmax(dim=2)
        values = self.value(tokens).view(batch, count, len(self.queries), -1)
        return torch.einsum("bqt,btqv->bqv", weights, values).flatten(1)


def _raw_patches(
    encoder: VisionTransformer, images: Float[Tensor, "batch channels height width"]
) -> Float[Tensor, "batch patches encoder_width"]:
    return encode_all(encoder, images)[:, 1:]


def _adamw(module: nn.Module) -> Optimizer:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return AdamW([{"params": trained, "lr_scale": 1.0}], lr=0.0, weight_decay=0.0)
