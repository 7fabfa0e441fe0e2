"""Start of a run, new or resumed: checks, checkpoint, and the job for the loop."""

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from mae.data.batch import TrainingBatches
from mae.data.plan import BatchPlan
from mae.errors import UserError, first_of
from mae.files import write_atomically
from mae.formats.report import KeyReport
from mae.models.description import read_description, require_same_model
from mae.models.execution import checkpoint_activations, compile_blocks
from mae.models.weights import file_tensors
from mae.settings import dump
from mae.training.checkpoints.manifest import DataPosition, RunPosition
from mae.training.checkpoints.reader import Checkpoint, newest_checkpoint, require_same_data, verify_checkpoint
from mae.training.checkpoints.room import Room, room
from mae.training.checkpoints.tensor_files import files_of
from mae.training.checkpoints.writer import CheckpointWriter
from mae.training.job import EARLY_END, Job, total_steps
from mae.training.micro_batch import agree_on_micro_batch
from mae.training.optimizer import cosine_schedule
from mae.training.origin import find_origin
from mae.training.overview import overview
from mae.training.processes.agreement import require_agreement
from mae.training.processes.fsdp2 import is_sharded, shard_each_block
from mae.training.progress import TrainingProgress
from mae.training.run_folder.compare import deciding, differences
from mae.training.run_folder.ending import record_failure
from mae.training.run_folder.folder import RunFolder
from mae.training.run_folder.history import record_start
from mae.training.run_folder.repair import set_damage_aside
from mae.training.settings import AUTO, TrainSettings
from mae.training.state import MODEL, TrainingState
from mae.training.task import Task
from mae.versions import library_versions

# What became of each tensor of the model that a run began with.
_INIT_FILE = "init.json"


def start_job(task: Task, plan: BatchPlan, accelerator: Accelerator, progress: TrainingProgress) -> Job:
    """Resume the run in `settings.run_dir` from its newest intact checkpoint, or begin it.

    With `micro_batch_size` auto, `plan` divides the global batch without a limit, and the micro-batch is found here.

    Raises:
        UserError: if the folder is in use or belongs to another run, the checkpoint belongs to another model or other
            data, or the processes disagree.
    """
    settings = task.settings
    if settings.micro_batch_size == AUTO:
        plan = agree_on_micro_batch(task, accelerator, plan, progress.say)
        settings = replace(settings, micro_batch_size=plan.per_process)
    batches, loss_of = task.batches(plan, accelerator.process_index), task.loss_of(plan.per_process)
    total = total_steps(batches.samples, settings.epochs, plan.global_batch)
    steps_per_epoch = batches.samples / plan.global_batch
    # It may refuse the settings, so it comes before the folder is made.
    schedule = cosine_schedule(settings.optim, plan.global_batch, settings.epochs, steps_per_epoch, total)
    folder = RunFolder(settings.run_dir)
    folder.check(settings)
    folder.keep_out_of(batches.shards)
    _require_same_start(accelerator, settings, batches, total)
    with _locked(folder, accelerator, progress):
        beginning = RunPosition(0, DataPosition(0, batches.fingerprint, plan.global_batch), deciding(settings), {})
        found = _find(task, settings, folder, beginning, total, progress)
        start = _start_position(folder, found, beginning)
        model, state = _prepare(task, settings, accelerator, found)
        bare = accelerator.unwrap_model(model)
        _say_where(folder, found, total, progress)
        if accelerator.is_main_process:
            _make_ready(folder, settings, start.step, progress)
            _warn_of_a_full_disk(room(bare, settings, total, folder.checkpoints, folder.path), folder, progress)
        writer = _writer(folder, settings, accelerator, sharded=is_sharded(bare))
        accelerator.wait_for_everyone()
    job = Job(
        task=task,
        settings=settings,
        accelerator=accelerator,
        model=model,
        state=state,
        schedule=schedule,
        batches=batches,
        loss_of=loss_of,
        folder=folder,
        writer=writer,
        progress=progress,
        start=start,
        total=total,
        notes=dict(start.notes.get("pipeline", {})),
    )
    _report_start(job)
    return job


def _require_same_start(
    accelerator: Accelerator, settings: TrainSettings, batches: TrainingBatches, total: int
) -> None:
    require_agreement(
        accelerator,
        settings=dump(settings),
        data=batches.fingerprint,
        plan=repr((batches.plan, total)),
        libraries=json.dumps(library_versions()),
    )


@contextmanager
def _locked(folder: RunFolder, accelerator: Accelerator, progress: TrainingProgress) -> Iterator[None]:
    """Lock the folder on rank 0, and repair it; after an error in the context record that, and unlock the folder."""
    try:
        if accelerator.is_main_process:
            folder.lock()
            set_damage_aside(folder, progress.say)
            folder.forget_exit()
        accelerator.wait_for_everyone()
        try:
            yield
        except BaseException as error:
            record_failure(folder, error)
            raise
    except BaseException:
        folder.unlock()
        raise


def _prepare(
    task: Task, settings: TrainSettings, accelerator: Accelerator, found: Checkpoint | None
) -> tuple[nn.Module, TrainingState]:
    """Build model and optimiser, let Accelerate wrap them, and restore `found`."""
    model = task.build_model()
    optimizer = task.build_optimizer(model, accelerator.device)  # before the model is wrapped
    checkpoint_activations(model, settings.activation_checkpointing)
    if settings.compile:
        compile_blocks(model)
    shard_each_block(accelerator, model)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    state = TrainingState(accelerator.unwrap_model(prepared), optimizer, settings.ema_decay, settings.ema_warmup)
    if found:
        state.restore(found)
    return prepared, state


def _find(
    task: Task,
    settings: TrainSettings,
    folder: RunFolder,
    beginning: RunPosition,
    total: int,
    progress: TrainingProgress,
) -> Checkpoint | None:
    """Return the run's newest intact checkpoint, or else the one to begin from.

    Model and data are compared with those of the task, and so are the settings of the run's own checkpoint. Of another
    run's checkpoint, settings that differ are reported.
    """
    found = newest_checkpoint(folder.checkpoints, progress.say)
    if found is None and settings.resume is not None:
        _require_one_checkpoint(settings.resume)
        found = verify_checkpoint(settings.resume)
        if (old := found.run_position.settings) is not None and (other := differences(old, settings)):
            progress.say(f"other settings than those of {found.path}: {first_of(other, most=6)}")
    elif found and (old := found.run_position.settings) is not None and (other := differences(old, settings)):
        raise UserError(
            f"{found.path} was made with other settings than {folder.path} holds: {first_of(other, most=6)}; "
            "give the run its own settings.yaml, or begin another run_dir from it with --resume"
        )
    if found is None:
        if folder.model.exists():
            raise UserError(
                f"{folder.path} holds a finished model but no checkpoint to go on from; give another run_dir, or "
                f"remove {folder.model.name} there to train again from the start"
            )
        return None
    if found.step == total and not _is_own(folder, found):
        raise UserError(f"{found.path} has done all {total:,} steps of this run; raise epochs to train it further")
    if found.step > total:
        raise UserError(
            f"{found.path} has done {found.step:,} steps, but the run would end after {total:,}; raise epochs"
        )
    described = read_description(found.path / files_of(MODEL, found.files)[0])
    require_same_model(described, task.description, found.path)
    if not settings.restart_data_order:
        require_same_data(found, beginning.position.fingerprint, beginning.position.global_batch)
    _name_other_libraries(found, progress)
    return found


def _require_one_checkpoint(path: Path) -> None:
    """Raise a `UserError` for a run, or its folder of checkpoints, where one checkpoint is asked for."""
    found = sorted([*path.glob("step-*"), *path.glob("checkpoints/step-*")])
    if found:
        raise UserError(f"resume: {path} holds checkpoints and is none; give one of them, such as {found[-1]}")


def _start_position(folder: RunFolder, found: Checkpoint | None, beginning: RunPosition) -> RunPosition:
    """Return the position at which this start begins: the step of `found`, with the data of the settings."""
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
    notes = dict(found.run_position.notes)
    if not _is_own(folder, found):  # the other run's end and its best model are not those of this one
        notes.pop("pipeline", None)
    return RunPosition(found.step, position, beginning.settings, notes)


def _is_own(folder: RunFolder, found: Checkpoint) -> bool:
    return found.path.parent == folder.checkpoints


def _say_where(folder: RunFolder, found: Checkpoint | None, total: int, progress: TrainingProgress) -> None:
    if found is None:
        progress.say(f"starting {folder.path} at step 0 of {total:,}")
    else:
        early = found.run_position.notes.get("pipeline", {}).get(EARLY_END) if _is_own(folder, found) else None
        why = f", and the run has ended early: {early['why']}" if early else ""
        progress.say(f"resuming {folder.path} from {found.path.name}: {found.step:,} of {total:,} steps are done{why}")


def _report_start(job: Job) -> None:
    """Print what the run begins with, and record its start; nothing if it has no steps left."""
    if job.was_complete or not job.accelerator.is_main_process:
        return
    report = _report_of_init(job)
    if report is not None:
        write_atomically(job.folder.path / _INIT_FILE, json.dumps(report.names(), indent=2).encode())
    lines = list(overview(job, report))
    record_start(job.folder.path, job.start.step, lines[0], job.settings)
    for line in lines:
        job.progress.say(line)


def _report_of_init(job: Job) -> KeyReport | None:
    """Return what became of each tensor of the model that a new run begins with; None if they fit as they are."""
    settings = job.settings
    origin = None if job.start.step else find_origin(settings.init, job.folder, settings.model.heads)
    if origin is None:
        return None
    return origin.report(file_tensors(job.accelerator.unwrap_model(job.model)), settings.data, settings.model)


def _make_ready(folder: RunFolder, settings: TrainSettings, step: int, progress: TrainingProgress) -> None:
    """Make the folder, and remove from its log what a resume at `step` will do again."""
    folder.create(settings)
    if damage := folder.forget_after(step):
        progress.say(f"warning: {damage}")


def _warn_of_a_full_disk(disk: Room, folder: RunFolder, progress: TrainingProgress) -> None:
    if disk.needed > disk.free:
        progress.say(
            f"warning: the checkpoints to come take {disk.needed:,} bytes, {folder.path} has {disk.free:,} bytes free; "
            "make room or lower keep_checkpoints"
        )


def _writer(
    folder: RunFolder, settings: TrainSettings, accelerator: Accelerator, sharded: bool
) -> CheckpointWriter | None:
    """Return this rank's writer: rank 0 writes what all ranks hold, and each rank its part of sharded tensors."""
    (launch_id,) = broadcast_object_list([uuid.uuid4().hex[:12]])
    if not (sharded or accelerator.is_main_process):
        return None
    return CheckpointWriter(
        folder.checkpoints,
        settings.keep_checkpoints,
        settings.keep_every,
        rank=accelerator.process_index,
        writers=accelerator.num_processes if sharded else 1,
        launch_id=str(launch_id),
    )


def _name_other_libraries(found: Checkpoint, progress: TrainingProgress) -> None:
    now = library_versions()
    changed = [f"{name} {old}, now {now[name]}" for name, old in found.libraries.items() if now.get(name, old) != old]
    if changed:
        progress.say(f"{found.path.name} was made with {'; '.join(changed)}: results may differ in their last bits")
