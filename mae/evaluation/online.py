"""Evaluation while pretraining: held-out loss, k-NN, few-shot probe and rank of the features.

It changes nothing in training: no gradient is taken, and no random number is drawn that a step could notice, because
each step seeds its generators itself. Nothing is chosen on data, so that all evaluations measure the same: the tokens,
the number of neighbours and C are fixed.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.fsdp import register_fsdp_forward_method

from mae import keyed
from mae.data.eval_batches import EvalBatches, first_per_class
from mae.data.index import ShardIndex
from mae.data.labelled_sets import (
    OverlapLimit,
    ShardSettings,
    agreed_names,
    count_classes,
    limit_overlap,
    require_two_classes,
)
from mae.data.loader import load, normalize
from mae.data.prepare import open_shards
from mae.data.scan import NO_LABEL
from mae.data.source import IndexedSource, statistics_of
from mae.data.spread import spread_evenly
from mae.evaluation.best import evaluation_due
from mae.evaluation.classification import gather_rows, require_good_images
from mae.evaluation.protocols.knn import votes
from mae.evaluation.protocols.logistic import probabilities
from mae.evaluation.protocols.outcome import accuracy
from mae.evaluation.rank import effective_rank
from mae.keyed import Purpose
from mae.models.autoencoder import MaskedAutoencoder
from mae.models.flops import autoencoder_flops, classifier_flops
from mae.models.readout import select
from mae.tasks.pretraining import Pretraining
from mae.training.job import Job

KIND = "evaluation"
"""Kind of the record in `metrics.jsonl`."""
NEIGHBOURS, STRENGTH = 20, 1.0
"""Number of neighbours of k-NN, and C of the few-shot probe."""
_SHARE_OF_FLOPS = 0.03
_SETTINGS = ShardSettings("evaluation.train_shards", "evaluation.eval_shards")
_LIMIT = OverlapLimit(0.01, "a fixed limit", _SETTINGS.held_out)


class OnlineSets(NamedTuple):
    """Images to evaluate on while pretraining."""

    held_out: ShardIndex
    ids: NDArray[np.int64]
    """Ids of the held-out samples that are taken."""
    known: ShardIndex | None
    """Labelled samples; None without any, or if the held-out samples have no labels."""
    known_ids: NDArray[np.int64]
    """Ids of the labelled samples that are taken."""
    classes: int


def open_sets(task: Pretraining, say: Callable[[str], None]) -> OnlineSets | None:
    """Open the shards of the evaluation while pretraining; None without `evaluation.eval_shards`.

    Raises:
        UserError: if shards are missing or damaged, labels do not fit, or more than 1 % of the held-out samples are
            also training samples or labelled samples.
    """
    settings, data = task.settings.evaluation, replace(task.settings.data, index=None)
    if not settings.eval_shards:
        return None
    held_out = open_shards(settings.eval_shards, data, say)
    if isinstance(task.source, IndexedSource):
        limit_overlap(task.source.index, held_out, _LIMIT, data, say)
    known, classes = None, 0
    if settings.train_shards and NO_LABEL in held_out.label:
        say("evaluation.eval_shards have samples without labels: only held-out loss and rank are measured")
    elif settings.train_shards:
        known = open_shards(settings.train_shards, data, say)
        classes = count_classes(known, held_out, agreed_names(known, held_out, say, _SETTINGS), _SETTINGS)
        limit_overlap(known, held_out, _LIMIT, data, say)
    ids, known_ids = _spread(held_out, settings.images), _spread(known, settings.images)
    if known is not None:
        require_two_classes(known.label[known_ids], "the images taken of evaluation.train_shards")
    return OnlineSets(held_out, ids, known, known_ids, classes)


def online_evaluation(job: Job, task: Pretraining, sets: OnlineSets | None) -> Callable[[int], None]:
    """Return a function that evaluates the model after a step, if that is due. Collective."""
    if sets is None:
        return lambda step: None
    # Without this, FSDP2 would assign work of the blocks outside a forward pass to the next step.
    register_fsdp_forward_method(job.accelerator.unwrap_model(job.model), "features")
    every = task.settings.evaluation.every or _epochs_between(job, task, sets)
    evaluation = _OnlineEvaluation(job, task, sets)

    def evaluate(step: int) -> None:
        if evaluation_due(job, step, every):
            evaluation.run(step)

    return evaluate


def _epochs_between(job: Job, task: Pretraining, sets: OnlineSets) -> float:
    """Return the epochs between evaluations, spread evenly, that keep a share of the operations of training.

    A run that is too short for one evaluation has one, at its end.
    """
    model, data = task.settings.model, task.settings.data
    whole = classifier_flops(model, data.size, data.channels, 0, "linear").forward
    masked = autoencoder_flops(model, data.size, data.channels).forward
    operations = len(sets.ids) * (whole + masked) + len(sets.known_ids) * whole
    allowed = _SHARE_OF_FLOPS * task.flops_per_image * job.plan.global_batch * job.total
    return job.epoch_after(job.total) / max(1, math.floor(allowed / operations))


@dataclass
class _OnlineEvaluation:
    """Evaluations of one start of a run, and the time that they took."""

    job: Job
    task: Pretraining
    sets: OnlineSets

    def __post_init__(self) -> None:
        self.began, self.seconds = time.perf_counter(), 0.0

    def run(self, step: int) -> None:
        """Evaluate the model, and log the result on the main process. Collective."""
        job, sets, began = self.job, self.sets, time.perf_counter()
        # Compiled blocks run uncompiled: the shapes of whole images would use up the versions that training may have.
        with torch.compiler.set_stance("force_eager"), job.state.evaluation_weights() as model:
            assert isinstance(model, MaskedAutoencoder)
            was_training = model.training
            model.eval()
            loss, features = self.measure(model, sets.held_out, sets.ids, with_loss=True)
            known = None if sets.known is None else self.measure(model, sets.known, sets.known_ids, False)[1]
            model.train(was_training)
        if not job.accelerator.is_main_process:
            return
        found = self.judge(features, known)
        self.seconds += (seconds := time.perf_counter() - began)
        share = self.seconds / (time.perf_counter() - self.began)
        record = {"step": step, "epoch": job.epoch_after(step), "loss": loss if math.isfinite(loss) else None}
        cost = {"samples": len(sets.ids), "seconds": seconds, "share_of_time": share}
        job.log({"kind": KIND, **record, **found, **cost})
        job.progress.say(_line(record | found | cost))

    @torch.no_grad()
    def measure(
        self, model: MaskedAutoencoder, index: ShardIndex, ids: NDArray[np.int64], with_loss: bool
    ) -> tuple[float, NDArray[np.float32]]:
        """Return the mean loss of some samples, and their features in the order of `ids` [samples, feature].

        Raises:
            UserError: on every rank, if any image is bad.
        """
        accelerator = self.job.accelerator
        # Otherwise each evaluation would decode all images of the shards, not those that are taken.
        data = replace(self.task.settings.data, keep_decoded=False)
        rank, ranks, statistics = accelerator.process_index, accelerator.num_processes, statistics_of(data)
        batches = EvalBatches(index, self.job.plan.per_process, data, rank, ranks, ids)
        key, total = keyed.key(Purpose.EVALUATION), torch.zeros((), dtype=torch.float64, device=accelerator.device)
        rows: list[NDArray[np.float32]] = []
        bad: list[str] = []
        with accelerator.autocast():
            for batch in load(batches, range(len(batches)), data.workers if len(batches) else 0):
                images = normalize(batch.images.to(accelerator.device), statistics)
                if with_loss:
                    noise = torch.from_numpy(keyed.uniform_float32(key, batch.ids.numpy(), model.patches))
                    total += model(images, noise.to(accelerator.device)).loss.double() * len(images)
                rows.append(select(model.features(images), "cls+avg", "raw").float().cpu().numpy())
                bad += batch.bad
        require_good_images(bad)
        total = accelerator.reduce(total, reduction="sum")
        return float(total) / len(ids), gather_rows(rows, len(ids))

    def judge(self, features: NDArray[np.float32], known: NDArray[np.float32] | None) -> dict[str, Any]:
        """Return rank, and the accuracies of k-NN and few-shot probe if there are labels; None if not finite."""
        sets, device = self.sets, self.job.accelerator.device
        names = ("rank",) if known is None else ("rank", "knn", "few_shot")
        if not all(np.isfinite(each).all() for each in (features, known) if each is not None):
            return dict.fromkeys(names)
        found = {"rank": effective_rank(features, device)}
        if known is None or sets.known is None:
            return found
        labels, expected = sets.known.label[sets.known_ids], sets.held_out.label[sets.ids]
        voted = votes(known, labels, features, (NEIGHBOURS,), sets.classes, device)[NEIGHBOURS]
        # Always the same samples, so that evaluations can be compared.
        order = keyed.shuffled(keyed.key(Purpose.EVALUATION), np.arange(len(labels)))
        few = first_per_class(labels, order, self.task.settings.evaluation.shots)
        probed = probabilities(known[few], labels[few], features, (STRENGTH,), sets.classes, device)[STRENGTH]
        return found | {"knn": accuracy(voted, expected), "few_shot": accuracy(probed, expected)}


def _spread(index: ShardIndex | None, most: int) -> NDArray[np.int64]:
    """Return the ids of at most `most` samples, spread evenly."""
    samples = 0 if index is None else len(index)
    return spread_evenly(samples, most)


def _line(record: dict[str, Any]) -> str:
    """Describe an evaluation in one line."""
    shown = {"loss": "held-out loss {:.4f}", "knn": "k-NN {:.1%}", "few_shot": "few-shot {:.1%}", "rank": "rank {:.1f}"}
    known = [text.format(record[name]) for name, text in shown.items() if record.get(name) is not None]
    figures = ", ".join(known) or "not finite"
    time_taken = f"{record['seconds']:.1f} s, {record['share_of_time']:.1%} of the time"
    return f"epoch {record['epoch']:.1f}: {figures} on {record['samples']:,} samples ({time_taken})"
