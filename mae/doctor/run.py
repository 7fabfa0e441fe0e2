"""Checks of the run: settings, batches, schedule, folder and disk."""

import errno
import fcntl
import math
from pathlib import Path

from mae.data.plan import plan_batches
from mae.doctor.examination import Examination
from mae.doctor.finding import Finding, gigabytes
from mae.doctor.places import broken_link, missing_mounts, nearest_folder
from mae.errors import UserError
from mae.files import try_to_write
from mae.output import counted
from mae.training.checkpoints.reader import require_same_data
from mae.training.checkpoints.room import room
from mae.training.export_at_end import require_exports
from mae.training.run_folder.folder import RunFolder
from mae.training.run_folder.lock import LOCK_FILE

_USUAL_PROCESSES = (1, 2, 4, 8)
_LONGEST_USUAL_WARMUP = 0.25
"""Share of a run; published recipes have 0.05 or 0.1."""


def settings(examination: Examination) -> Finding:
    """Check the settings with the pipeline's own parser."""
    asked = examination.settings
    (width, depth, heads), (height, across) = asked.model.shape, asked.data.size
    return Finding(
        f"all valid; ViT of width {width}, {depth} blocks, {heads} heads, patches of "
        f"{'x'.join(map(str, asked.model.patch))} in images of {height}x{across}x{asked.data.channels}"
    )


def batches(examination: Examination) -> Finding:
    """Check that the global batch can be divided, and report the division for other numbers of processes too."""
    plan = examination.batches.plan
    found = f"{plan.global_batch} = {counted(plan.processes, 'process')} x {plan.per_process}"
    if plan.accumulation > 1:
        found += f" x {plan.accumulation} accumulated"
    if examination.micro_batch_search is not None:
        found += f"; {examination.micro_batch_search}"
    others = [_division(examination, processes) for processes in _USUAL_PROCESSES if processes != plan.processes]
    return Finding(f"{found}; {', '.join(others)}")


def _division(examination: Examination, processes: int) -> str:
    asked = examination.settings
    try:
        plan = plan_batches(asked.batch_size, processes, examination.micro_batch_limit)
    except UserError:
        return f"{processes} do not divide it"
    if plan.per_process % examination.task.unit:
        return f"{processes} x {plan.per_process} is not a multiple of {examination.task.unit}"
    return f"{processes} x {plan.per_process}" + (f" x {plan.accumulation}" if plan.accumulation > 1 else "")


def schedule(examination: Examination) -> Finding:
    """Check steps, warm-up, learning rate and the number of checkpoints."""
    curve, total, asked = examination.schedule, examination.total_steps, examination.settings
    found = (
        f"{examination.samples / asked.batch_size:,.1f} steps an epoch, {total:,} in all, warm-up "
        f"{curve.warmup_steps:,.0f}, peak lr {curve.peak:.3g}"
    )
    warnings = []
    if curve.warmup_steps > _LONGEST_USUAL_WARMUP * total:
        usual = asked.epochs / 20
        warnings.append(
            f"the warm-up takes {curve.warmup_steps / total:.0%} of the run: lower optim.warmup_epochs to {usual:g}"
        )
    if asked.checkpoint_every < total:
        found += f", {math.ceil(total / asked.checkpoint_every):,} checkpoints"
    else:
        warnings.append(
            f"checkpoint_every is {asked.checkpoint_every:,}, so no checkpoint is saved before the end: lower it to "
            f"{max(1, total // 10):,}"
        )
    return Finding(found, warnings=tuple(warnings))


def exports(examination: Examination) -> Finding:
    """Check that the model can be exported to all that the settings name, before days are spent on it."""
    targets = examination.settings.export.targets
    require_exports(examination.task, examination.say)
    return Finding(f"at the end of the run: {', '.join(targets)}" if targets else "none at the end of the run")


def run_dir(examination: Examination) -> Finding:
    """Check that the run folder can be created and written to."""
    path: Path = examination.settings.run_dir
    if (link := broken_link(path)) is not None:
        raise UserError(f"run_dir {path} uses the link {link} to {link.readlink()}, which does not exist; mount it")
    folder = nearest_folder(path)
    _refuse_what_cannot_be_written(folder, path)
    warnings = tuple(
        f"/etc/fstab names a disk for {place} that is not mounted, so the run would fill another disk; mount it"
        for place in missing_mounts(path)
    )
    can_be = "written" if folder == path.resolve() else f"made in {folder}"
    return Finding(f"{path} can be {can_be}", warnings=warnings)


def run_folder(examination: Examination) -> Finding:
    """Check that the run folder is new or belongs to this run, is not in use, and is outside the data."""
    examination.folder.keep_out_of(examination.shards)
    examination.folder.check(examination.run_settings)
    _refuse_a_folder_in_use(examination.folder)
    found = examination.checkpoint
    if found is None:
        return Finding("a new run")
    if not examination.settings.restart_data_order:
        require_same_data(found, examination.batches.fingerprint, examination.settings.batch_size)
    done = f"{found.step:,} of {examination.total_steps:,} steps are done"
    return Finding(f"resumes from {found.path.name}, {done}", warnings=tuple(examination.rejected))


def _refuse_a_folder_in_use(folder: RunFolder) -> None:
    path = folder.path / LOCK_FILE
    if not path.exists():
        return
    with path.open("rb") as file:
        try:
            # A trainer's lock excludes a shared lock; another doctor's, which is shared too and short, does not.
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return  # a file system without locks
            holder = file.read().decode(errors="replace") or "another process"
            raise UserError(
                f"run_dir {folder.path} is in use by {holder}; wait for it, end it, or give another run_dir"
            ) from None


def _refuse_what_cannot_be_written(folder: Path, run_dir: Path) -> None:
    try:
        try_to_write(folder)
    except OSError as error:
        raise UserError(
            f"run_dir {run_dir} cannot be written: {folder}: {error.strerror}; give one where you may write"
        ) from None


def disk_space(examination: Examination) -> Finding:
    """Check the room for one more checkpoint than are kept: the oldest is removed after the newest is written."""
    asked = examination.settings
    place = nearest_folder(asked.run_dir)
    disk = room(examination.model, asked, examination.total_steps, examination.folder.checkpoints, place)
    found = (
        f"{gigabytes(disk.free)} are free at {place}, {gigabytes(disk.needed)} are needed: "
        f"{counted(disk.together, 'checkpoint')} of {gigabytes(disk.size)}"
        + (f", {disk.there} of them already written" if disk.there else "")
    )
    if disk.needed <= disk.free:
        return Finding(found)
    fewer = f" or lower keep_checkpoints from {asked.keep_checkpoints}" if asked.keep_checkpoints > 1 else ""
    return Finding(found, problems=(f"free another {gigabytes(disk.needed - disk.free)}, give another run_dir{fewer}",))
