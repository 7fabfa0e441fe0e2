"""Results of a model for many images, in parts that processes share and that a later start need not repeat."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset

from mae.data.loader import load
from mae.errors import BadImageError, UserError
from mae.inference.image_set import ImageSet
from mae.inference.inputs import view_of
from mae.inference.model import BATCH
from mae.models.description import ModelDescription
from mae.progress import progress_bar

_MOST_IMAGES = 1024
_SHARES = 32


class Part(NamedTuple):
    """Results for a range of images."""

    numbers: range
    results: Tensor
    """One row per image: those of an image that cannot be used are of a black image."""
    reasons: dict[int, str]
    """Why images cannot be used, by number."""
    extras: list[Any]
    """What `extra` made of each view, None for an image that cannot be used; empty without `extra`."""


def part_ranges(images: int) -> list[range]:
    """Divide the numbers of all images into parts, whatever the number of processes.

    A part has at most 1,024 images, but fewer in small sets, so that 32 processes can share the work. It consists of
    whole batches, so each image is in the same batch in each start.
    """
    share = math.ceil(images / _SHARES / BATCH) * BATCH
    size = min(_MOST_IMAGES, max(BATCH, share))
    return [range(start, min(start + size, images)) for start in range(0, images, size)]


def lacking_parts(accelerator: Accelerator, find: Callable[[], list[int]]) -> list[int]:
    """Return on all processes the numbers of the parts that the first process finds to be lacking. Collective."""
    found = [find() if accelerator.is_main_process else None]
    broadcast_object_list(found)
    (numbers,) = found
    assert numbers is not None
    return numbers


def compute_share(
    lacking: Sequence[int],
    ranges: Sequence[range],
    compute: Callable[[Sequence[range]], Iterator[Part]],
    accelerator: Accelerator,
    title: str,
) -> Iterator[tuple[int, Part]]:
    """Yield the number and the results of each part that this process computes, one in turn of those that are lacking.

    The first process shows a progress bar for its own images; the others have about as many. `compute` returns the
    results of some parts in order, and is called only if there are any.
    """
    mine = lacking[accelerator.process_index :: accelerator.num_processes]
    if not mine:
        return
    parts = [ranges[number] for number in mine]
    bar = progress_bar(title, sum(map(len, parts))) if accelerator.is_main_process else nullcontext(lambda done: None)
    with bar as advance:
        for number, part in zip(mine, compute(parts), strict=True):
            yield number, part
            advance(len(part.numbers))


def compute_parts(
    images: ImageSet,
    parts: Sequence[range],
    description: ModelDescription,
    function: Callable[[UInt8[Tensor, "batch channels height width"]], Tensor],
    workers: int,
    extra: Callable[[UInt8[Tensor, "channels height width"]], Any] | None = None,
) -> Iterator[Part]:
    """Apply `function` to batches of the views of the images, and yield the results of each part.

    The views, and what `extra` makes of each, are prepared by `workers` processes. `function` returns one row per
    image, on the CPU.
    """
    batches = _ViewBatches(images, parts, description, extra)
    results, reasons, extras = list[Tensor](), dict[int, str](), list[Any]()
    wanted = iter(parts)
    part = next(wanted, range(0))
    for views in load(batches, range(len(batches)), workers):
        results.append(function(views.images))
        reasons |= views.reasons
        extras += views.extras
        if views.numbers.stop == part.stop:
            yield Part(part, torch.cat(results), reasons, extras)
            results, reasons, extras = [], {}, []
            part = next(wanted, range(0))


class _Views(NamedTuple):
    images: UInt8[Tensor, "batch channels height width"]
    numbers: range
    reasons: dict[int, str]
    extras: list[Any]


class _ViewBatches(Dataset[_Views]):
    """Batches of views, prepared by workers."""

    def __init__(
        self,
        images: ImageSet,
        parts: Sequence[range],
        description: ModelDescription,
        extra: Callable[[Tensor], Any] | None,
    ) -> None:
        self._images, self._description, self._extra = images, description, extra
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
        extras = (
            []
            if self._extra is None
            else [None if image in reasons else self._extra(view) for image, view in zip(numbers, views, strict=True)]
        )
        return _Views(views, numbers, reasons, extras)
