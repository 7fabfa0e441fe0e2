"""What a model makes of fixed images: attention, colours of its patch features, reconstructions, neighbours."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mae.data.loader import normalize
from mae.data.spread import spread_evenly
from mae.data.statistics import PixelStatistics
from mae.errors import BadImageError, UserError
from mae.inference.model import BATCH, Model
from mae.models.autoencoder import MaskedAutoencoder
from mae.models.flops import classifier_flops
from mae.models.readout import encode_all, select
from mae.report.finding import NearestNeighbours
from mae.report.images import Tile, displayable, embedded, enlarged, grid, heat_over, pca_colors
from mae.report.run_images import RunImages

FIXED = 6
"""Number of images that are shown with all that the model makes of them."""
_HEADS, _NEAREST = 6, 6
_RATIOS = (0.5, 0.75, 0.9)
_FEWEST = 24
_OPERATIONS = {"cpu": 2e11, "cuda": 4e14}
"""Operations that the features of a report may take: a few seconds on a few cores, or on a GPU."""


class Seen(NamedTuple):
    """Images that the model has seen, and what it has made of them, in the same order."""

    ids: list[int]
    names: list[str]
    classes: list[str]
    files: list[bytes]
    views: Tensor
    """uint8 [images, channels, height, width]."""
    features: Tensor
    """Float32 [images, feature]."""
    logits: Tensor | None


def see(model: Model, images: RunImages, at_most: int) -> Seen:
    """Let the model see some images, spread evenly: as many as take a few seconds, and no more than `at_most`.

    Raises:
        UserError: if none can be read.
    """
    description = model.description
    forward = classifier_flops(description.encoder(), description.image_size, description.channels, 0, "linear").forward
    most = int(
        np.clip(_OPERATIONS.get(model.device.type, _OPERATIONS["cpu"]) / forward, min(_FEWEST, at_most), at_most)
    )
    ids, names, files, views = list[int](), list[str](), list[bytes](), list[Tensor]()
    for sample_id, name, data in images.read(images.spread(most)):
        try:
            views.append(model.view(data))
        except (BadImageError, UserError):
            continue
        ids.append(sample_id)
        names.append(name)
        files.append(data)
    if not views:
        raise UserError("none of the images can be read")
    features, logits = list[Tensor](), list[Tensor]()
    for batch in torch.split(torch.stack(views), BATCH):
        if model.has_head:
            found, scores = model.features_and_logits_of(batch)
            logits.append(scores)
        else:
            found = model.features_of(batch)
        features.append(select(found, "cls+avg", "raw"))
    classes = [images.class_of(sample_id) for sample_id in ids]
    return Seen(
        ids, names, classes, files, torch.stack(views), torch.cat(features), torch.cat(logits) if logits else None
    )


def attention_and_colors(model: Model, seen: Seen) -> str:
    """Return a row for each fixed image: where the cls token looks in the last block, and colours of the patches."""
    fixed = _fixed(seen)
    attention = model.attention([seen.files[at] for at in fixed]).numpy()
    colors = pca_colors(patch_features(model, seen.views[fixed]).numpy())
    heads = min(attention.shape[1], _HEADS)
    rows = []
    for row, at in enumerate(fixed):
        pixels = displayable(seen.views[at])
        large = at_least(pixels)
        tiles = [
            Tile(embedded(pixels), seen.names[at], seen.classes[at]),
            Tile(embedded(enlarged(colors[row], large.shape[:2])), f"Patch features of {seen.names[at]}"),
            Tile(embedded(heat_over(large, attention[row].mean(axis=0))), f"Mean attention in {seen.names[at]}"),
        ]
        tiles += [
            Tile(embedded(heat_over(large, attention[row, head])), f"Head {head + 1} in {seen.names[at]}")
            for head in range(heads)
        ]
        rows.append(tiles)
    titles = ("image", "patch features", "attention, all heads", *(f"head {head + 1}" for head in range(heads)))
    return grid(titles, rows)


def reconstructions(model: Model, seen: Seen) -> str:
    """Return a row for each fixed image, always under the same masks: shares hidden, and filled in; "" for none."""
    if not isinstance(model.network, MaskedAutoencoder):
        return ""
    fixed = _fixed(seen)
    files = [seen.files[at] for at in fixed]
    columns, titles = [], ["image"]
    for ratio in _RATIOS:
        try:
            found = model.reconstruct(files, ratio)
        except UserError:  # the grid is too coarse for this share
            continue
        columns += [found.masked, found.pasted]
        titles += [f"{ratio:.0%} hidden", "filled in"]
    rows = []
    for row, at in enumerate(fixed):
        tiles = [Tile(embedded(displayable(seen.views[at])), seen.names[at], seen.classes[at])]
        tiles += [
            Tile(embedded(displayable(column[row])), f"{title} of {seen.names[at]}")
            for title, column in zip(titles[1:], columns, strict=True)
        ]
        rows.append(tiles)
    return grid(titles, rows)


def neighbours(seen: Seen) -> str:
    """Return for each fixed image those with the most similar features, framed by whether the class is the same."""
    fixed = _fixed(seen)
    similar = _cosines(seen.features[fixed], seen.features)
    similar[range(len(fixed)), fixed] = -2
    count = min(_NEAREST, len(seen.ids) - 1)
    rows = []
    for row, at in enumerate(fixed):
        tiles = [Tile(embedded(displayable(seen.views[at])), seen.names[at], seen.classes[at])]
        for other in similar[row].topk(count).indices.tolist():
            mark = "" if not seen.classes[at] else "same" if seen.classes[at] == seen.classes[other] else "other"
            caption = f"{similar[row, other]:.2f} {seen.classes[other]}".strip()
            tiles.append(Tile(embedded(displayable(seen.views[other])), seen.names[other], caption, mark))
        rows.append(tiles)
    return grid(("image", "most similar", *[""] * (count - 1)), rows)


def compare_with_pixels(seen: Seen) -> NearestNeighbours | None:
    """Return how often the nearest other image is of the same class, by features and by pixels; None without labels."""
    if not all(seen.classes) or len(set(seen.classes)) < 2:
        return None
    pixels = seen.views.flatten(1).float()
    shares = []
    for vectors in (seen.features, pixels - pixels.mean(dim=0)):
        similar = _cosines(vectors, vectors).fill_diagonal_(-2)
        nearest = similar.argmax(dim=1).tolist()
        shares.append(sum(seen.classes[at] == seen.classes[near] for at, near in enumerate(nearest)) / len(nearest))
    return NearestNeighbours(shares[0], shares[1], len(seen.ids), "the nearest one of the same class")


@torch.no_grad()
def patch_features(model: Model, views: Tensor) -> Float[Tensor, "images rows columns width"]:
    """Return the features of each patch, after the last norm."""
    description = model.description
    statistics = PixelStatistics(description.mean, description.std)
    parts = [
        model.encoder.norm(encode_all(model.encoder, normalize(batch.to(model.device), statistics)))[:, 1:].cpu()
        for batch in torch.split(views, BATCH)
    ]
    return torch.cat(parts).float().reshape(len(views), *description.grid, -1)


def _fixed(seen: Seen) -> list[int]:
    return list(map(int, spread_evenly(len(seen.ids), FIXED)))


def _cosines(some: Float[Tensor, "some value"], others: Float[Tensor, "others value"]) -> Float[Tensor, "some others"]:
    return torch.nn.functional.normalize(some, dim=1) @ torch.nn.functional.normalize(others, dim=1).T


def at_least(pixels: Float[np.ndarray, "height width 3"], side: int = 112) -> Float[np.ndarray, "high wide 3"]:
    """Return a picture enlarged by a whole number to about `side` pixels, for maps that are drawn over it."""
    factor = max(1, side // max(pixels.shape[:2]))
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)
