"""Accuracy of a classifier, in which each sample counts once on any number of processes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import nn

from mae.data.eval_batches import EvalBatches
from mae.data.loader import load, normalize
from mae.data.statistics import PixelStatistics
from mae.errors import UserError, first_of


class Accuracy(NamedTuple):
    """Accuracy and loss over all samples."""

    accuracy: float
    """Share of samples whose label has the greatest logit, from 0 to 1."""
    loss: float
    """Mean cross-entropy."""
    samples: int


def evaluate(
    accelerator: Accelerator, model: nn.Module, batches: EvalBatches, statistics: PixelStatistics, workers: int
) -> Accuracy:
    """Evaluate `model` on this rank's batches, and return the result over all ranks.

    The model must not be wrapped by DDP, because ranks may have different numbers of batches. Ranks exchange sums
    only, so no sample is padded or counted twice.

    Raises:
        UserError: on every rank, if any image is bad.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    bad: list[str] = []
    with torch.no_grad(), accelerator.autocast():
        for batch in load(batches, range(len(batches)), workers):
            images = normalize(batch.images.to(accelerator.device), statistics)
            logits = model(images).float()
            labels = batch.labels.to(accelerator.device)
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            correct = (logits.argmax(1) == labels).sum()
            sums += torch.stack([correct.double(), loss.double(), torch.tensor(len(labels)).to(loss)]).cpu()
            bad += batch.bad
    model.train(was_training)
    require_good_images(bad)
    total: torch.Tensor = accelerator.reduce(sums.to(accelerator.device), reduction="sum")
    correct_count, loss_sum, samples = total.tolist()
    assert int(samples) == batches.total, f"evaluated {samples} of {batches.total} samples"
    return Accuracy(correct_count / samples, loss_sum / samples, int(samples))


def gather_rows(rows: Sequence[NDArray[Any]], samples: int) -> NDArray[Any]:
    """Return one row for each sample, in their order, on every rank. Collective.

    Args:
        rows: Rows of this rank in parts [samples, value]; of the samples of `EvalBatches`, rank r has r, r + ranks, ...
        samples: Number of samples of all ranks.
    """
    parts = gather_object([np.concatenate(rows) if rows else None])
    first = next(part for part in parts if part is not None)
    gathered = np.empty((samples, first.shape[1]), first.dtype)
    for number, part in enumerate(parts):
        if part is not None:
            gathered[number :: len(parts)] = part
    return gathered


def require_good_images(bad: list[str], where: str = "the evaluation shards") -> None:
    """Raise a `UserError` on every rank if any rank has met a bad image. Collective."""
    names: list[str] = gather_object(bad)
    if names:
        raise UserError(
            f"{len(names)} bad image{'s' if len(names) > 1 else ''} in {where}: "
            f"{first_of(names)}; pack the shards again without them"
        )
