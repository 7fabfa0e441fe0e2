"""Overview of a start: what the run trains, on what data and device, from which weights, for how many steps."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from mae.data.store.shards import SUFFIXES, Shard
from mae.formats.report import KeyReport
from mae.models.description import ModelDescription
from mae.training.job import Job
from mae.training.settings import SCRATCH

# `train-000123.tar` is of the split `train`.
_NUMBERED = re.compile(r"(.*?)[-_.]?\d*(?:" + "|".join(map(re.escape, SUFFIXES)) + ")")


def overview(job: Job, report: KeyReport | None = None) -> Iterator[str]:
    """Yield the lines that a run prints at its start; `report` is of the tensors of `init`, if they were adapted."""
    mixed = job.accelerator.mixed_precision
    yield f"device: {_device(job)}, precision {'fp32' if mixed == 'no' else mixed}"
    yield from _data(job)
    yield f"model: {_model(job)}, {_origin(job, report)}"
    epochs = job.epoch_after(job.total)
    yield (
        f"steps: {job.total:,} of {job.plan.global_batch:,} images, {epochs:,.4g} epochs; the first line "
        "of losses estimates the time (ETA)"
    )


def splits_of(shards: Sequence[Shard]) -> Counter[str]:
    """Return the number of shards of each split, which is what their names begin with."""
    names = (_NUMBERED.fullmatch(shard.name) for shard in shards)
    return Counter(found[1] if found else "" for found in names)


def _device(job: Job) -> str:
    device, processes = job.accelerator.device, job.accelerator.num_processes
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type.upper()} with {torch.get_num_threads()} torch threads"
    return name if processes == 1 else f"{processes} processes, each on {name}"


def _data(job: Job) -> Iterator[str]:
    shards, data = job.batches.shards, job.settings.data
    splits = splits_of(shards)
    by_split = ", ".join(f"{split or 'unnamed'} {count:,}" for split, count in splits.items())
    height, width = data.size
    yield (f"data: {job.samples:,} images an epoch, as {height}x{width}x{data.channels}; shards by split: {by_split}")
    if len(splits) > 1:
        yield (
            f"data.shards holds {len(splits)} splits, and all of them are trained on; to leave some out, name the "
            "others, such as 'shards/train-*.tar'"
        )


def _model(job: Job) -> str:
    described: ModelDescription = job.task.description
    parameters = list(job.accelerator.unwrap_model(job.model).parameters())
    count, trained = (sum(p.numel() for p in parameters if p.requires_grad or not only) for only in (False, True))
    frozen = "" if trained == count else f", {trained:,} of them trained"
    return (
        f"{described.kind}, width {described.width}, {described.depth} blocks, {described.heads} heads, "
        f"{count:,} parameters{frozen}"
    )


def _origin(job: Job, report: KeyReport | None) -> str:
    settings = job.settings
    if job.start.step:
        return f"resumed at step {job.start.step:,}"
    if settings.init == SCRATCH:
        return "from scratch"
    return f"initialised from {settings.init}" + ("" if report is None else f" {report}")
