"""Start a run, or go on with it: the checks, the checkpoint, and the job for the loop."""

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from mae.data.batches import Batch, TrainBatches
from mae.data.loader import load
from mae.data.prepare import statistics_of
from mae.data.stream import StreamBatches
from mae.errors import UserError
from mae.models.description import ModelKind, describe_model
from mae.models.execution import checkpoint_activations, compile_blocks
from mae.models.settings import EncoderSettings
from mae.settings import dump
from mae.training.checkpoints.manifest import DataPosition, Standing
from mae.training.checkpoints.reader import Checkpoint, newest_checkpoint, require_same_data, verify_checkpoint
from mae.training.checkpoints.writer import CheckpointWriter, bytes_needed
from mae.training.loop import Job, LossOf, total_steps
from mae.training.optimizer import OptimSettings, build_optimizer, cosine_schedule
from mae.training.processes.accelerator import library_versions, require_agreement
from mae.training.processes.fsdp2 import is_sharded
from mae.training.progress import TrainingProgress
from mae.training.run_folder.folder import RunFolder, settings_hash
from mae.training.settings import TrainSettings
from mae.training.state import TrainingState, published


def start_job(
    accelerator: Accelerator,
    settings: TrainSettings,
    model: nn.Module,
    kind: ModelKind,
    encoder: EncoderSettings,
    optim: OptimSettings,
    groups: list[dict[str, Any]],
    batches: TrainBatches | StreamBatches,
    loss_of: LossOf,
    flops_per_image: int,
    progress: TrainingProgress,
) -> Job:
    """Take up the run in `settings.run_dir` at its newest good checkpoint, or begin it.

    Raises:
        UserError: if the folder belongs to another run or is in use, the checkpoint to another model or other data, or
            the processes do not agree.
    """
    samples, plan, data = batches.samples, batches.plan, batches.data
    statistics = statistics_of(data)
    total = total_steps(samples, settings.epochs, plan.global_batch)
    schedule = cosine_schedule(optim, plan.global_batch, settings.epochs, samples / plan.global_batch, total)
    folder = RunFolder(settings.run_dir)
    folder.check(settings)
    folder.keep_out_of(batches.shards)
    require_agreement(
        accelerator,
        settings=dump(settings),
        data=batches.fingerprint,
        plan=repr((plan, total)),
        libraries=json.dumps(library_versions()),
    )
    with ExitStack() as after_failure:
        after_failure.callback(folder.unlock)
        if accelerator.is_main_process:
            folder.lock()
            folder.forget_exit()
        accelerator.wait_for_everyone()
        beginning = Standing(0, DataPosition(0, batches.fingerprint, plan.global_batch), settings_hash(settings), {})
        found = _find(folder, settings, beginning, progress)
        start = _standing(folder, found, beginning)
        _set_execution(model, settings)
        prepared, optimizer = accelerator.prepare(model, build_optimizer(groups, optim, accelerator.device))
        state = TrainingState(accelerator.unwrap_model(prepared), optimizer, settings.ema_decay)
        if found:
            state.restore(found)
        _say_where(folder, found, total, progress)
        if accelerator.is_main_process:
            folder.create(settings)
            folder.forget_after(start.step)
            _warn_of_little_room(folder, state, settings.keep_checkpoints, progress)
        leg = _shared_word()
        accelerator.wait_for_everyone()
        after_failure.pop_all()

    def batches_from(position: int, steps: int) -> Iterator[Batch]:
        first = position // plan.global_batch * plan.accumulation
        numbers = range(first, first + steps * plan.accumulation)
        on_gpu = accelerator.device.type == "cuda"
        workers = data.workers if numbers else 0
        # Sooner than the other ranks give up this one, so that what is said is about the worker.
        patience = 0.8 * settings.timeout
        return load(batches.starting_at(first), numbers, workers, pin_memory=on_gpu, timeout=patience)

    return Job(
        settings=settings,
        accelerator=accelerator,
        model=prepared,
        state=state,
        description=describe_model(kind, encoder, data.size, statistics.mean, statistics.std, data.crop_pct),
        optimizer=optimizer,
        schedule=schedule,
        clip_grad=optim.clip_grad,
        plan=plan,
        samples=samples,
        max_bad_samples=data.max_bad_samples,
        batches_from=batches_from,
        loss_of=loss_of,
        flops_per_image=flops_per_image,
        folder=folder,
        writer=_writer(folder, settings, accelerator, sharded=is_sharded(accelerator.unwrap_model(prepared)), leg=leg),
        progress=progress,
        start=start,
        total=total,
        notes=dict(start.notes.get("pipeline", {})),
    )


def finish_job(job: Job) -> None:
    """Publish the model of the last step as the run's own, unless an earlier start has done all."""
    is_published = job.start.step == job.total and job.folder.model.exists()
    if job.accelerator.is_main_process and not is_published:
        last = newest_checkpoint(job.folder.checkpoints, job.progress.say)
        assert last is not None, "the last checkpoint has just been written"
        job.folder.publish(published(last), job.description.metadata())
    job.accelerator.wait_for_everyone()


def _find(
    folder: RunFolder, settings: TrainSettings, beginning: Standing, progress: TrainingProgress
) -> Checkpoint | None:
    """The run's newest good checkpoint, else the one that it shall begin from, held against settings and data."""
    found = newest_checkpoint(folder.checkpoints, progress.say)
    if found is None and settings.resume is not None:
        found = verify_checkpoint(settings.resume)
    elif found is not None and found.standing.settings != beginning.settings:
        raise UserError(
            f"{found.path} was made with other settings than {folder.path} holds; give the run its own settings.yaml, "
            "or begin another run_dir from it with --resume"
        )
    if found is not None and not settings.restart_data_order:
        require_same_data(found, beginning.position.fingerprint, beginning.position.global_batch)
    if found is not None:
        _name_other_libraries(found, progress)
    return found


def _standing(folder: RunFolder, found: Checkpoint | None, beginning: Standing) -> Standing:
    """Where this start begins: what `found` says, with the data of now."""
    if found is None:
        return beginning
    old, now = found.position, beginning.position
    rollback = folder.rollback()
    if (old.fingerprint, old.global_batch, old.order_version) != (now.fingerprint, now.global_batch, now.order_version):
        samples = found.step * now.global_batch
    elif rollback is not None and rollback.step >= found.step:
        samples = rollback.samples
    else:
        samples = old.samples
    position = DataPosition(samples, now.fingerprint, now.global_batch)
    return Standing(found.step, position, beginning.settings, found.standing.notes)


def _set_execution(model: nn.Module, settings: TrainSettings) -> None:
    """Let a model run as `settings` ask for, before it is wrapped."""
    checkpoint_activations(model, settings.activation_checkpointing)
    if settings.compile:
        compile_blocks(model)


def _say_where(folder: RunFolder, found: Checkpoint | None, total: int, progress: TrainingProgress) -> None:
    if found is None:
        progress.say(f"starting {folder.path} at step 0 of {total:,}")
    else:
        progress.say(f"resuming {folder.path} from {found.path.name}: {found.step:,} of {total:,} steps are done")


def _writer(
    folder: RunFolder, settings: TrainSettings, accelerator: Accelerator, sharded: bool, leg: str
) -> CheckpointWriter | None:
    """Rank 0 writes what all ranks hold; of what is sharded, each rank its own part."""
    if not (sharded or accelerator.is_main_process):
        return None
    return CheckpointWriter(
        folder.checkpoints,
        settings.keep_checkpoints,
        settings.keep_every,
        rank=accelerator.process_index,
        writers=accelerator.num_processes if sharded else 1,
        leg=leg,
    )


def _shared_word() -> str:
    """A word that the ranks of this start share, and that no other start has."""
    (word,) = broadcast_object_list([uuid.uuid4().hex[:12]])
    return str(word)


def _warn_of_little_room(folder: RunFolder, state: TrainingState, keep: int, progress: TrainingProgress) -> None:
    """Say before days of training that the disk will be full."""
    needed = (keep + 1) * bytes_needed(state.tensors())
    free = shutil.disk_usage(folder.path).free
    if free < needed:
        progress.say(
            f"warning: {keep} checkpoints and the next take {needed:,} bytes, {folder.path} has {free:,} bytes free; "
            "make room or lower keep_checkpoints"
        )


def _name_other_libraries(found: Checkpoint, progress: TrainingProgress) -> None:
    now = library_versions()
    changed = [f"{name} {old}, now {now[name]}" for name, old in found.libraries.items() if now.get(name, old) != old]
    if changed:
        progress.say(f"{found.path.name} was made with {'; '.join(changed)}: what follows may differ in its last bits")
