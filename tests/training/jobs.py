"""A job for the loop, small enough to run in a moment on any number of ranks."""

from pathlib import Path

import torch
from torch import nn

from mae.data.batches import TrainBatches, plan_batches
from mae.data.images.augment import AugmentSettings
from mae.data.indexing import open_index
from mae.data.loader import load
from mae.data.settings import DataSettings
from mae.models.description import describe_model
from mae.models.settings import EncoderSettings
from mae.training.checkpoints.manifest import DataPosition, Standing
from mae.training.loop import Job
from mae.training.optimizer import OptimSettings, build_optimizer, cosine_schedule, parameter_groups
from mae.training.processes.accelerator import start_accelerator
from mae.training.progress import TrainingProgress
from mae.training.run_folder.folder import RunFolder
from mae.training.settings import TrainSettings
from mae.training.state import TrainingState

STEPS_PER_EPOCH = 3


def job_of(shard: Path, run_dir: Path, allowed: int, start: int = 0, log_every: int = 1) -> Job:
    """Batches of eight on any number of ranks, on a model of one layer."""
    accelerator = start_accelerator("fp32")
    plan = plan_batches(8, accelerator.num_processes, None)
    cache = run_dir.parent / "cache"
    data = DataSettings(channels=1, image_size=(8,), max_bad_samples=allowed, cache_dir=cache)
    index = open_index([str(shard)], cache)
    batches = TrainBatches(index, plan, accelerator.process_index, 0, data, AugmentSettings())
    torch.manual_seed(0)
    model, optim = nn.Linear(64, 1), OptimSettings(warmup_epochs=1.0)
    prepared, optimizer = accelerator.prepare(
        model, build_optimizer(parameter_groups(model, 0.05), optim, accelerator.device)
    )
    return Job(
        settings=TrainSettings(run_dir, log_every=log_every),
        accelerator=accelerator,
        model=prepared,
        state=TrainingState(accelerator.unwrap_model(prepared), optimizer, None),
        description=describe_model("classifier", EncoderSettings(), (16, 16), (0.5,), (0.5,), 1.0),
        optimizer=optimizer,
        schedule=cosine_schedule(optim, 8, 100.0, float(STEPS_PER_EPOCH), 300),
        clip_grad=None,
        plan=plan,
        samples=24,
        max_bad_samples=allowed,
        batches_from=lambda samples, steps: load(batches, range(samples // 8, samples // 8 + steps), 0),
        loss_of=lambda model, batch: model(batch.images.float().flatten(1) / 255).square().mean(),
        flops_per_image=3 * 2 * 64,
        folder=RunFolder(run_dir),
        writer=None,
        progress=TrainingProgress("train", accelerator.is_main_process),
        start=Standing(start, DataPosition(8 * start, index.fingerprint, 8), "", {}),
        total=300,
    )
