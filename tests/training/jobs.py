"""A job for the loop, small enough to run in a moment on any number of ranks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mae.data.batch import Batch, BatchRecipe, TrainingBatches
from mae.data.indexing import open_index
from mae.data.plan import BatchPlan, plan_batches
from mae.data.settings import DataSettings
from mae.data.source import IndexedSource
from mae.models.description import ModelDescription, describe_model
from mae.models.settings import EncoderSettings
from mae.training.checkpoints.manifest import DataPosition, RunPosition
from mae.training.job import Job
from mae.training.optimizer import OptimSettings, build_optimizer, cosine_schedule, parameter_groups
from mae.training.processes.accelerator import start_accelerator
from mae.training.progress import TrainingProgress
from mae.training.run_folder.folder import RunFolder
from mae.training.settings import TrainSettings
from mae.training.state import TrainingState
from mae.training.task import LossOf, Task

STEPS_PER_EPOCH = 3


@dataclass(frozen=True)
class Shrinking(Task):
    """A model of one layer that learns to answer zero."""

    settings: TrainSettings
    source: IndexedSource

    @property
    def unit(self) -> int:
        return 1

    @property
    def noise_columns(self) -> int:
        return 0

    @property
    def flops_per_image(self) -> int:
        return 3 * 2 * 64

    @property
    def description(self) -> ModelDescription:
        return describe_model("classifier", EncoderSettings(), (16, 16), (0.5,), (0.5,), 1.0)

    def build_model(self) -> nn.Module:
        torch.manual_seed(self.settings.seed)
        return nn.Linear(64, 1)

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        return parameter_groups(model, self.settings.optim.weight_decay)

    def batches(self, plan: BatchPlan, rank: int) -> TrainingBatches:
        recipe = BatchRecipe(self.settings.seed, self.settings.data, self.settings.augment)
        return self.source.train_batches(plan, rank, recipe)

    def loss_of(self, images: int) -> LossOf:
        def loss_of(model: nn.Module, batch: Batch) -> Tensor:
            loss: Tensor = model(batch.images.float().flatten(1) / 255).square().mean()
            return loss

        return loss_of


def job_of(shard: Path, run_dir: Path, allowed: int, start: int = 0, log_every: int = 1) -> Job:
    """Batches of eight on any number of ranks, on a model of one layer."""
    accelerator = start_accelerator("fp32")
    plan = plan_batches(8, accelerator.num_processes, None)
    cache = run_dir.parent / "cache"
    data = DataSettings(channels=1, image_size=(8,), max_bad_samples=allowed, cache_dir=cache, workers=0)
    source = IndexedSource(open_index([str(shard)], cache))
    optim = OptimSettings(warmup_epochs=1.0)
    task = Shrinking(TrainSettings(run_dir, log_every=log_every, data=data, optim=optim), source)
    model = task.build_model()
    prepared, optimizer = accelerator.prepare(
        model, build_optimizer(task.parameter_groups(model), optim, accelerator.device)
    )
    return Job(
        task=task,
        settings=task.settings,
        accelerator=accelerator,
        model=prepared,
        state=TrainingState(accelerator.unwrap_model(prepared), optimizer, None),
        schedule=cosine_schedule(optim, 8, 100.0, float(STEPS_PER_EPOCH), 300),
        batches=task.batches(plan, accelerator.process_index),
        loss_of=task.loss_of(plan.per_process),
        folder=RunFolder(run_dir),
        writer=None,
        progress=TrainingProgress("train", accelerator.is_main_process),
        start=RunPosition(start, DataPosition(8 * start, source.index.fingerprint, 8), {}, {}),
        total=300,
    )
