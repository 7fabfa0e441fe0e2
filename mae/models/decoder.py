"""The light decoder: mask tokens fill the holes, a few blocks predict the pixels.

The attributes carry the names of the published weights.
"""

from functools import partial

import torch
from jaxtyping import Float, Int64
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mae.models.encoder import init_weights
from mae.models.positions import sincos_positions

_NORM_EPS = 1e-6


class Decoder(nn.Module):
    """Encoded visible tokens -> predicted pixels of every patch."""

    def __init__(
        self, encoder_width: int, width: int, depth: int, heads: int, grid: tuple[int, int], patch_pixels: int
    ) -> None:
        super().__init__()
        self.decoder_embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(sincos_positions(grid, width), requires_grad=False)
        norm = partial(nn.LayerNorm, eps=_NORM_EPS)
        self.decoder_blocks = nn.Sequential(
            *(Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        )
        self.decoder_norm = norm(width)
        self.decoder_pred = nn.Linear(width, patch_pixels)
        self.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self, encoded: Float[Tensor, "batch tokens encoder_width"], ids_keep: Int64[Tensor, "batch kept"]
    ) -> Float[Tensor, "batch patches pixels"]:
        """Put the visible tokens back to their places, mask tokens elsewhere, and predict every patch."""
        tokens = self.decoder_embed(encoded)
        cls_token, visible = tokens[:, :1], tokens[:, 1:]
        batch, width, patches = len(tokens), tokens.shape[2], self.decoder_pos_embed.shape[1] - 1
        holes = self.mask_token.to(tokens.dtype).expand(batch, patches, width)
        filled = holes.scatter(1, ids_keep[:, :, None].expand(-1, -1, width), visible)
        sequence = torch.cat([cls_token, filled], dim=1) + self.decoder_pos_embed
        decoded = self.decoder_norm(self.decoder_blocks(sequence))
        predicted: Tensor = self.decoder_pred(decoded[:, 1:])
        return predicted
