"""Baselines of the pretraining loss: what two predictions that need no learning reach on the run's own crops."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mae import keyed
from mae.data.batch import empty_batch
from mae.data.images.augment import NUMBERS_PER_SAMPLE, TrainViews
from mae.data.loader import normalize
from mae.data.source import statistics_of
from mae.errors import BadImageError
from mae.keyed import Purpose
from mae.models.autoencoder import patch_targets
from mae.models.patches import patchify
from mae.run_files import figures
from mae.tasks.pretraining import Pretraining
from mae.training.job import Job

KIND = "baselines"
"""Kind of the record in `metrics.jsonl`."""
# Number of crops: as many as have the pixels of 256 crops of 224x224, within these limits.
_PIXELS, _LEAST, _MOST = 256 * 224 * 224, 256, 2048
# Images whose targets are in memory at a time.
_CHUNK = 32


class Baselines(NamedTuple):
    """Losses of two predictions, averaged over all patches of some training crops."""

    patch_mean: float
    """Loss of predicting 0: with `norm_pix_loss` the mean of each patch, else the mean of all pixels."""
    place_mean: float
    """Loss of predicting the mean target of each place, over the images: its variance (with n - 1)."""
    images: int
    """Number of crops."""


def log_baselines(job: Job, task: Pretraining) -> None:
    """Measure the baselines on the main process and log them: once in a run, and only if steps are left."""
    is_due = job.accelerator.is_main_process and job.start.step < job.total
    if not is_due or logged_baselines(job.folder.metrics()) is not None:
        return
    found = measure_baselines(task)
    if found is not None:
        job.log({"kind": KIND, "step": job.start.step, **found._asdict()})
        job.progress.say(describe(found, task.settings.model.norm_pix_loss))


def logged_baselines(records: list[dict[str, Any]]) -> Baselines | None:
    """Return the baselines from the records of `metrics.jsonl`; None if they were not measured."""
    for record in figures(records, KIND, *Baselines._fields):
        return Baselines(*(record[name] for name in Baselines._fields))
    return None


def measure_baselines(task: Pretraining) -> Baselines | None:
    """Measure the baselines on one crop each of some images, keyed by the seed; None for fewer than two good images."""
    settings, data = task.settings, task.settings.data
    patch, statistics = settings.model.patch, statistics_of(data)
    most = min(max(_PIXELS // math.prod(data.size), _LEAST), _MOST)
    if any(shard.is_remote for shard in task.source.shards):
        most = _LEAST  # each is a request
    crops = empty_batch(most, data, 0).images
    numbers, words = _numbers(settings.seed, most)
    views, filled = TrainViews(crops, numbers, settings.augment, words, data.value_range, data.mean), 0
    for _, image in task.source.some_images(most, data):
        try:
            if isinstance(image, bytes):
                views.add(image, [filled])
                filled += 1
        except BadImageError:
            continue  # training reports it
    views.finish()
    if filled < 2:
        return None
    sums = squares = torch.zeros(())
    for chunk in torch.split(crops[:filled], _CHUNK):
        target = patch_targets(patchify(normalize(chunk, statistics), patch), settings.model.norm_pix_loss).double()
        sums, squares = sums + target.sum(dim=0), squares + target.square().sum(dim=0)
    variance = (squares - sums.square() / filled) / (filled - 1)
    return Baselines((squares / filled).mean().item(), variance.mean().item(), filled)


def describe(found: Baselines, norm_pix_loss: bool) -> str:
    """Describe the baselines in one line."""
    mean = "the mean of each patch" if norm_pix_loss else "the mean of all pixels"
    return (
        f"for comparison, on {found.images} training crops: predicting {mean} gives a loss of {found.patch_mean:.3f}, "
        f"the mean target of each place {found.place_mean:.3f}"
    )


def _numbers(seed: int, rows: int) -> tuple[NDArray[np.float64], list[int]]:
    """Return the numbers of the crops, float64 [rows, `NUMBERS_PER_SAMPLE`], and a word for each row's RandAugment."""
    key, ids = keyed.key(Purpose.BASELINE, seed), np.arange(rows)
    words = keyed.bits(key ^ np.uint64(Purpose.AUGMENT), ids, 1)[:, 0].tolist()
    return keyed.uniform(key, ids, NUMBERS_PER_SAMPLE), words
