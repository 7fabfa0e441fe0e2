"""A decoder as somebody adds it who reads `mae.models.decoders.base` only: other tokens, blocks and names."""

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from mae.models.blocks import CrossAttention, block_flops, init_weights, linear_flops
from mae.models.decoders.base import Decoder
from mae.models.patches import take
from mae.models.sizes import Size

NOTES = 3


class QueryBlock(nn.Module):
    """Queries attend to the visible tokens and to learned notes."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = CrossAttention(width, heads, width)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        queries = queries + self.attention(self.norm(queries), memory)
        mixed: Tensor = queries + self.mlp(self.norm(queries))
        return mixed


class ToyDecoder(Decoder):
    """A learned query for each patch attends to the visible tokens and to notes that all images share."""

    reads_normed_output = True

    def __init__(self, shape: Size, encoder: Size, grid: tuple[int, int], patch_pixels: int) -> None:
        super().__init__(shape, encoder, grid, patch_pixels)
        self.query = nn.Parameter(torch.empty(1, grid[0] * grid[1], shape.width))
        self.notes = nn.Parameter(torch.empty(NOTES, shape.width))
        self.patch_embed = nn.Linear(encoder.width, shape.width)
        self.decoder_blocks = nn.ModuleList(QueryBlock(shape.width, shape.heads) for _ in range(shape.depth))
        # Names that the encoder and the classifier have too.
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, patch_pixels)
        self.apply(init_weights)
        nn.init.normal_(self.query, std=0.02)
        nn.init.normal_(self.notes, std=0.02)

    def forward(self, layers: list[Tensor], ids_keep: Tensor, ids: Tensor) -> Tensor:
        batch = len(ids)
        memory = torch.cat([self.patch_embed(layers[-1]), self.notes.expand(batch, -1, -1)], dim=1)
        queries = take((self.query + self.decoder_pos_embed[:, 1:]).expand(batch, -1, -1), ids)
        for block in self.decoder_blocks:
            queries = block(queries, memory)
        predicted: Tensor = self.head(self.norm(queries))
        return predicted

    def flops(self, visible: int, predicted: int) -> int:
        width = self.head.in_features
        return (
            linear_flops(visible, self.patch_embed.in_features, width)
            + len(self.decoder_blocks) * block_flops(predicted, visible + NOTES, width, width)
            + linear_flops(predicted, width, self.head.out_features)
        )
