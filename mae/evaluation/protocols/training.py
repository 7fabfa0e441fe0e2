"""Training of a module on labelled samples, the same on any number of processes, and what the module predicts."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import nn
from torch.optim import Optimizer

from mae.data.batch import Batch, BatchRecipe, to_device
from mae.data.eval_batches import EvalBatches
from mae.data.images.augment import AugmentSettings
from mae.data.images.erasing import erase
from mae.data.index import ShardIndex
from mae.data.loader import load, normalize
from mae.data.plan import BatchPlan, plan_batches
from mae.data.settings import DataSettings
from mae.data.source import IndexedSource, statistics_of
from mae.data.train_batches import TrainBatches
from mae.errors import UserError
from mae.evaluation.classification import gather_rows, require_good_images
from mae.inference.model import BATCH
from mae.progress import progress_bar
from mae.tasks.classification_loss import ClassificationLoss, RegularizationSettings
from mae.training.job import total_steps
from mae.training.loop import seed_step
from mae.training.optimizer import CosineSchedule, set_learning_rate

MICRO_BATCH = 64
"""Number of images that go through a module at once. Where it is the same for all numbers of processes, so are the
statistics of batch norms and the pairs of mixup."""
_BATCH_OF_RATE = 256
# Number of images over which the statistics of batch norms are measured, and of those that a norm needs at once.
_MEASURED, _LEAST_NORMED = 4096, 2
PLAIN = RegularizationSettings(drop_path=0.0, label_smoothing=0.0, mixup=0.0, cutmix=0.0)
"""No regularization."""


@dataclass(frozen=True)
class TrainingRules:
    """What all protocols that train have in common."""

    epochs: float
    batch_size: int
    """Global batch [images per optimiser step], over all processes."""
    augment: AugmentSettings
    regularization: RegularizationSettings


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how."""

    build: Callable[[], nn.Module]
    """Return a new module, normalised images [batch channels height width] -> logits [batch classes]. Its random
    weights are drawn from torch's generator. Parameters without `requires_grad` are not trained."""
    optimizer: Callable[[nn.Module], Optimizer]
    """Return the optimiser of a module, whose parameter groups have an `lr_scale`."""
    rates: tuple[float, ...]
    """Peak learning rates to choose from, per 256 images of the global batch."""
    warmup: float
    """Share of the steps over which the learning rate rises linearly from 0."""
    augment: AugmentSettings
    regularization: RegularizationSettings = PLAIN
    about: Mapping[str, Any] = field(default_factory=dict)
    """What else is to be said of it in the results."""
    normalizes_batches: bool = False
    """Whether the module has batch norms, which need two images or more."""


@dataclass(frozen=True)
class Samples:
    """Labelled samples of shards."""

    index: ShardIndex
    ids: NDArray[np.int64]
    data: DataSettings
    classes: int

    @property
    def labels(self) -> NDArray[np.int64]:
        """Labels in the order of the ids."""
        return self.index.label[self.ids]

    def take(self, places: NDArray[np.int64]) -> "Samples":
        """Return some of the samples."""
        return replace(self, ids=self.ids[places])

    def batches(self, plan: BatchPlan, rank: int, seed: int, augment: AugmentSettings) -> TrainBatches:
        """Return the training batches of one rank, by the number of the micro-batch."""
        return IndexedSource(self.index).train_batches(plan, rank, BatchRecipe(seed, self.data, augment), self.ids)


def train(
    recipe: Recipe, rate: float, samples: Samples, rules: TrainingRules, seed: int, accelerator: Accelerator, title: str
) -> nn.Module:
    """Build and train a module; return it on every process. Collective.

    The global batches, and all that is drawn for an image, are the same on any number of processes; gradients are
    averaged. With batches of whole `MICRO_BATCH`es for each process, only the order of sums differs.

    Raises:
        UserError: on every process, if images are bad; or if the batch cannot be divided among the processes.
    """
    torch.manual_seed(seed)
    module = recipe.build().to(accelerator.device).train()
    optimizer, plan = recipe.optimizer(module), plan_of(recipe, rules, accelerator.num_processes)
    total = total_steps(len(samples.ids), rules.epochs, rules.batch_size)
    schedule = CosineSchedule(rate * rules.batch_size / _BATCH_OF_RATE, 0.0, recipe.warmup * total, total)
    made = samples.batches(plan, accelerator.process_index, seed, recipe.augment)
    numbers = range(total * plan.accumulation)
    batches = load(made, numbers, samples.data.workers, pin_memory=accelerator.device.type == "cuda")
    loss_of = ClassificationLoss(recipe.regularization, samples.classes)
    is_shared, erasing = accelerator.num_processes > 1, recipe.augment.erase
    prepared = accelerator.prepare_model(module) if is_shared else module
    if is_shared:
        prepared.broadcast_buffers = False  # the statistics of batch norms are measured at the end
    steps = _Steps(accelerator, prepared, plan, samples, batches, loss_of, seed, erasing)
    per_epoch = math.ceil(len(samples.ids) / rules.batch_size)
    with progress_bar(title, total) if accelerator.is_main_process else nullcontext(lambda done: None) as advance:
        for step in range(total):
            set_learning_rate(optimizer, schedule(step))
            steps.backward(step)
            optimizer.step()
            optimizer.zero_grad()
            advance(1)
            if (step + 1) % per_epoch == 0 or step + 1 == total:
                require_good_images(steps.bad, "data.shards")
    if is_shared:
        accelerator.free_memory()
    if recipe.normalizes_batches:
        count = min(total, math.ceil(_MEASURED / rules.batch_size)) * plan.accumulation
        measure_batch_norms(module, made, count, samples.data, accelerator)
    return module.eval()


def plan_of(recipe: Recipe, rules: TrainingRules, processes: int) -> BatchPlan:
    """Return how the global batch is divided.

    Raises:
        UserError: if it cannot be divided, mixup and cutmix would have to pair an odd number of images, or a batch norm
            would see one image.
    """
    plan = plan_batches(rules.batch_size, processes, MICRO_BATCH)
    if recipe.normalizes_batches and plan.per_process < _LEAST_NORMED:
        raise UserError(
            f"batch norms need at least {_LEAST_NORMED} images, but a process takes {plan.per_process} at a time; "
            f"choose a batch_size of at least {_LEAST_NORMED * processes}"
        )
    recipe.regularization.require_pairs(plan.per_process)
    return plan


@dataclass
class _Steps:
    """Gradients of the global batches, of which this process computes its share."""

    accelerator: Accelerator
    module: nn.Module
    plan: BatchPlan
    samples: Samples
    batches: Iterator[Batch]
    loss_of: ClassificationLoss
    seed: int
    erasing: float
    """Probability of random erasing."""

    def __post_init__(self) -> None:
        self.bad: list[str] = []

    def backward(self, step: int) -> None:
        """Accumulate the mean gradient of a global batch. Collective."""
        accelerator, parts = self.accelerator, self.plan.accumulation
        for part in range(parts):
            batch = to_device(next(self.batches), accelerator.device)
            self.bad += [*batch.bad, *([batch.lost] if batch.lost else [])]
            # By the place in the global batch, whichever process has it.
            seed_step(self.seed, step, accelerator.process_index * parts + part)
            with nullcontext() if part == parts - 1 else accelerator.no_sync(self.module):
                inputs = normalize(batch.images, statistics_of(self.samples.data))
                inputs = erase(inputs, batch.words, self.erasing)
                accelerator.backward(self.loss_of(self.module, inputs, batch.labels) / parts)


@torch.no_grad()
def measure_batch_norms(
    module: nn.Module, batches: TrainBatches, count: int, data: DataSettings, accelerator: Accelerator
) -> None:
    """Set the statistics of all batch norms to their means over the first `count` micro-batches of each process.

    Running averages would depend on the number of processes, and after few steps on their start. Collective.
    """
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean of all that follows
    for batch in load(batches, range(count), data.workers):
        module(normalize(batch.images.to(accelerator.device), statistics_of(data)))
    for norm in norms if accelerator.num_processes > 1 else ():
        for statistic in (norm.running_mean, norm.running_var):
            assert statistic is not None
            statistic.copy_(accelerator.reduce(statistic, reduction="mean"))


@torch.no_grad()
def predict(module: nn.Module, samples: Samples, accelerator: Accelerator) -> NDArray[np.float64]:
    """Return the probabilities of all classes, float64 [samples, classes], on every process. Collective.

    Each image is predicted once, on some process, from its centre crop.

    Raises:
        UserError: on every process, if images are bad.
    """
    rank, processes, data = accelerator.process_index, accelerator.num_processes, samples.data
    batches = EvalBatches(samples.index, BATCH, data, rank, processes, samples.ids)
    rows: list[NDArray[np.float64]] = []
    bad: list[str] = []
    for batch in load(batches, range(len(batches)), data.workers if len(batches) else 0):
        inputs = normalize(batch.images.to(accelerator.device), statistics_of(data))
        rows.append(module(inputs).double().softmax(dim=1).cpu().numpy())
        bad += batch.bad
    require_good_images(bad, "the shards")
    return gather_rows(rows, len(samples.ids))
