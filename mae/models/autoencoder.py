"""The masked autoencoder: hide patches, encode the others, predict the hidden ones (arXiv 2111.06377)."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int64, Shaped
from torch import Tensor, nn

from mae.models.decoders import DECODERS
from mae.models.encoder import build_encoder, encode_visible
from mae.models.masking import Mask, make_mask
from mae.models.patches import patchify, take, unpatchify
from mae.models.positions import sincos_positions
from mae.models.readout import read_features
from mae.models.settings import MaskedAutoencoderSettings
from mae.settings import check

# Added to the variance of a patch, which is 0 if the patch has one colour; the published value.
_VARIANCE_EPS = 1e-6


class Reconstruction(NamedTuple):
    """Result of a forward pass."""

    loss: Float32[Tensor, ""]
    """Mean squared error over the predicted patches."""
    predicted: Float[Tensor, "batch predicted pixels"]
    """Pixels of the predicted patches, in units of the target."""
    ids: Int64[Tensor, "batch predicted"]
    """Places of the predicted patches: all hidden ones, or the share `predict_ratio` of them."""


class MaskedAutoencoder(nn.Module):
    """Encoder, a timm ViT, and decoder, which is thrown away after pretraining."""

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
        self.mask_kind, self.mask_version = settings.mask, settings.mask_version
        self.norm_pix_loss = settings.norm_pix_loss
        self.kept, self.predicted = settings.kept(self.grid), settings.predicted(self.grid)
        self.encoder = build_encoder(settings, image_size, channels)
        self.decoder = DECODERS[settings.decoder](settings.decoder_shape, settings.shape, self.grid, patch_pixels)
        # Set here, so that no decoder has to know of the temperature.
        self.decoder.decoder_pos_embed.data = sincos_positions(
            self.grid, settings.decoder_shape.width, settings.position_temperature
        )
        self.blocks = [*self.encoder.blocks, *self.decoder.blocks]
        if not self.decoder.reads_normed_output:
            # Fine-tuning begins with this norm as it is here.
            self.encoder.norm.requires_grad_(False)

    @property
    def patches(self) -> int:
        """Number of patches in an image, and of columns in the noise."""
        return self.grid[0] * self.grid[1]

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        noise: Float[Tensor, "batch patches"] | Mask,
    ) -> Reconstruction:
        """Hide patches of normalised images, predict them, and compare.

        Args:
            images: Normalised images.
            noise: Uniform noise from 0 to 1, from which masks are made; or a mask that keeps any number of patches.
        """
        mask = self.mask(noise)
        ids = mask.ids_hidden[:, : self.predicted]
        pixels = patchify(images, self.patch_size)
        predicted = _not_a_view(self._predict(pixels, mask.ids_keep, ids))
        return Reconstruction(self.loss(take(pixels, ids), predicted), predicted, _not_a_view(ids))

    def predict_all(
        self,
        images: Float[Tensor, "batch channels height width"],
        noise: Float[Tensor, "batch patches"] | Mask,
    ) -> Float[Tensor, "batch patches pixels"]:
        """Predict every patch, visible ones too, from the visible patches; for pictures."""
        everywhere = torch.arange(self.patches, device=images.device).expand(len(images), -1)
        return self._predict(patchify(images, self.patch_size), self.mask(noise).ids_keep, everywhere)

    def features(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch norms both"]:
        """Return the features of whole normalised images; see `read_features`."""
        return read_features(self.encoder, images)

    def mask(self, noise: Float[Tensor, "batch patches"] | Mask) -> Mask:
        """Return the mask that this model makes from uniform noise; a mask is returned as it is."""
        if isinstance(noise, Mask):
            return noise
        return make_mask(noise, self.grid, self.mask_kind, self.kept, self.mask_version)

    def _predict(
        self,
        pixels: Float[Tensor, "batch patches pixels"],
        ids_keep: Int64[Tensor, "batch kept"],
        ids: Int64[Tensor, "batch predicted"],
    ) -> Float[Tensor, "batch predicted pixels"]:
        layers = encode_visible(self.encoder, take(pixels, ids_keep), ids_keep)
        if self.decoder.reads_normed_output:
            layers[-1] = self.encoder.norm(layers[-1])
        predicted: Tensor = self.decoder(layers, ids_keep, ids)
        return predicted

    def loss(
        self,
        pixels: Float[Tensor, "batch predicted pixels"],
        predicted: Float[Tensor, "batch predicted pixels"],
    ) -> Float32[Tensor, ""]:
        """Return the mean squared error of the predictions, in float32 even under autocast."""
        with torch.autocast(pixels.device.type, enabled=False):
            return (predicted.float() - self.target(pixels)).square().mean()

    def target(self, pixels: Float[Tensor, "batch predicted pixels"]) -> Float32[Tensor, "batch predicted pixels"]:
        """Return what the decoder should predict; see `patch_targets`."""
        return patch_targets(pixels, self.norm_pix_loss)

    def to_images(
        self,
        predicted: Float[Tensor, "batch patches pixels"],
        images: Float[Tensor, "batch channels height width"],
    ) -> Float32[Tensor, "batch channels height width"]:
        """Turn predictions of all patches into normalised images.

        With `norm_pix_loss` a prediction lacks the brightness and contrast of its patch. These are taken from the true
        patch of `images`; a caption must say so.
        """
        pixels = predicted.float()
        if self.norm_pix_loss:
            mean, deviation = _mean_and_deviation(patchify(images.float(), self.patch_size))
            pixels = pixels * deviation + mean
        return unpatchify(pixels, self.grid, self.patch_size)


def patch_targets(
    pixels: Float[Tensor, "batch predicted pixels"], norm_pix_loss: bool
) -> Float32[Tensor, "batch predicted pixels"]:
    """Return what the decoder should predict: pixels, normalised within each patch if `norm_pix_loss` is set."""
    if not norm_pix_loss:
        return pixels.float()
    mean, deviation = _mean_and_deviation(pixels.float())
    return (pixels.float() - mean) / deviation


def _not_a_view(tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """Return the tensor, or a copy if it is a view, because FSDP2 warns of views that a wrapped module returns.

    Linear layers return a view in torch 2.14 and earlier.
    """
    return tensor if tensor._base is None else tensor.clone()


def _mean_and_deviation(
    pixels: Float32[Tensor, "batch patches pixels"],
) -> tuple[Float32[Tensor, "batch patches 1"], Float32[Tensor, "batch patches 1"]]:
    """Return mean and deviation of each patch over pixels and channels; the variance is unbiased, as published."""
    variance, mean = torch.var_mean(pixels, dim=2, keepdim=True)
    return mean, (variance + _VARIANCE_EPS).sqrt()
