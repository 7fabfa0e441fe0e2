"""The decoder of CrossMAE (arXiv 2401.14391)."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from mae.models.blocks import CrossBlock, block_flops, init_weights, layer_norm, linear_flops
from mae.models.decoders.base import Decoder
from mae.models.sizes import Size


class CrossDecoder(Decoder):
    """Mask tokens attend to visible tokens only; each block sees its own learned mix of the encoder's layers.

    No prediction depends on which other patches are predicted.
    """

    reads_normed_output = False  # `decoder_norms` norms each mix
    decayed = ("decoder_mix",)

    def __init__(self, shape: Size, encoder: Size, grid: tuple[int, int], patch_pixels: int) -> None:
        super().__init__(shape, encoder, grid, patch_pixels)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, shape.width))
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
        self,
        layers: list[Float[Tensor, "batch tokens encoder_width"]],
        ids_keep: Int64[Tensor, "batch kept"],
        ids: Int64[Tensor, "batch predicted"],
    ) -> Float[Tensor, "batch predicted pixels"]:
        """Predict the patches at `ids` from mixes of the encoder's layers."""
        tokens = self.mask_token + self.decoder_pos_embed[0, 1:][ids]
        mixes = (self.decoder_mix @ torch.stack(layers).flatten(1)).view(-1, *layers[0].shape)
        for block, norm, mix in zip(self.decoder_blocks, self.decoder_norms, mixes, strict=True):
            tokens = block(tokens, norm(mix))
        predicted: Tensor = self.decoder_pred(self.decoder_norm(tokens))
        return predicted

    def flops(self, visible: int, predicted: int) -> int:
        """Count the mixes of layers, the blocks and the prediction, which see predicted patches only."""
        (depth, layers), encoder_width = self.decoder_mix.shape, next(self.decoder_norms.parameters()).numel()
        width = self.decoder_pred.in_features
        return (
            linear_flops(visible * encoder_width, layers, depth)
            + depth * block_flops(predicted, visible, width, encoder_width)
            + linear_flops(predicted, width, self.decoder_pred.out_features)
        )

    @staticmethod
    def default_shape(encoder: Size) -> Size:
        """Return half as many blocks again as `self` has, since each costs less."""
        width, depth, heads = Decoder.default_shape(encoder)
        return Size(width, depth * 3 // 2, heads)
