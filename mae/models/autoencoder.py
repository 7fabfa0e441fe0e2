"""The masked autoencoder: hide patches, encode the rest, predict what was hidden (arXiv 2111.06377)."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor, nn

from mae.models.decoder import Decoder
from mae.models.encoder import build_encoder, encode_visible
from mae.models.masking import random_mask
from mae.models.patches import patchify, unpatchify
from mae.models.settings import MaskedAutoencoderSettings
from mae.settings import check

# Keeps the target of a patch of one colour finite; the published value.
_VARIANCE_EPS = 1e-6


class Reconstruction(NamedTuple):
    """What a forward pass yields."""

    loss: Float32[Tensor, ""]
    """Mean squared error over the hidden patches."""
    predicted: Float[Tensor, "batch patches pixels"]
    """Every patch as the decoder predicts it, in units of the target."""
    hidden: Bool[Tensor, "batch patches"]
    """True where a patch was hidden from the encoder."""


class MaskedAutoencoder(nn.Module):
    """`encoder` is a timm ViT, `decoder` is thrown away after pretraining."""

    def __init__(self, settings: MaskedAutoencoderSettings, image_size: tuple[int, int], channels: int) -> None:
        super().__init__()
        settings.check_image_size(image_size)
        patch_pixels = settings.patch[0] * settings.patch[1] * channels
        check(
            patch_pixels > 1 or not settings.norm_pix_loss,
            "model.norm_pix_loss",
            settings.norm_pix_loss,
            "False, because a patch of a single value has no variance",
        )
        self.grid, self.patch_size = settings.grid(image_size), settings.patch
        self.mask_ratio, self.norm_pix_loss = settings.mask_ratio, settings.norm_pix_loss
        self.encoder = build_encoder(settings, image_size, channels)
        self.decoder = Decoder(
            encoder_width=settings.shape.width,
            width=settings.decoder_width,
            depth=settings.decoder_depth,
            heads=settings.decoder_heads,
            grid=self.grid,
            patch_pixels=patch_pixels,
        )

    @property
    def patches(self) -> int:
        """Number of patches of an image, and of columns of the noise."""
        return self.grid[0] * self.grid[1]

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        noise: Float[Tensor, "batch patches"],
    ) -> Reconstruction:
        """Normalised images and uniform noise -> loss; the patches with the smallest noise stay visible."""
        mask = random_mask(noise, self.mask_ratio)
        encoded = encode_visible(self.encoder, images, mask.ids_keep)
        predicted = self.decoder(encoded, mask.ids_keep)
        loss = self.loss(images, predicted, mask.hidden)
        return Reconstruction(loss, predicted, mask.hidden)

    def loss(
        self,
        images: Float[Tensor, "batch channels height width"],
        predicted: Float[Tensor, "batch patches pixels"],
        hidden: Bool[Tensor, "batch patches"],
    ) -> Float32[Tensor, ""]:
        """Mean squared error on the hidden patches, in float32 whatever the precision of the rest."""
        with torch.autocast(images.device.type, enabled=False):
            error = (predicted.float() - self.target(images)).square().mean(dim=2)
            return (error * hidden).sum() / hidden.sum()

    def target(self, images: Float[Tensor, "batch channels height width"]) -> Float32[Tensor, "batch patches pixels"]:
        """The pixels to predict: with `norm_pix_loss` each patch minus its mean, over its deviation."""
        pixels = patchify(images.float(), self.patch_size)
        if not self.norm_pix_loss:
            return pixels
        variance, mean = torch.var_mean(pixels, dim=2, keepdim=True)
        return (pixels - mean) / (variance + _VARIANCE_EPS).sqrt()

    def to_images(
        self,
        predicted: Float[Tensor, "batch patches pixels"],
        images: Float[Tensor, "batch channels height width"],
    ) -> Float32[Tensor, "batch channels height width"]:
        """Predictions as normalised images.

        With `norm_pix_loss` a prediction says nothing of a patch's brightness and contrast: these are taken
        from the true patch of `images`, which a caption has to admit.
        """
        pixels = predicted.float()
        if self.norm_pix_loss:
            variance, mean = torch.var_mean(patchify(images.float(), self.patch_size), dim=2, keepdim=True)
            pixels = pixels * (variance + _VARIANCE_EPS).sqrt() + mean
        return unpatchify(pixels, self.grid, self.patch_size)
