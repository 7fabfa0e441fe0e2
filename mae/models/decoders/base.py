"""Base class of the decoders: everything that other modules ask a decoder about itself."""

from abc import ABC, abstractmethod
from typing import ClassVar

from jaxtyping import Float, Int64
from torch import Tensor, nn

from mae.models.positions import sincos_positions
from mae.models.sizes import Size

# Widest encoder -> its decoder.
_PRESETS = {192: Size(192, 4, 6), 384: Size(256, 8, 8), 768: Size(512, 8, 16)}
_WIDEST_PRESET = max(_PRESETS)


class Decoder(nn.Module, ABC):
    """Predicts the pixels of patches from the visible tokens of the encoder.

    A new decoder derives from this class and has an entry in `DECODERS`. It keeps its transformer blocks in
    `decoder_blocks`, and takes the positions of patches from `decoder_pos_embed`, which follows another image size.
    """

    decayed: ClassVar[tuple[str, ...]] = ()
    """Names of parameters, held by the decoder itself and not by one of its layers, that have weight decay. All others
    that it holds (tokens, queries, positions) have none."""

    def __init__(self, shape: Size, encoder: Size, grid: tuple[int, int], patch_pixels: int) -> None:
        """Build a decoder of `shape` for an encoder of another, for a grid of (rows, columns) of patches.

        Args:
            shape: Size of the decoder.
            encoder: Size of the encoder.
            grid: Rows and columns of patches in an image.
            patch_pixels: Values in a patch: height * width * channels.
        """
        super().__init__()
        self.decoder_pos_embed = nn.Parameter(sincos_positions(grid, shape.width), requires_grad=False)

    @property
    @abstractmethod
    def reads_normed_output(self) -> bool:
        """Whether the last layer reaches the decoder through the encoder's norm, which is frozen otherwise."""

    @abstractmethod
    def forward(
        self,
        layers: list[Float[Tensor, "batch tokens encoder_width"]],
        ids_keep: Int64[Tensor, "batch kept"],
        ids: Int64[Tensor, "batch predicted"],
    ) -> Float[Tensor, "batch predicted pixels"]:
        """Predict the patches at `ids`.

        Args:
            layers: Tokens before the encoder's first block and after each: the cls token, then the visible patches.
            ids_keep: Places of the visible patches in the image.
            ids: Places of the patches to predict.
        """

    @abstractmethod
    def flops(self, visible: int, predicted: int) -> int:
        """Count the operations of the matrix products of a forward pass for one image.

        Args:
            visible: Tokens that the encoder gives, its cls token included.
            predicted: Patches to predict.
        """

    @staticmethod
    def default_shape(encoder: Size) -> Size:
        """Return the size of a decoder whose size is not set: about as costly as the encoder.

        For ViT-B and larger encoders this is the published decoder: width 512, 8 blocks, 16 heads.
        """
        like = min(encoder.width, _WIDEST_PRESET)
        return next(decoder for widest, decoder in _PRESETS.items() if like <= widest)

    @property
    def blocks(self) -> list[nn.Module]:
        """Transformer blocks, each of which is compiled, checkpointed and sharded by itself."""
        if "decoder_blocks" not in self._modules:
            raise TypeError(
                f"{type(self).__name__} has no decoder_blocks; keep its blocks in an nn.ModuleList of that name"
            )
        return list(self.get_submodule("decoder_blocks").children())
