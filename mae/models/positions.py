"""Fixed two-dimensional sine-cosine positions (arXiv 2111.06377, appendix A.1)."""

import torch
from jaxtyping import Float
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor


def sincos_positions(grid: tuple[int, int], width: int) -> Float[Tensor, "1 tokens width"]:
    """Positions of a cls token (zeros) and of the patches of a grid of (rows, columns), row by row.

    As in the published weights the first half of the channels encodes the column and the second half the
    row, each as `width / 4` sines followed by as many cosines with frequencies 10000**(-i / (width / 4)).
    timm's table has the halves the other way round.
    """
    rows_first = build_sincos2d_pos_embed(list(grid), dim=width, interleave_sin_cos=True)
    row, column = rows_first.chunk(2, dim=1)
    patches = torch.cat([column, row], dim=1)
    return torch.cat([torch.zeros(1, width), patches])[None]
