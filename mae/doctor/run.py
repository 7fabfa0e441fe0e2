"""Checks of the run itself: settings, batches, schedule, folder, disk."""

import errno
import fcntl
import math
import shutil
import tempfile
from pathlib import Path

from torch import nn

from mae.data.plan import plan_batches
from mae.doctor.examination import Examination
from mae.doctor.finding import Finding, counted, gigabytes
from mae.doctor.places import broken_link, missing_mounts, nearest_folder
from mae.errors import UserError
from mae.training.checkpoints.reader import require_same_data
from mae.training.run_folder.folder import LOCK_FILE, RunFolder

_USUAL_PROCESSES = (1, 2, 4, 8)
_MOMENTS = 2
_FLOAT32_BYTES = 4


def settings(examination: Examination) -> Finding:
    """As strict as the pipeline's own parser, because it is the same."""
    asked = examination.settings
    (width, depth, heads), (height, across) = asked.model.shape, asked.data.size
    return Finding(
        f"all valid; ViT of width {width}, {depth} blocks, {heads} heads, patches of "
        f"{'x'.join(map(str, asked.model.patch))} in images of {height}x{across}x{asked.data.channels}"
    )


def batches(examination: Examination) -> Finding:
    """How the global batch is dealt out; told for other numbers of processes as well."""
    plan = examination.batches.plan
    found = f"{plan.global_batch} = {counted(plan.processes, 'process')} x {plan.per_process}"
    if plan.accumulation > 1:
        found += f" x {plan.accumulation} accumulated"
    if examination.micro_batch_search is not None:
        found += f"; {examination.micro_batch_search}"
    others = [_deal(examination, processes) for processes in _USUAL_PROCESSES if processes != plan.processes]
    return Finding(f"{found}; {', '.join(others)}")


def _deal(examination: Examination, processes: int) -> str:
    asked = examination.settings
    try:
        plan = plan_batches(asked.batch_size, processes, examination.micro_batch_limit)
    except UserError:
        return f"{processes} do not divide it"
    if plan.per_process % examination.task.unit:
        return f"{processes} x {plan.per_process} is no multiple of {examination.task.unit}"
    return f"{processes} x {plan.per_process}" + (f" x {plan.accumulation}" if plan.accumulation > 1 else "")


def schedule(examination: Examination) -> Finding:
    """Steps, warm-up, learning rate, checkpoints."""
    curve, total, asked = examination.schedule, examination.total_steps, examination.settings
    found = (
        f"{examination.samples / asked.batch_size:,.1f} steps an epoch, {total:,} in all, warm-up "
        f"{curve.warmup_steps:,.0f}, peak lr {curve.peak:.3g}"
    )
    if asked.checkpoint_every < total:
        return Finding(f"{found}, {math.ceil(total / asked.checkpoint_every):,} checkpoints")
    return Finding(
        found,
        warnings=(
            f"checkpoint_every is {asked.checkpoint_every:,}, so nothing is saved before the end: lower it to "
            f"{max(1, total // 10):,}",
        ),
    )


def run_dir(examination: Examination) -> Finding:
    """A place that is there and can be written."""
    path: Path = examination.settings.run_dir
    if (link := broken_link(path)) is not None:
        raise UserError(f"run_dir {path} leads over the link {link} to {link.readlink()}, which is not there; mount it")
    folder = nearest_folder(path)
    _refuse_what_cannot_be_written(folder, path)
    warnings = tuple(
        f"/etc/fstab has a disk at {place} that is not mounted, so the run would be written under it; mount it"
        for place in missing_mounts(path)
    )
    return Finding(
        f"{path} can be written" if folder == path.resolve() else f"{path} can be made in {folder}", warnings=warnings
    )


def run_folder(examination: Examination) -> Finding:
    """New, or the same run that goes on; apart from the data."""
    examination.folder.keep_out_of(examination.shards)
    examination.folder.check(examination.run_settings)
    _refuse_a_folder_in_use(examination.folder)
    found, rejected = examination.checkpoint, tuple(examination.rejected)
    if found is None:
        return Finding("a new run")
    if not examination.settings.restart_data_order:
        require_same_data(found, examination.batches.fingerprint, examination.settings.batch_size)
    return Finding(
        f"goes on from {found.path.name}, {found.step:,} of {examination.total_steps:,} steps are done",
        warnings=rejected,
    )


def _refuse_a_folder_in_use(folder: RunFolder) -> None:
    path = folder.path / LOCK_FILE
    if not path.exists():
        return
    with path.open("rb") as file:
        try:
            # Not to be had beside the lock of a trainer; that of another doctor, which is as short, does no harm.
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return  # a file system without locks
            holder = file.read().decode(errors="replace") or "another process"
            raise UserError(
                f"run_dir {folder.path} is in use by {holder}; wait for it or end it, or give another run_dir"
            ) from None


def _refuse_what_cannot_be_written(folder: Path, run_dir: Path) -> None:
    """By a file without a name, for permissions do not tell of full quotas and of what servers refuse."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
            file.flush()
    except OSError as error:
        raise UserError(
            f"run_dir {run_dir} cannot be written: {folder}: {error.strerror}; give one where you may write"
        ) from None


def disk_space(examination: Examination) -> Finding:
    """One checkpoint more than are kept, because the oldest leaves only when the newest is there."""
    asked = examination.settings
    size = checkpoint_bytes(examination.model, asked.ema_decay is not None)
    kept = asked.keep_checkpoints
    forever = examination.total_steps // asked.keep_every if asked.keep_every else 0
    there = len(list(examination.folder.checkpoints.glob("step-*")))
    together = kept + 1 + forever
    needed = size * max(1, together - there)
    place = nearest_folder(asked.run_dir)
    free = shutil.disk_usage(place).free
    found = (
        f"{gigabytes(free)} free at {place}, {gigabytes(needed)} needed: {counted(together, 'checkpoint')} of "
        f"{gigabytes(size)}" + (f", {there} of them there already" if there else "")
    )
    if needed <= free:
        return Finding(found)
    fewer = f" or lower keep_checkpoints from {kept}" if kept > 1 else ""
    return Finding(found, problems=(f"make room for {gigabytes(needed - free)} more, give another run_dir{fewer}",))


def checkpoint_bytes(model: nn.Module, has_average: bool) -> int:
    """Weights, AdamW's two moments of each that is trained, and the running average of those if there is one."""
    weights: int = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return weights + (_MOMENTS + has_average) * _FLOAT32_BYTES * trained
