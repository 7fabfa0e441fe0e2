"""The light decoders: mask tokens stand for the hidden patches, a few blocks turn them into pixels.

The attributes carry the names of the published weights. Both predict the patches that are asked for, and nothing else.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from mae.models.blocks import CrossBlock, DecoderBlock, layer_norm
from mae.models.encoder import init_weights
from mae.models.positions import sincos_positions
from mae.models.settings import Size


class SelfDecoder(nn.Module):
    """Mask tokens and visible tokens attend to each other (arXiv 2111.06377)."""

    def __init__(self, shape: Size, encoder: Size, grid: tuple[int, int], patch_pixels: int) -> None:
        super().__init__()
        self.decoder_embed = nn.Linear(encoder.width, shape.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.decoder_pos_embed = nn.Parameter(sincos_positions(grid, shape.width), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(DecoderBlock(shape.width, shape.heads) for _ in range(shape.depth))
        self.decoder_norm = layer_norm(shape.width)
        self.decoder_pred = nn.Linear(shape.width, patch_pixels)
        self.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self,
        encoded: Float[Tensor, "batch tokens encoder_width"],
        ids_keep: Int64[Tensor, "batch kept"],
        ids: Int64[Tensor, "batch predicted"],
    ) -> Float[Tensor, "batch predicted pixels"]:
        """Put the normed visible tokens to their places, mask tokens elsewhere, and predict the patches at `ids`."""
        tokens = self.decoder_embed(encoded)
        cls_token, visible = tokens[:, :1], tokens[:, 1:]
        batch, width, patches = len(tokens), tokens.shape[2], self.decoder_pos_embed.shape[1] - 1
        holes = self.mask_token.to(tokens.dtype).expand(batch, patches, width)
        filled = holes.scatter(1, ids_keep[:, :, None].expand(-1, -1, width), visible)
        sequence = torch.cat([cls_token, filled], dim=1) + self.decoder_pos_embed
        *blocks, last = self.decoder_blocks
        for block in blocks:
            sequence = block(sequence)
        # The loss looks at the predicted patches only, and no attention follows this block. The first token is the cls.
        decoded = last(sequence, ids + 1)
        predicted: Tensor = self.decoder_pred(self.decoder_norm(decoded))
        return predicted


class CrossDecoder(nn.Module):
    """Mask tokens attend to the visible tokens alone, in each block to a mix of the encoder's layers of its own.

    CrossMAE, arXiv 2401.14391: no prediction depends on which others are asked for.
    """

    def __init__(self, shape: Size, encoder: Size, grid: tuple[int, int], patch_pixels: int) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.decoder_pos_embed = nn.Parameter(sincos_positions(grid, shape.width), requires_grad=False)
        self.decoder_mix = nn.Parameter(torch.zeros(shape.depth, encoder.depth + 1))
        self.decoder_norms = nn.ModuleList(layer_norm(encoder.width) for _ in range(shape.depth))
        self.decoder_blocks = nn.ModuleList(
            CrossBlock(shape.width, shape.heads, encoder.width) for _ in range(shape.depth)
        )
        self.decoder_norm = layer_norm(shape.width)
        self.decoder_pred = nn.Linear(shape.width, patch_pixels)
        self.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.normal_(self.decoder_mix, std=(encoder.depth + 1) ** -0.5)

    def forward(
        self, layers: list[Float[Tensor, "batch tokens encoder_width"]], ids: Int64[Tensor, "batch predicted"]
    ) -> Float[Tensor, "batch predicted pixels"]:
        """Predict the patches at `ids` from what stands before the encoder's first block and after each."""
        tokens = self.mask_token + self.decoder_pos_embed[0, 1:][ids]
        mixes = (self.decoder_mix @ torch.stack(layers).flatten(1)).view(-1, *layers[0].shape)
        for block, norm, mix in zip(self.decoder_blocks, self.decoder_norms, mixes, strict=True):
            tokens = block(tokens, norm(mix))
        predicted: Tensor = self.decoder_pred(self.decoder_norm(tokens))
        return predicted


DECODERS = {"self": SelfDecoder, "cross": CrossDecoder}
