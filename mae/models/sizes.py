"""Sizes of transformers: width, number of blocks, attention heads."""

from typing import NamedTuple


class Size(NamedTuple):
    """Width [channels of a token], number of blocks and attention heads of an encoder or a decoder."""

    width: int
    depth: int
    heads: int


SIZES = {
    "tiny": Size(192, 12, 3),
    "small": Size(384, 12, 6),
    "base": Size(768, 12, 12),
    "large": Size(1024, 24, 16),
    "huge": Size(1280, 32, 16),
}
"""Name of a size, as `model.size` takes it -> the encoder's size."""

TEMPERATURE = 10_000.0
"""Published temperature of the sine-cosine positions."""
