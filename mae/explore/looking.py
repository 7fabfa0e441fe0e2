"""What a model makes of one picture, as HTML whose pictures are embedded and whose names are escaped."""

import html
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from mae.explore.masks import MaskChoice, drawn_mask, painted_mask
from mae.explore.picture_set import Neighbour, Picture
from mae.inference.model import Model
from mae.models.autoencoder import MaskedAutoencoder
from mae.output import one_line, valid_text
from mae.report.images import Tile, displayable, embedded, enlarged, figure_of, heat_over, pca_colors
from mae.report.model_pictures import at_least, patch_features

SIDE = 320
"""Side to which small pictures are enlarged by a whole number, and to which larger ones are scaled down [pixels]."""
_WORST = 0.5
"""Error of a pixel that is brightest, of values from 0 to 1; fixed, so that models can be compared."""


def plain(text: str) -> str:
    """Return a text, such as a name of a file, without control characters and bytes that are not UTF-8."""
    return one_line(valid_text(text))


def notice(text: str) -> str:
    """Return a sentence in place of pictures."""
    return f'<p class="notice">{html.escape(plain(text))}</p>'


def note(text: str) -> str:
    """Return a sentence below pictures."""
    return f'<p class="note">{html.escape(plain(text))}</p>'


def canvas(model: Model, picture: Picture) -> str:
    """Return the URL of the picture as the model sees it, to paint on.

    Raises:
        BadImageError: if the picture cannot be used.
    """
    return embedded(_pixels(model, picture), SIDE)


def reconstruction(model: Model, picture: Picture, kind: MaskChoice, ratio: float, seed: int, marks: str) -> str:
    """Return what is hidden of a picture, what the model makes of the rest, and how wrong that is.

    Args:
        model: Model of a pretraining.
        picture: Picture to hide a part of.
        kind: Kind of the mask: `painted` takes `marks`, the others `ratio` and `seed`.
        ratio: Share of the patches to hide.
        seed: Key of a random mask.
        marks: Painted mask, as in `painted_mask`.

    Raises:
        UserError: if the model has no decoder, or the mask hides no patch or all.
        BadImageError: if the picture cannot be used.
    """
    model.view(picture.data)  # so that a bad picture is told in the same words everywhere
    network, hidden = model.network, None
    if isinstance(network, MaskedAutoencoder):
        drawn = painted_mask(marks, network.grid) if kind == "painted" else drawn_mask(network, kind, ratio, seed)
        hidden = drawn[None]
    found = model.reconstruct(picture.data, hidden=hidden)
    original, masked, rebuilt, pasted = (displayable(panel[0]) for panel in found.panels)
    errors = error_map(found.original[0], found.rebuilt[0], found.hidden[0])
    over = at_least(original, SIDE)
    tiles = [
        _tile(original, "picture"),
        _tile(masked, f"{int(found.hidden.sum())} of {found.hidden.numel()} patches hidden"),
        _tile(pasted, "filled in"),
        _tile(rebuilt, "reconstruction"),
        _tile(heat_over(over, np.nan_to_num(errors), _WORST), "error"),
    ]
    told = f"Mean error of the hidden pixels: {np.nanmean(errors):.3f} of 1. Their loss: {float(found.loss[0]):.3f}."
    if model.description.decoder is not None and model.description.decoder.norm_pix_loss:
        told += " Mean and contrast of each reconstructed patch are taken from the picture (norm_pix_loss)."
    return _flow(tiles, "large") + note(told)


def error_map(
    original: Float[Tensor, "channels height width"],
    rebuilt: Float[Tensor, "channels height width"],
    hidden: Bool[Tensor, "rows columns"],
) -> Float[np.ndarray, "height width"]:
    """Return the error of each hidden pixel, as the mean over the channels; NaN where nothing is hidden."""
    errors = (rebuilt - original).abs().mean(dim=0)
    rows, columns = (size // patches for size, patches in zip(errors.shape, hidden.shape, strict=True))
    covered = hidden.repeat_interleave(rows, dim=0).repeat_interleave(columns, dim=1)
    found: NDArray[np.float32] = torch.where(covered, errors, torch.nan).numpy()
    return found


def attention(model: Model, picture: Picture, block: int) -> str:
    """Return where the cls token looks in a block, counted from 1: the mean of all heads, and each head.

    Raises:
        UserError: if there is no such block.
        BadImageError: if the picture cannot be used.
    """
    depth = model.description.depth
    pixels = at_least(_pixels(model, picture), SIDE)
    weights = model.attention(picture.data, block - 1 if 1 <= block <= depth else depth).numpy()[0]
    tiles = [_tile(heat_over(pixels, weights.mean(axis=0)), "all heads")]
    tiles += [_tile(heat_over(pixels, head), f"head {number}") for number, head in enumerate(weights, 1)]
    share = weights.sum(axis=(1, 2)).mean()
    return _flow(tiles) + note(f"The patches get {share:.0%} of the attention of the cls token, itself the rest.")


def patch_colors(model: Model, picture: Picture) -> str:
    """Return the first three principal components of the patch features, together as colours, and each in gray.

    Raises:
        BadImageError: if the picture cannot be used.
    """
    view = model.view(picture.data)
    colors = pca_colors(patch_features(model, view[None]).numpy())[0]
    size = at_least(displayable(view), SIDE).shape[:2]
    tiles = [_tile(enlarged(colors, size), "all three as red, green, blue")]
    tiles += [
        _tile(enlarged(np.repeat(colors[..., at : at + 1], 3, axis=-1), size), f"component {at + 1}") for at in range(3)
    ]
    return _flow(tiles, "large")


def predictions(model: Model, picture: Picture, top: int = 5) -> str:
    """Return the most probable classes of a picture.

    Raises:
        UserError: if the model has no head.
        BadImageError: if the picture cannot be used.
    """
    model.require_head()
    model.view(picture.data)
    (found,) = model.predict(picture.data, top)
    rows = "".join(
        f'<tr><td>{html.escape(plain(name))}</td><td class="number">{share:.1%}</td>'
        f'<td><span class="bar" style="width:{12 * share:.2f}rem"></span></td></tr>'
        for name, share in zip(found.names, found.probabilities, strict=True)
    )
    label = note(f"Its class in the set: {picture.label}.") if picture.label else ""
    return f"<table>{rows}</table>{label}"


def neighbours(picture: Picture, found: Sequence[Neighbour], searched: int, total: int) -> str:
    """Return the most similar images of the set, framed by whether the class is the same as that of the picture."""
    tiles = []
    for each in found:
        mark = "" if not (picture.label and each.label) else "same" if picture.label == each.label else "other"
        caption = f"{each.similarity:.2f} {each.label}".strip()
        tiles.append(_tile(displayable(each.view), caption, each.name, mark))
    told = f"Sought among {searched:,} of the {total:,} images of the set."
    return _flow(tiles) + note(told + (" Green frame: the same class; red: another." if picture.label else ""))


def _pixels(model: Model, picture: Picture) -> NDArray[np.float32]:
    return displayable(model.view(picture.data))


def _tile(pixels: NDArray[np.floating], caption: str, alt: str = "", mark: str = "") -> Tile:
    return Tile(embedded(pixels, SIDE), plain(alt or caption), plain(caption), mark)


def _flow(tiles: Sequence[Tile], size: str = "") -> str:
    return f'<div class="flow {size}">{"".join(map(figure_of, tiles))}</div>'
