"""Features of whole images, read from the tokens of an encoder."""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mae.models.vit import TokenKind

NormKind = Literal["raw", "normed"]
"""Place to read it: before or after the encoder's last norm."""
TOKENS: tuple[TokenKind, ...] = get_args(TokenKind)
NORMS: tuple[NormKind, ...] = get_args(NormKind)


def encode_all(
    encoder: VisionTransformer, images: Float[Tensor, "batch channels height width"]
) -> Float[Tensor, "batch tokens encoder_width"]:
    """Return the tokens after the last block, without the last norm: the cls token, then the patches by row."""
    ((patches, prefix),) = encoder.forward_intermediates(
        images, indices=1, output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True
    )
    return torch.cat([prefix, patches], dim=1)


def read_features(
    encoder: VisionTransformer, images: Float[Tensor, "batch channels height width"]
) -> Float[Tensor, "batch norms both"]:
    """Return all features of normalised images, from which `select` takes one kind.

    The norms are those of `NORMS`. Along the last axis are the cls token and the mean of the patch tokens. With the
    last norm, each token is normed before the mean is taken; after it in a classifier that pools by `avg`.
    """
    return features_of_tokens(encoder, encode_all(encoder, images))


def features_of_tokens(
    encoder: VisionTransformer, raw: Float[Tensor, "batch tokens encoder_width"]
) -> Float[Tensor, "batch norms both"]:
    """Return all features of images, as `read_features` does, from the tokens of `encode_all`."""
    # A classifier that pools by `avg` has `fc_norm`, and no `norm`; others the other way round.
    normed = torch.cat([encoder.fc_norm(part) for part in _cls_and_mean(encoder.norm(raw)).chunk(2, dim=1)], dim=1)
    return torch.stack([_cls_and_mean(raw), normed], dim=1)


def select(
    features: Float[Tensor, "batch norms both"], tokens: TokenKind, norm: NormKind
) -> Float[Tensor, "batch feature"]:
    """Return one kind of feature: width values, or twice as many for `cls+avg`."""
    both = features[:, NORMS.index(norm)]
    cls, mean = both.chunk(2, dim=1)
    return {"cls": cls, "avg": mean, "cls+avg": both}[tokens]


def _cls_and_mean(tokens: Float[Tensor, "batch tokens encoder_width"]) -> Float[Tensor, "batch both"]:
    return torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)
