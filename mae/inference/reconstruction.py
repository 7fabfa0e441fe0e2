"""Reconstruction of images from their visible patches, as pixels to look at."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mae.data.statistics import PixelStatistics
from mae.errors import UserError
from mae.models.autoencoder import MaskedAutoencoder
from mae.models.masking import Mask, kept_patches, make_mask, mask_of
from mae.models.patches import patchify, unpatchify

_HIDDEN_GRAY = 0.5


class Reconstructed(NamedTuple):
    """Images, what was hidden of them, and what the model made of the rest; pixels are from 0 to 1."""

    original: Float[Tensor, "batch channels height width"]
    masked: Float[Tensor, "batch channels height width"]
    """Original with gray in place of the hidden patches."""
    rebuilt: Float[Tensor, "batch channels height width"]
    """Prediction of every patch. If the model was trained with `norm_pix_loss`, each predicted patch has the mean and
    the contrast of the original."""
    pasted: Float[Tensor, "batch channels height width"]
    """Original with the prediction in place of the hidden patches."""
    hidden: Bool[Tensor, "batch rows columns"]
    """True for each hidden patch."""
    loss: Float[Tensor, " batch"]
    """Mean squared error over the hidden patches of each image, in units of the training loss."""

    @property
    def panels(self) -> tuple[Tensor, ...]:
        """The four kinds of images, in the order in which they are shown."""
        return self[:4]


@torch.no_grad()
def reconstructed(
    model: MaskedAutoencoder,
    images: Float[Tensor, "batch channels height width"],
    noise: Float[Tensor, "batch patches"] | Mask,
    statistics: PixelStatistics,
) -> Reconstructed:
    """Reconstruct normalised `images`, masked by `noise` or by a mask, in evaluation mode; the result is on the CPU."""
    was_training = model.training
    model.eval()
    mask = model.mask(noise)
    predicted = model.predict_all(images, mask)
    model.train(was_training)
    original, rebuilt = _pixels(images, statistics), _pixels(model.to_images(predicted, images), statistics)
    hidden = mask.hidden()
    covered = _as_image(model, hidden, original)
    error = (predicted.float() - model.target(patchify(images.float(), model.patch_size))).square().mean(dim=2)
    found = Reconstructed(
        original=original,
        masked=torch.where(covered, torch.full_like(original, _HIDDEN_GRAY), original),
        rebuilt=rebuilt,
        pasted=torch.where(covered, rebuilt, original),
        hidden=hidden.reshape(-1, *model.grid),
        loss=(error * hidden).sum(dim=1) / hidden.sum(dim=1),
    )
    return Reconstructed(*(tensor.cpu() for tensor in found))


def _pixels(
    images: Float[Tensor, "batch channels height width"], statistics: PixelStatistics
) -> Float[Tensor, "batch channels height width"]:
    mean = torch.tensor(statistics.mean, device=images.device).view(1, -1, 1, 1)
    std = torch.tensor(statistics.std, device=images.device).view(1, -1, 1, 1)
    return (images.float() * std + mean).clamp(0, 1)


def _as_image(
    model: MaskedAutoencoder, hidden: Bool[Tensor, "batch patches"], like: Float[Tensor, "batch channels height width"]
) -> Bool[Tensor, "batch channels height width"]:
    spread = hidden[:, :, None].expand(-1, -1, patchify(like, model.patch_size).shape[2])
    return unpatchify(spread.float(), model.grid, model.patch_size).bool()


def chosen_mask(
    network: MaskedAutoencoder,
    noise: Float[Tensor, "batch patches"],
    mask_ratio: float | None,
    hidden: Bool[Tensor, "batch rows columns"] | None,
) -> Mask:
    """Return the mask that `hidden` is, or one made from noise that hides this share; without both, as in training.

    Raises:
        UserError: if `hidden` is not one mask for each image, or a mask hides no patch or all.
    """
    if hidden is not None:
        wanted = (len(noise), *network.grid)
        if hidden.shape != wanted:
            raise UserError(f"the masks are {list(hidden.shape)}; allowed: one for each image, {list(wanted)}")
        return mask_of(hidden.flatten(1).to(noise.device), noise)
    if mask_ratio is None:
        return network.mask(noise)
    kept = kept_patches(network.grid, network.mask_kind, mask_ratio) if 0 < mask_ratio < 1 else 0
    if not 0 < kept < network.patches:
        raise UserError(
            f"mask_ratio {mask_ratio} keeps {kept} of {network.patches} patches with {network.mask_kind} masks; "
            "allowed: a ratio with which some are kept and some hidden"
        )
    return make_mask(noise, network.grid, network.mask_kind, kept, network.mask_version)
