"""Fixed two-dimensional sine-cosine positions (arXiv 2111.06377, appendix A.1), and tables for another image size."""

import torch
from jaxtyping import Float
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor
from torch.nn import functional

from mae.models.sizes import TEMPERATURE


def sincos_positions(
    grid: tuple[int, int], width: int, temperature: float = TEMPERATURE
) -> Float[Tensor, "1 tokens width"]:
    """Return positions of a cls token (zeros) and of the patches of a grid of (rows, columns), row by row.

    As in the published weights, the first half of the channels encodes the column and the second half the row, each
    as `width / 4` sines and then as many cosines with frequencies temperature**(-i / (width / 4)). timm's table has
    the two halves in the opposite order.
    """
    rows_first = build_sincos2d_pos_embed(list(grid), dim=width, temperature=temperature, interleave_sin_cos=True)
    row, column = rows_first.chunk(2, dim=1)
    patches = torch.cat([column, row], dim=1)
    return torch.cat([torch.zeros(1, width), patches])[None]


def resample_positions(
    table: Float[Tensor, "1 old_tokens width"], old: tuple[int, int], new: tuple[int, int]
) -> Float[Tensor, "1 new_tokens width"]:
    """Resample a table of positions from a grid of (rows, columns) to another; the row of the cls token stays.

    Resampling is bicubic and antialiased, as in timm's `resample_abs_pos_embed`, which before 1.0.31 confuses 2x8 with
    4x4.
    """
    if old == new:
        return table
    image = table[:, 1:].reshape(1, *old, -1).permute(0, 3, 1, 2)
    resampled = functional.interpolate(image.float(), new, mode="bicubic", antialias=True)
    patches = resampled.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)
    return torch.cat([table[:, :1], patches], dim=1)
