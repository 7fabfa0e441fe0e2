"""Layer norms of other libraries, which may add another number to the variance than ours do."""

import torch
from torch import nn

from mae.formats.facts import LAYER_NORM_EPS
from mae.formats.opening import StoredModel
from mae.models.encoder import build_encoder
from mae.models.weights import load_encoder


def take_norms(network: nn.Module, stored: StoredModel) -> None:
    """Let the norms of a network add the number that the model was trained with, so that its outputs are the same."""
    for module in network.modules():
        if stored.eps != LAYER_NORM_EPS and isinstance(module, nn.LayerNorm):
            module.eps = stored.eps


def norms_measured(stored: StoredModel) -> tuple[str, ...]:
    """Return in words how much features change in a run, whose norms add our number; nothing if it is the same."""
    if stored.eps == LAYER_NORM_EPS:
        return ()
    return (
        f"its norms add {stored.eps:g} to a variance, here {LAYER_NORM_EPS:g}: features of noise differ by "
        f"{_difference(stored):.1e} of the greatest",
    )


def _difference(stored: StoredModel) -> float:
    """Return the greatest difference of a feature of one image of noise, as a share of the greatest feature."""
    description = stored.description
    with torch.random.fork_rng(devices=[]):  # its first weights are drawn at random
        encoder = build_encoder(
            description.encoder(), description.image_size, description.channels, pool=description.pool
        ).eval()
    load_encoder(encoder, stored.weights, stored.path)
    image = torch.randn(1, description.channels, *description.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = encoder(image)
        take_norms(encoder, stored)
        theirs = encoder(image)
    return float((ours - theirs).abs().max() / theirs.abs().max())
