"""The classifier: the pretrained encoder with a head on its normed cls token, the mean of its patch tokens, or both."""

from collections import OrderedDict
from typing import Literal

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mae.models.encoder import build_encoder
from mae.models.settings import EncoderSettings
from mae.models.vit import TokenKind

HeadKind = Literal["mlp", "linear"]


def build_classifier(
    settings: EncoderSettings,
    image_size: tuple[int, int],
    channels: int,
    classes: int,
    head: HeadKind,
    drop_path: float = 0.0,
    pool: TokenKind = "cls",
) -> VisionTransformer:
    """Return a timm ViT whose `head` is a linear layer, or an MLP with one hidden layer of the encoder's width.

    Its positions are learned, as in the published fine-tuning.
    """
    classifier = build_encoder(settings, image_size, channels, drop_path, pool)
    classifier.pos_embed.requires_grad_(True)
    classifier.num_classes = classes
    classifier.head = build_head(head, settings.shape.width, classes, pool)
    return classifier


def features_of(pool: TokenKind, width: int) -> int:
    """Return the number of features that the head of an encoder of this width sees."""
    return 2 * width if pool == "cls+avg" else width


def build_head(kind: HeadKind, width: int, classes: int, pool: TokenKind = "cls") -> nn.Module:
    """Return a head with small last weights and zero biases.

    `linear` is one layer, features -> classes; `mlp` is features -> width, GELU, width -> classes.
    """
    features = features_of(pool, width)
    last = nn.Linear(features if kind == "linear" else width, classes)
    nn.init.trunc_normal_(last.weight, std=2e-5)
    nn.init.zeros_(last.bias)
    if kind == "linear":
        return last
    hidden = nn.Linear(features, width)
    nn.init.xavier_uniform_(hidden.weight)
    nn.init.zeros_(hidden.bias)
    return nn.Sequential(OrderedDict(fc1=hidden, act=nn.GELU(), fc2=last))
