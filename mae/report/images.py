"""Small pictures for a page: images, maps over images, and grids of them."""

import html
import io
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mae.report import page

_SIDE, _TINY, _QUALITY = 112, 64, 78
"""Longest side of an embedded picture; up to which side it is kept without loss; quality of the others."""
_HEAT = 0.6


class Tile(NamedTuple):
    """Picture of a grid, with a caption."""

    url: str
    alt: str
    caption: str = ""
    mark: str = ""
    """`same` or `other`, which frames it."""


def displayable(image: Tensor) -> NDArray[np.float32]:
    """Return an image [channels height width], uint8 or from 0 to 1, as colours from 0 to 1 [height width 3].

    The first three channels are the colours; fewer are shown as gray.
    """
    array: NDArray[np.float32] = (image if image.is_floating_point() else image.float() / 255).numpy()
    chosen = array[:3] if len(array) >= 3 else np.repeat(array[:1], 3, axis=0)
    return np.ascontiguousarray(chosen.transpose(1, 2, 0))


def embedded(pixels: Float[np.ndarray, "height width 3"], side: int = _SIDE) -> str:
    """Return the URL of a picture from 0 to 1, at most `side` pixels wide and high."""
    image = Image.fromarray((255 * np.clip(np.nan_to_num(pixels), 0, 1)).round().astype(np.uint8))
    buffer = io.BytesIO()
    if max(image.size) <= _TINY:
        image.save(buffer, format="PNG", optimize=True)
        return page.data_url(buffer.getvalue(), "png")
    image.thumbnail((side, side))
    image.save(buffer, format="WEBP", quality=_QUALITY, method=4)
    return page.data_url(buffer.getvalue(), "webp")


def heat_over(
    pixels: Float[np.ndarray, "height width 3"], heat: Float[np.ndarray, "rows columns"], brightest: float | None = None
) -> Float[np.ndarray, "high wide 3"]:
    """Lay a map of patches or pixels, from 0 to `brightest`, in colours over the image that it is of.

    Values above `brightest` look like it; None: the greatest value of the map.
    """
    scaled = heat / max(float(heat.max()) if brightest is None else brightest, 1e-12)
    colors = mpl.colormaps["inferno"](_enlarged(scaled, pixels.shape[:2]))[..., :3]
    gray = pixels.mean(axis=2, keepdims=True)
    blended: NDArray[np.float32] = (_HEAT * colors + (1 - _HEAT) * gray).astype(np.float32)
    return blended


def pca_colors(
    features: Float[np.ndarray, "images rows columns width"],
) -> Float[np.ndarray, "images rows columns 3"]:
    """Return the first three principal components of patch features over all images, as colours from 0 to 1.

    Each component runs from its 2nd to its 98th percentile; components that do not vary are a middle gray.
    """
    flat = features.reshape(-1, features.shape[-1]).astype(np.float64)
    flat = flat - flat.mean(axis=0)
    _, sizes, directions = np.linalg.svd(flat, full_matrices=False)
    colors = np.full((len(flat), 3), 0.5)
    for number in range(min(3, len(sizes))):
        direction = directions[number]
        direction = direction * np.sign(direction[np.abs(direction).argmax()])  # its sign is arbitrary
        values = flat @ direction
        low, high = np.percentile(values, (2, 98))
        if sizes[number] > 1e-6 * max(sizes[0], 1e-12) and high > low:
            colors[:, number] = np.clip((values - low) / (high - low), 0, 1)
    return colors.reshape(*features.shape[:-1], 3).astype(np.float32)


def enlarged(colors: Float[np.ndarray, "rows columns 3"], size: tuple[int, int]) -> Float[np.ndarray, "high wide 3"]:
    """Return a map of patches as a picture of a size (height, width), without smoothing."""
    return np.stack([_enlarged(colors[..., channel], size) for channel in range(3)], axis=-1)


def grid(header: Sequence[str], rows: Sequence[Sequence[Tile]]) -> str:
    """Return pictures in rows under a header; empty titles leave room for none."""
    columns = max(map(len, rows), default=0)
    if not columns:
        return ""
    head = "".join(f'<div class="head">{html.escape(title)}</div>' for title in header)
    tiles = "".join("".join(map(figure_of, row)) + "<i></i>" * (columns - len(row)) for row in rows)
    return (
        f'<div class="gallery" style="grid-template-columns:repeat({columns},minmax(3.6rem,7rem))">{head}{tiles}</div>'
    )


def figure_of(tile: Tile) -> str:
    """Return a picture with its caption, as HTML."""
    caption = f"<figcaption>{html.escape(tile.caption)}</figcaption>" if tile.caption else ""
    mark = f' class="{tile.mark}"' if tile.mark else ""
    return f'<figure{mark}><img class="pixels" alt="{html.escape(tile.alt)}" src="{tile.url}">{caption}</figure>'


def _enlarged(values: NDArray[np.floating], size: tuple[int, int]) -> NDArray[np.float32]:
    rows = np.arange(size[0]) * values.shape[0] // size[0]
    columns = np.arange(size[1]) * values.shape[1] // size[1]
    spread: NDArray[np.float32] = values[rows][:, columns].astype(np.float32)
    return spread
