"""Start a run, or go on with it: the checks, the checkpoint, and the job for the loop."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mae.data.batches import Batch, TrainBatches
from mae.data.loader import load
from mae.data.prepare import statistics_of
from mae.data.stream import StreamBatches
from mae.models.description import ModelKind, describe_model
from mae.models.settings import EncoderSettings
from mae.models.weights import load_all
from mae.settings import dump
from mae.training import checkpoint
from mae.training.checkpoint import Checkpoint
from mae.training.distributed import require_agreement
from mae.training.loop import Job, total_steps
from mae.training.optimizer import OptimSettings, build_optimizer, cosine_schedule
from mae.training.progress import TrainingProgress
from mae.training.run_folder import RunFolder
from mae.training.settings import TrainSettings


def start_job(
    accelerator: Accelerator,
    settings: TrainSettings,
    model: nn.Module,
    kind: ModelKind,
    encoder: EncoderSettings,
    optim: OptimSettings,
    groups: list[dict[str, Any]],
    batches: TrainBatches | StreamBatches,
    loss_of: Callable[[nn.Module, Batch], Tensor],
    progress: TrainingProgress,
) -> Job:
    """Take up the run in `settings.run_dir` at its newest good checkpoint, or begin it.

    Raises:
        UserError: if the folder belongs to another run, the checkpoint to another model or other data, or
            the processes do not agree.
    """
    samples, plan, data = batches.samples, batches.plan, batches.data
    statistics = statistics_of(data)
    total = total_steps(samples, settings.epochs, plan.global_batch)
    schedule = cosine_schedule(optim, plan.global_batch, settings.epochs, samples / plan.global_batch, total)
    fingerprint = batches.fingerprint
    folder = RunFolder(settings.run_dir)
    folder.check(settings)
    require_agreement(accelerator, settings=dump(settings), data=fingerprint, torch=torch.__version__)
    found = _resume(folder, model, fingerprint, plan.global_batch, settings.restart_data_order, progress)
    start = found.step if found else 0
    if found:
        progress.say(f"resuming {folder.path} from {found.path.name}: {start:,} of {total:,} steps are done")

    prepared, optimizer = accelerator.prepare(model, build_optimizer(groups, optim, accelerator.device))
    if found:
        optimizer.load_state_dict(found.optimizer())
    if accelerator.is_main_process:
        folder.create(settings)
        folder.forget_after(start)
    accelerator.wait_for_everyone()
    numbers = range(start * plan.accumulation, total * plan.accumulation)
    workers = data.workers if numbers else 0
    return Job(
        settings=settings,
        accelerator=accelerator,
        model=prepared,
        description=describe_model(kind, encoder, data.size, statistics.mean, statistics.std, data.crop_pct),
        optimizer=optimizer,
        schedule=schedule,
        clip_grad=optim.clip_grad,
        plan=plan,
        samples=samples,
        fingerprint=fingerprint,
        max_bad_samples=data.max_bad_samples,
        batches=load(
            batches.starting_at(numbers.start), numbers, workers, pin_memory=accelerator.device.type == "cuda"
        ),
        loss_of=loss_of,
        folder=folder,
        progress=progress,
        start=start,
        total=total,
    )


def finish_job(job: Job) -> None:
    """Publish the model of the last step as the run's own."""
    if job.accelerator.is_main_process:
        job.folder.publish_model(checkpoint.step_folder(job.folder.checkpoints, job.total))
    job.accelerator.wait_for_everyone()


def _resume(
    folder: RunFolder,
    model: nn.Module,
    fingerprint: str,
    global_batch: int,
    restart_data_order: bool,
    progress: TrainingProgress,
) -> Checkpoint | None:
    found = checkpoint.newest(folder.checkpoints, progress.say)
    if found is not None:
        if not restart_data_order:
            checkpoint.require_same_data(found, fingerprint, global_batch)
        load_all(model, found.model(), found.path)
    return found
