"""Results of a model for many images, in parts that processes share and that a later start need not repeat."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset

from mae.data.loader import load
from mae.errors import BadImageError, UserError
from mae.inference.image_set import ImageSet
from mae.inference.model import BATCH, view_of
from mae.models.description import ModelDescription

_MOST_IMAGES = 1024
_SHARES = 32


class Part(NamedTuple):
    """Results for a range of images."""

    numbers: range
    results: Tensor
    """One row per image: those of an image that cannot be used are of a black image."""
    reasons: dict[int, str]
    """Why images cannot be used, by number."""


def part_ranges(images: int) -> list[range]:
    """Divide the numbers of all images into parts, whatever the number of processes.

    A part has at most 1,024 images, but fewer in small sets, so that 32 processes can share the work. It consists of
    whole batches, so each image is in the same batch in each start.
    """
    share = math.ceil(images / _SHARES / BATCH) * BATCH
    size = min(_MOST_IMAGES, max(BATCH, share))
    return [range(start, min(start + size, images)) for start in range(0, images, size)]


def compute_parts(
    images: ImageSet,
    parts: Sequence[range],
    description: ModelDescription,
    function: Callable[[UInt8[Tensor, "batch channels height width"]], Tensor],
    workers: int,
) -> Iterator[Part]:
    """Apply `function` to batches of the views of the images, and yield the results of each part.

    The views are prepared by `workers` processes. `function` returns one row per image, on the CPU.
    """
    batches = _ViewBatches(images, parts, description)
    results, reasons = list[Tensor](), dict[int, str]()
    wanted = iter(parts)
    part = next(wanted, range(0))
    for views in load(batches, range(len(batches)), workers):
        results.append(function(views.images))
        reasons |= views.reasons
        if views.numbers.stop == part.stop:
            yield Part(part, torch.cat(results), dict(reasons))
            results.clear()
            reasons.clear()
            part = next(wanted, range(0))


class _Views(NamedTuple):
    images: UInt8[Tensor, "batch channels height width"]
    numbers: range
    reasons: dict[int, str]


class _ViewBatches(Dataset[_Views]):
    """Batches of views, prepared by workers."""

    def __init__(self, images: ImageSet, parts: Sequence[range], description: ModelDescription) -> None:
        self._images, self._description = images, description
        self._batches = [part[start : start + BATCH] for part in parts for start in range(0, len(part), BATCH)]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> _Views:
        numbers, description = self._batches[number], self._description
        self._images.will_need(numbers)
        height, width = description.image_size
        # The channels of a pixel are adjacent, as in training and evaluation.
        views = torch.zeros(len(numbers), height, width, description.channels, dtype=torch.uint8).permute(0, 3, 1, 2)
        reasons = {}
        for row, image in enumerate(numbers):
            try:
                views[row] = view_of(self._images.read(image), description)
            except (BadImageError, UserError) as error:
                reasons[image] = str(error)
        return _Views(views, numbers, reasons)
