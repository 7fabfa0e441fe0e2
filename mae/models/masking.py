"""Random masking by argsort of noise (arXiv 2111.06377, section 3)."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


class Mask(NamedTuple):
    """Which patches the encoder sees; every image keeps the same number."""

    ids_keep: Int64[Tensor, "batch kept"]
    """Kept patches, in the random order of the noise."""
    hidden: Bool[Tensor, "batch patches"]
    """True where a patch is hidden."""


def kept_patches(patches: int, mask_ratio: float) -> int:
    """How many of `patches` stay visible; the published rule rounds down."""
    return int(patches * (1 - mask_ratio))


def random_mask(noise: Float[Tensor, "batch patches"], mask_ratio: float) -> Mask:
    """Keep the patches with the smallest noise; equal noise keeps the earlier patch on every device."""
    kept = kept_patches(noise.shape[1], mask_ratio)
    ids_keep = noise.argsort(dim=1, stable=True)[:, :kept]
    hidden = torch.ones_like(noise, dtype=torch.bool).scatter_(1, ids_keep, False)
    return Mask(ids_keep, hidden)
