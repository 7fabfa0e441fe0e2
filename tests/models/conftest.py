"""Tiny models, random images and noise; a seed makes them the same again."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mae.models.autoencoder import MaskedAutoencoder
from mae.models.settings import MaskedAutoencoderSettings

TINY: dict[str, Any] = {
    "width": 16,
    "depth": 2,
    "heads": 2,
    "patch_size": (4,),
    "decoder_width": 12,
    "decoder_depth": 1,
    "decoder_heads": 3,
}


@pytest.fixture
def tiny_settings() -> Callable[..., MaskedAutoencoderSettings]:
    """A function: settings of a tiny model, with some of them replaced."""
    return lambda **replaced: MaskedAutoencoderSettings(**(TINY | replaced))


@pytest.fixture
def tiny_autoencoder(
    tiny_settings: Callable[..., MaskedAutoencoderSettings],
) -> Callable[..., MaskedAutoencoder]:
    """A function: a tiny autoencoder of 16 patches of 4x4 pixels, unless told otherwise."""

    def build(
        image_size: tuple[int, int] = (16, 16), channels: int = 3, seed: int = 0, **settings: Any
    ) -> MaskedAutoencoder:
        torch.manual_seed(seed)
        return MaskedAutoencoder(tiny_settings(**settings), image_size, channels)

    return build


@pytest.fixture
def draw() -> Callable[..., tuple[Tensor, Tensor]]:
    """A function: normal images and uniform noise that fit a model."""

    def images_and_noise(model: MaskedAutoencoder, batch: int = 2) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        (rows, columns), (down, across) = model.grid, model.patch_size
        channels = model.encoder.patch_embed.proj.in_channels
        images = torch.randn(batch, channels, rows * down, columns * across, generator=generator)
        return images, torch.rand(batch, model.patches, generator=generator)

    return images_and_noise
