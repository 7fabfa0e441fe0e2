"""The decoder of the masked autoencoder's paper (arXiv 2111.06377), with the names of its published weights."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from mae.models.blocks import DecoderBlock, block_flops, init_weights, layer_norm, linear_flops
from mae.models.decoders.base import Decoder
from mae.models.sizes import Size


class SelfDecoder(Decoder):
    """Mask tokens and visible tokens attend to each other."""

    reads_normed_output = True

    def __init__(self, shape: Size, encoder: Size, grid: tuple[int, int], patch_pixels: int) -> None:
        super().__init__(shape, encoder, grid, patch_pixels)
        self.decoder_embed = nn.Linear(encoder.width, shape.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.decoder_blocks = nn.ModuleList(DecoderBlock(shape.width, shape.heads) for _ in range(shape.depth))
        self.decoder_norm = layer_norm(shape.width)
        self.decoder_pred = nn.Linear(shape.width, patch_pixels)
        self.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self,
        layers: list[Float[Tensor, "batch tokens encoder_width"]],
        ids_keep: Int64[Tensor, "batch kept"],
        ids: Int64[Tensor, "batch predicted"],
    ) -> Float[Tensor, "batch predicted pixels"]:
        """Put the visible tokens at their places, mask tokens elsewhere, and predict the patches at `ids`."""
        tokens = self.decoder_embed(layers[-1])
        cls_token, visible = tokens[:, :1], tokens[:, 1:]
        batch, width, patches = len(tokens), tokens.shape[2], self.decoder_pos_embed.shape[1] - 1
        holes = self.mask_token.to(tokens.dtype).expand(batch, patches, width)
        filled = holes.scatter(1, ids_keep[:, :, None].expand(-1, -1, width), visible)
        sequence = torch.cat([cls_token, filled], dim=1) + self.decoder_pos_embed
        *blocks, last = self.decoder_blocks
        for block in blocks:
            sequence = block(sequence)
        # Only predicted patches enter the loss, and no attention follows the last block. The first token is the cls.
        decoded = last(sequence, ids + 1)
        predicted: Tensor = self.decoder_pred(self.decoder_norm(decoded))
        return predicted

    def flops(self, visible: int, predicted: int) -> int:
        """Count the embedding, the blocks, of which the last computes predicted patches only, and the prediction."""
        width, everything = self.decoder_pred.in_features, self.decoder_pos_embed.shape[1]
        return (
            linear_flops(visible, self.decoder_embed.in_features, width)
            + (len(self.decoder_blocks) - 1) * block_flops(everything, everything, width, width)
            + block_flops(predicted, everything, width, width)
            + linear_flops(predicted, width, self.decoder_pred.out_features)
        )
