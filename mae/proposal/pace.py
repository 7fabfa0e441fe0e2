"""Estimated time of a run: of its arithmetic, counted, and of its images, decoded on the same cores."""

from dataclasses import dataclass

from mae.models.flops import Flops
from mae.proposal.facts import Facts
from mae.proposal.shapes import Shape, short_side

MOST_WORKERS = 12
"""As in the shipped configs for GPUs."""
# Images that are at least this many times larger than the model's are packed smaller.
_PACK_FROM, _PACK_TO = 3, 2
# Share of the memory that decoded images may take.
_SHARE_OF_MEMORY = 0.25


@dataclass(frozen=True)
class Pace:
    """How images reach the model, and how long one takes."""

    pack_side: int | None
    """Short side to which `mae pack` should reduce the images [pixels]; None: they stay as they are."""
    kept: bool
    """Whether all decoded images fit into memory."""
    workers: int
    seconds: float
    """Time of training on one image, with what its decoding adds."""
    waits: bool
    """Whether decoding, not arithmetic, decides the time."""


def pace_of(facts: Facts, shape: Shape, flops: Flops, channels: int) -> Pace:
    """Estimate the time per image: on a CPU both share the cores, beside a GPU the slower decides."""
    images, machine = facts.images, facts.machine
    short = short_side(images)
    is_reducible = not (images.wide.images or images.arrays or images.transparent or facts.train.shards)
    pack_side = _PACK_TO * shape.short if is_reducible and short >= _PACK_FROM * shape.short else None
    scale = 1.0 if pack_side is None else pack_side / short
    pixels = sum(height * width for height, width in images.sizes) / len(images.sizes) * scale**2
    compute = flops.training / machine.flops_of(shape.settings, (shape.height, shape.width))
    if machine.gpu:
        workers = max(1, min(MOST_WORKERS, machine.cores // max(1, machine.gpus)))
    else:
        workers = min(1, machine.cores - 1)
    size = pixels * channels * facts.train.images * max(1, workers)
    is_reduced_while_decoding = short * scale >= _PACK_FROM * shape.short
    kept = size <= _SHARE_OF_MEMORY * machine.memory and not is_reduced_while_decoding
    data = images.view_seconds + (0.0 if kept else images.decode_seconds * scale**2)
    if machine.gpu:
        return Pace(pack_side, kept, workers, max(compute, data / workers) / machine.gpus, data / workers > compute)
    share = data / (data + compute)
    if not kept and machine.cores > 1:
        workers = max(1, round(machine.cores * share))
    return Pace(pack_side, kept, workers, compute + data / machine.cores, share > 0.5)
