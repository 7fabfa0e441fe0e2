"""The training loop that every pipeline shares."""

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim import Optimizer

from mae import keyed
from mae.data.batches import Batch, BatchPlan
from mae.data.images.device import decode_into
from mae.errors import UserError, first_of
from mae.keyed import Purpose
from mae.models.description import ModelDescription
from mae.models.weights import file_tensors
from mae.training import checkpoint
from mae.training.checkpoint import DataPosition
from mae.training.optimizer import CosineSchedule, set_learning_rate
from mae.training.progress import TrainingProgress, duration
from mae.training.run_folder import RunFolder
from mae.training.settings import TrainSettings


@dataclass(frozen=True)
class Job:
    """All that the loop works with; nothing in it changes but weights and optimiser state."""

    settings: TrainSettings
    accelerator: Accelerator
    model: nn.Module
    """As Accelerate prepared it."""
    description: ModelDescription
    optimizer: Optimizer
    schedule: CosineSchedule
    clip_grad: float | None
    plan: BatchPlan
    samples: int
    """Samples in an epoch."""
    fingerprint: str
    """Of the training data."""
    max_bad_samples: int
    """Bad images that may be replaced."""
    batches: Iterator[Batch]
    """Micro-batches of this rank, from the first step to come."""
    loss_of: Callable[[nn.Module, Batch], Tensor]
    """The loss of one micro-batch, which lies on the device."""
    folder: RunFolder
    progress: TrainingProgress
    start: int
    """Steps already done."""
    total: int
    """Steps of the whole run."""

    @property
    def bare_model(self) -> nn.Module:
        """The model without what Accelerate wrapped around it."""
        bare: nn.Module = self.accelerator.unwrap_model(self.model)
        return bare


def train(job: Job) -> Iterator[int]:
    """Run the steps that are left; yields the number of steps done after each, before it is checkpointed.

    What a pipeline does at such a moment (a picture, an evaluation) is thus part of the checkpoint that
    follows, and is done again if the run dies in between.
    """
    with job.progress.running(job.start, job.total):
        yield from _steps(job)


def _steps(job: Job) -> Iterator[int]:
    meter = _Meter(job)
    for step in range(job.start, job.total):
        seed_step(job.settings.seed, step, job.accelerator.process_index)
        set_learning_rate(job.optimizer, job.schedule(step))
        loss = _backward(job, meter, step)
        norm = job.accelerator.clip_grad_norm_(job.model.parameters(), job.clip_grad or math.inf)
        job.optimizer.step()
        job.optimizer.zero_grad()
        meter.add(loss, norm)

        done = step + 1
        saving = done % job.settings.checkpoint_every == 0 or done == job.total
        if saving or done % job.settings.log_every == 0:
            meter.report(done)
        job.progress.step(done)
        yield done
        if saving:
            _save(job, done)


def total_steps(samples: int, epochs: float, batch_size: int) -> int:
    """Steps in which every sample is seen at least `epochs` times."""
    return math.ceil(samples * epochs / batch_size)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Key every generator that a step may draw from (drop path, mixup) by the step itself."""
    word = int(keyed.key(Purpose.STEP, seed, step, rank))
    torch.manual_seed(word >> 1)
    np.random.seed(word & 0xFFFFFFFF)  # timm's mixup draws from the global generator
    random.seed(word)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move the tensors; from pinned memory the copy runs beside the computation.

    Raises:
        UserError: if images were left to the device, and it cannot decode them.
    """
    images = batch.images.to(device, non_blocking=True)
    if batch.encoded is not None:
        decode_into(images, batch.encoded, batch.ids)
    return batch._replace(
        images=images,
        labels=batch.labels.to(device, non_blocking=True),
        noise=batch.noise.to(device, non_blocking=True),
    )


def _backward(job: Job, meter: "_Meter", step: int) -> Tensor:
    """Accumulate the gradient of one global batch; returns this rank's mean loss, still on the device."""
    losses = []
    for micro in range(job.plan.accumulation):
        batch = meter.next_batch()
        if job.settings.record_samples:
            job.folder.record_samples(job.accelerator.process_index, step, batch.ids.tolist())
        last = micro == job.plan.accumulation - 1
        with nullcontext() if last else job.accelerator.no_sync(job.model):
            loss = job.loss_of(job.model, to_device(batch, job.accelerator.device))
            job.accelerator.backward(loss / job.plan.accumulation)
        losses.append(loss.detach())
    return torch.stack(losses).mean()


def _save(job: Job, done: int) -> None:
    if job.accelerator.is_main_process:
        try:
            checkpoint.save(
                job.folder.checkpoints,
                done,
                file_tensors(job.bare_model),
                job.description.metadata(),
                job.optimizer.state_dict(),
                DataPosition(done * job.plan.global_batch, job.fingerprint, job.plan.global_batch),
                job.settings.keep_checkpoints,
            )
        except OSError as error:
            raise UserError(f"checkpoint of step {done} cannot be written: {error}; make room and resume") from None
    job.accelerator.wait_for_everyone()


class _Meter:
    """Sums on the device, read once per report: the one moment at which the host waits for the device."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._began = time.perf_counter()
        self._bad: list[str] = []
        self._lost = ""
        self._known_bad = job.folder.bad_samples()
        self._reset()

    def next_batch(self) -> Batch:
        asked = time.perf_counter()
        batch = next(self._job.batches)
        self._waited += time.perf_counter() - asked
        self._bad += batch.bad
        self._lost = self._lost or batch.lost
        return batch

    def add(self, loss: Tensor, norm: Tensor) -> None:
        self._losses.append(loss)
        self._norms.append(norm)

    def report(self, done: int) -> None:
        """Share the figures among the ranks, log and show them.

        Raises:
            UserError: on every rank, if any rank has lost its data or met more bad images than are allowed, or
                if the loss is not finite; nothing learned from such a batch has been saved by then.
        """
        job, steps = self._job, len(self._losses)
        troubles = float(len(self._bad) + bool(self._lost))
        sums = torch.stack([torch.stack(self._losses).sum(), torch.tensor(troubles).to(self._losses[0])])
        loss_sum, found = job.accelerator.reduce(sums, reduction="sum").tolist()
        seconds = time.perf_counter() - self._since
        if found:
            self._share_troubles()
        loss = loss_sum / steps / job.accelerator.num_processes
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} within {steps} steps before step {done}; checkpoints before it are good: "
                "lower optim.base_lr or set optim.clip_grad in another run_dir"
            )
        speed = steps * job.plan.global_batch / seconds
        record = {
            "kind": "train",
            "step": done,
            "epoch": done * job.plan.global_batch / job.samples,
            "loss": loss,
            "lr": job.schedule(done - 1),
            "grad_norm": float(torch.stack(self._norms).mean()),
            "images_per_second": round(speed, 1),
            "data_wait": round(self._waited / seconds, 4),
            "seconds": round(time.perf_counter() - self._began, 2),
        }
        if job.accelerator.is_main_process:
            job.folder.log(record)
        left = (job.total - done) * job.plan.global_batch / speed
        job.progress.status(
            done,
            f"epoch {record['epoch']:.1f}  loss {loss:.4f}  lr {record['lr']:.2e}  {speed:,.0f} images/s  "
            f"data wait {record['data_wait']:.0%}  ETA {duration(left)}",
        )
        self._reset()

    def _share_troubles(self) -> None:
        """Tell every rank of the bad images and lost data of all; stop if that is too much, else list the images."""
        job = self._job
        lost: list[str] = gather_object([self._lost] if self._lost else [])
        if lost:
            raise UserError(f"data are lost: {lost[0]}; then start the same command again")
        new = sorted(set(gather_object(self._bad)) - self._known_bad)
        self._known_bad |= set(new)
        self._bad = []
        known = len(self._known_bad)
        if known > job.max_bad_samples:
            raise UserError(
                f"{known} bad image{'s' if known > 1 else ''}, {job.max_bad_samples} are allowed "
                f"(data.max_bad_samples): {first_of(new or sorted(self._known_bad))}; "
                "pack the shards again without them (mae pack SHARDS --out DIR --skip_bad True)"
            )
        if job.accelerator.is_main_process:
            job.folder.record_bad_samples(new)
        if new:
            job.progress.say(f"{len(new)} bad images were replaced by their neighbours: {first_of(new)}")

    def _reset(self) -> None:
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._waited, self._since = 0.0, time.perf_counter()
