"""Weights made to fit another grid, patch size or number of channels."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from jaxtyping import Float
from timm.layers import resample_patch_embed
from torch import Tensor

from mae.formats.norms import norms_measured
from mae.formats.opening import StoredModel
from mae.formats.report import KeyReport
from mae.models.description import ModelDescription
from mae.models.weights import for_grid, has_decoder, norms_the_mean

_PATCHES = "patch_embed.proj.weight"


@dataclass(frozen=True)
class Fit:
    """Weights that fit, and how they were made to."""

    weights: dict[str, Tensor]
    resampled: Mapping[str, str]
    """How a tensor was changed, by its name."""
    dropped: Mapping[str, str]
    """Why a tensor was left out, by its name."""


def fit(
    weights: Mapping[str, Tensor],
    trained: ModelDescription,
    grid: tuple[int, int],
    patch_size: tuple[int, int],
    channels: int,
) -> Fit:
    """Make weights fit a grid of (rows, columns) of patches of another size, with another number of channels.

    Positions are resampled for the grid. The patch embedding is resampled as in FlexiViT (timm's
    `resample_patch_embed`), then adapted to the channels. A decoder predicts the pixels of a patch: with other pixels,
    it is left out.
    """
    old = trained.patch_size, trained.channels
    dropped: dict[str, str] = {}
    if old != (patch_size, channels):
        reason = "decoder, which predicts other pixels"
        dropped = {name: reason for name in weights if has_decoder([name])}
    kept = for_grid({name: each for name, each in weights.items() if name not in dropped}, trained.grid, grid)
    resampled = {name: _change(trained.grid, grid) for name, each in kept.items() if each is not weights[name]}
    if patch_size != trained.patch_size:
        kept[_PATCHES] = resample_patch_embed(kept[_PATCHES], list(patch_size)).contiguous()
        resampled[_PATCHES] = f"{_change(trained.patch_size, patch_size)} pixels"
    if channels != trained.channels:
        kept[_PATCHES] = for_channels(kept[_PATCHES], channels)
        how = f"{trained.channels} to {channels} channels"
        resampled[_PATCHES] = f"{resampled[_PATCHES]}, {how}" if _PATCHES in resampled else how
    return Fit(kept, resampled, dropped)


def report_of(stored: StoredModel, fitted: Fit, names: Iterable[str]) -> KeyReport:
    """Return what becomes of each tensor of a model in one with tensors of these names, whose head begins anew."""
    wanted, given = list(names), fitted.weights
    same_norm = norms_the_mean(wanted) == norms_the_mean(given)
    loaded = [name for name in wanted if name in given and not name.startswith("head.")]
    unused = {name: _reason_unused(name, same_norm) for name in given if name not in loaded}
    before = stored.report or KeyReport("mae", tuple(given))
    return KeyReport(
        before.format,
        tuple(loaded),
        {**before.left_out, **fitted.dropped, **unused},
        {name: how for name, how in fitted.resampled.items() if name in loaded},
        tuple(name for name in wanted if name not in loaded),
        (*before.remarks, *norms_measured(stored)),
    )


def _reason_unused(name: str, same_norm: bool) -> str:
    if name.startswith("head."):
        return "head"
    if has_decoder([name]):
        return "decoder"
    return "of no use here" if same_norm else "norm of other tokens"


def for_channels(weight: Float[Tensor, "width old h w"], channels: int) -> Float[Tensor, "width new h w"]:
    """Adapt the weights of a patch embedding to another number of channels, by timm's rule (`adapt_input_conv`).

    For one channel they are summed, so that a gray image gives what its three equal channels gave. Otherwise they are
    repeated in order, and scaled so that equal channels give the same sum as before.
    """
    old = weight.shape[1]
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    repeats = -(-channels // old)
    return (weight.repeat(1, repeats, 1, 1)[:, :channels] * (old / channels)).contiguous()


def _change(old: tuple[int, int], new: tuple[int, int]) -> str:
    return f"{old[0]}x{old[1]} to {new[0]}x{new[1]}"
