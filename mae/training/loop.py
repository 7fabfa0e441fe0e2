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
from mae.data.loader import Batch, BatchPlan
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
    """Move the tensors; from pinned memory the copy runs beside the computation."""
    return Batch(
        images=batch.images.to(device, non_blocking=True),
        labels=batch.labels.to(device, non_blocking=True),
        ids=batch.ids,
        noise=batch.noise.to(device, non_blocking=True),
        bad=batch.bad,
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
        self._reset()

    def next_batch(self) -> Batch:
        asked = time.perf_counter()
        batch = next(self._job.batches)
        self._waited += time.perf_counter() - asked
        self._bad += batch.bad
        return batch

    def add(self, loss: Tensor, norm: Tensor) -> None:
        self._losses.append(loss)
        self._norms.append(norm)

    def report(self, done: int) -> None:
        """Share the figures among the ranks, log and show them.

        Raises:
            UserError: on every rank, if any rank met a bad image or the loss is not finite; nothing
                learned from such a batch has been saved by then.
        """
        job, steps = self._job, len(self._losses)
        sums = torch.stack([torch.stack(self._losses).sum(), torch.tensor(float(len(self._bad))).to(self._losses[0])])
        loss_sum, bad = job.accelerator.reduce(sums, reduction="sum").tolist()
        seconds = time.perf_counter() - self._since
        if bad:
            self._stop_for_bad_images(int(bad))
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

    def _stop_for_bad_images(self, count: int) -> None:
        names: list[str] = gather_object(self._bad)
        raise UserError(
            f"{count} bad image{'s' if count > 1 else ''}: {first_of(names)}; "
            "pack the shards again without them (mae pack SHARDS --out DIR --skip_bad True)"
        )

    def _reset(self) -> None:
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._waited, self._since = 0.0, time.perf_counter()
