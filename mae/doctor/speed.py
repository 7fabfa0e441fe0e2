"""Checks with a few real steps: memory, speed, and the time of the whole run."""

import math
from typing import NamedTuple

import torch

from mae.doctor.examination import Examination
from mae.doctor.finding import Finding, gigabytes
from mae.doctor.limits import largest_micro_batch
from mae.output import counted
from mae.progress import duration
from mae.training.memory import free_memory, total_memory
from mae.training.step_cost import bytes_beside

_TOO_LARGE = Finding("not examined, see memory", is_unknown=True)
_TOLERABLE_WAIT = 0.1
_TOLERABLE_LOSS_SECONDS = 3600
_TOLERABLE_SHARE_OF_MEMORY = 0.95


class Pace(NamedTuple):
    """Time of an optimiser step."""

    step: float
    """Seconds of the whole step."""
    wait: float
    """Seconds of the step in which the device waits for data; 0 if the workers keep up."""


def step(examination: Examination) -> Finding:
    """Take steps with real images; the first loss must be finite."""
    trial = examination.trial
    found = (
        f"loss {trial.loss:.4f}; forward and backward {1e3 * trial.seconds_per_image * trial.asked:,.0f} ms for "
        f"{trial.asked} images on {examination.device}"
    )
    if trial.images < trial.asked:
        found += f" (scaled from {trial.images})"
    found += f", update {1e3 * trial.update_seconds:,.0f} ms"
    if math.isfinite(trial.loss):
        return Finding(found)
    remedy = "check data.mean and data.std, and try --precision fp32"
    return Finding(found, problems=(f"the first loss is not finite: {remedy}",))


def memory(examination: Examination) -> Finding:
    """Check that the memory suffices for steps with the micro-batch of the settings."""
    trial, plan = examination.trial, examination.plan
    available, scope = _memory_available(examination)
    if trial.fitting < trial.asked:
        return _too_much(examination, f"a step with {trial.asked} images does not fit into {gigabytes(available)}")
    needed = trial.bytes_asked + _beside(examination)
    found = f"about {gigabytes(needed)} per process of {gigabytes(available)} {scope}"
    if trial.images < trial.asked:
        found += f" (scaled from {gigabytes(trial.peak_bytes)} with {trial.images} of {plan.per_process} images)"
    if needed <= _TOLERABLE_SHARE_OF_MEMORY * available:
        return Finding(found)
    return _too_much(examination, found)


def _too_much(examination: Examination, found: str) -> Finding:
    trial, plan = examination.trial, examination.plan
    available, _ = _memory_available(examination)
    room = available * _TOLERABLE_SHARE_OF_MEMORY - trial.fixed_bytes - _beside(examination)
    by_scale = room * trial.images / max(1, trial.peak_bytes - trial.fixed_bytes)
    most = trial.fitting if trial.fitting < trial.asked else int(min(by_scale, trial.asked - 1))
    fitting = largest_micro_batch(plan, most, examination.task.unit)
    if fitting is None:
        fewer = "start fewer processes on this machine, or " if examination.local_processes > 1 else ""
        remedy = f"no smaller micro-batch fits either: {fewer}choose a smaller model or smaller images"
    else:
        remedy = f"set --micro_batch_size {fitting}; the batch of {plan.global_batch} stays"
    return Finding(found, problems=(remedy,))


def _beside(examination: Examination) -> int:
    return bytes_beside(examination.model, examination.processes, examination.settings.ema_decay is not None)


def _memory_available(examination: Examination) -> tuple[int | float, str]:
    """Return the bytes for one process, and words for where they are."""
    device, here = examination.device, examination.local_processes
    if device.type == "cuda":
        return total_memory(device), "on the GPU"
    # The doctor's own memory will be free again.
    available = min(free_memory(device) + examination.trial.fixed_bytes, total_memory(device))
    return available / here, f"available to each of {here}" if here > 1 else "available"


def data_speed(examination: Examination) -> Finding:
    """Check that the workers keep the device busy."""
    trial, data = examination.trial, examination.settings.data
    if trial.fitting < trial.asked:
        return _TOO_LARGE
    pace = pace_of(examination)
    share = pace.wait / pace.step
    found = f"{1e3 * trial.data_seconds_per_image:.2f} ms per image with {counted(data.workers, 'worker')}"
    if data.keep_decoded:
        found += ", less once decoded images are kept"
    found += f"; the device waits for data in {share:.0%} of a step"
    if share <= _TOLERABLE_WAIT or data.keep_decoded:
        return Finding(found)
    spare = examination.cores // examination.local_processes
    more = f"set --data.workers {spare}, or " if data.workers * data.threads < spare else ""
    remedy = f"{more}pack smaller images (mae pack --short_side), or use a machine with more cores"
    return Finding(found, warnings=(f"the device waits: {remedy}",))


def whole_run(examination: Examination) -> Finding:
    """Estimate the time that is left, and how much of it a crash can cost."""
    if examination.trial.fitting < examination.trial.asked:
        return _TOO_LARGE
    pace, asked = pace_of(examination), examination.settings
    checkpoint = examination.checkpoint
    left = examination.total_steps - (checkpoint.step if checkpoint else 0)
    found = (
        f"{left:,} steps of {pace.step:.3g} s take about {duration(left * pace.step)}, without "
        f"{'the exchange of gradients, ' if examination.processes > 1 else ''}evaluation, pictures and checkpoints"
    )
    between = min(asked.checkpoint_every, examination.total_steps) * pace.step
    if between <= _TOLERABLE_LOSS_SECONDS:
        return Finding(found)
    remedy = f"lower checkpoint_every to {max(1, int(_TOLERABLE_LOSS_SECONDS / pace.step)):,}"
    return Finding(found, warnings=(f"a crash can cost {duration(between)}, the time between checkpoints: {remedy}",))


def pace_of(examination: Examination) -> Pace:
    """Estimate the time of a step from the trial: workers run beside the device, but all processes share the cores."""
    trial, plan, data = examination.trial, examination.plan, examination.settings.data
    compute, decode = trial.seconds_per_image, trial.data_seconds_per_image
    alone = max(compute, decode) if data.workers else compute + decode
    threads = torch.get_num_threads() if examination.device.type == "cpu" else 1
    decoding = min(max(1, data.workers * data.threads), examination.cores)
    crowded = examination.local_processes * (threads * compute + decoding * decode) / examination.cores
    images = plan.per_process * plan.accumulation
    busy = max(compute, examination.local_processes * threads * compute / examination.cores)
    total = max(alone, crowded)
    return Pace(total * images + trial.update_seconds, (total - busy) * images)
