"""Training loop of all tasks: steps, and what may come between them."""

import math
import random
import signal
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from mae import keyed
from mae.data.batch import to_device
from mae.errors import CheckpointError, PreemptedError, UserError
from mae.keyed import Purpose
from mae.training.checkpoints.manifest import DataPosition, RunPosition
from mae.training.checkpoints.reader import newest_checkpoint
from mae.training.guard import nan_gradients_if_nonfinite, step_unless
from mae.training.job import Job
from mae.training.meter import Meter, Steps
from mae.training.optimizer import learning_rates, set_learning_rate
from mae.training.processes.consensus import RankConsensus
from mae.training.processes.fsdp2 import local_value
from mae.training.processes.signals import StopRequest
from mae.training.processes.watchdog import StackWatchdog
from mae.training.run_folder.folder import Rollback

_FAILED_WRITES_AT_MOST = 3
# Keys of notes in checkpoints, also in old ones.
_STEP_HOOK_PENDING, _UNLOGGED_STEPS = "owes_a_yield", "unlogged"


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed every generator that a step may draw from (drop path, mixup) by the step itself."""
    word = int(keyed.key(Purpose.STEP, seed, step, rank))
    torch.manual_seed(word >> 1)
    np.random.seed(word & 0xFFFFFFFF)  # timm's mixup uses the global generator
    random.seed(word)


class Loop:
    """Steps of a job, with what may come between them: a stop, a roll-back, a failed checkpoint."""

    def __init__(self, job: Job, stop: StopRequest, watchdog: StackWatchdog) -> None:
        self.job, self.stop, self.watchdog = job, stop, watchdog
        self.consensus = RankConsensus(job.accelerator, job.settings.timeout)
        notes = job.start.notes
        self.step_hook_pending: bool = notes.get(_STEP_HOOK_PENDING, False)
        max_bad_samples, unlogged_steps = job.settings.data.max_bad_samples, notes.get(_UNLOGGED_STEPS)
        self.meter = Meter(job.accelerator, job.folder, job.progress, max_bad_samples, unlogged_steps)
        self.last_warning: str | None = None
        self.flops_per_image = job.task.flops_per_image  # counted on a model that is built for it, so once only
        self.go_to(job.start.step, job.start.position.samples)

    def go_to(self, step: int, samples: int) -> None:
        """Continue after `step` steps, with the sample at position `samples`."""
        self.done, self.samples = step, samples
        self.batches = self.job.micro_batches(samples, self.job.total - step)

    def steps(self) -> Iterator[int]:
        """Take the steps; yield the number of steps done after each."""
        job = self.job
        if self.step_hook_pending:
            yield self.done
            if self.done == job.last_step:  # the checkpoint of this step does not know that yet
                self.save()
                self.require_written()
        while self.done < job.last_step:
            self.watchdog.reset()
            self.consensus.submit(self.stop.number, job.writer.failures_in_a_row if job.writer else 0)
            self.step()
            self.done, self.samples = self.done + 1, self.samples + job.plan.global_batch
            stop_signal, failures = self.consensus.maximum()
            if failures >= _FAILED_WRITES_AT_MOST:
                self.require_written()
            self.warn_of_failed_writes()

            last = self.done == job.total
            saving = self.done % job.settings.checkpoint_every == 0 or last
            if (saving or self.done % job.settings.log_every == 0) and self.report() >= job.settings.skip_at_most:
                self.roll_back()
                continue
            job.progress.step(self.done)
            if stop_signal and not last:
                self.leave(signal.Signals(stop_signal).name)
            yield self.done
            last = self.done == job.last_step
            if last and not (saving or self.is_new_line()):
                self.report()
            # While steps are being skipped there is nothing new to save, and the weights may be the reason.
            if last or (saving and not self.meter.skipped_in_a_row):
                self.save()
        if job.start.step < job.last_step:
            self.require_written()

    def step(self) -> None:
        """Take one step of the optimiser, unless loss or gradient is not finite."""
        job = self.job
        seed_step(job.settings.seed, self.done, job.accelerator.process_index)
        set_learning_rate(job.optimizer, job.schedule(self.done))
        loss, ids = self.backward()
        norm = local_value(
            job.accelerator.clip_grad_norm_(job.model.parameters(), job.settings.optim.clip_grad or math.inf)
        )
        step_unless(job.optimizer, ~norm.isfinite())
        job.optimizer.zero_grad()
        job.state.update_average(self.done + 1)
        self.meter.add(loss, norm, ids)

    def backward(self) -> tuple[Tensor, list[Tensor]]:
        """Accumulate the gradient of a global batch; return this rank's mean loss, on the device, and sample ids."""
        job, losses, ids = self.job, [], []
        for micro in range(job.plan.accumulation):
            batch = self.meter.next_batch(self.batches)
            ids.append(batch.ids)
            if job.settings.record_samples:
                job.folder.record_samples(job.accelerator.process_index, self.done, batch.ids.tolist())
            is_last = micro == job.plan.accumulation - 1
            with nullcontext() if is_last else job.accelerator.no_sync(job.model):
                with job.accelerator.autocast():
                    loss = job.loss_of(job.model, to_device(batch, job.accelerator.device))
                job.accelerator.backward(nan_gradients_if_nonfinite(loss) / job.plan.accumulation)
            losses.append(loss.detach())
        return torch.stack(losses).mean(), ids

    def report(self) -> int:
        """Log and print the figures since the last line; return the number of steps skipped in a row."""
        job, done = self.job, self.done
        rows = self.meter.read(done)
        if max(rows, default=0) >= job.settings.skip_at_most:
            # The data continue after the step that was one too many, however late that is noticed.
            late = len(rows) - 1 - rows.index(job.settings.skip_at_most)
            self.samples -= late * job.plan.global_batch
            return job.settings.skip_at_most
        timing = self.meter.timing(job.plan.global_batch, self.flops_per_image)
        record = {
            "kind": "train",
            "step": done,
            "epoch": job.epoch_after(done),
            "lr": job.schedule(done - 1),
            **({"layer_lr": by_layer} if (by_layer := learning_rates(job.optimizer)) else {}),
            **self.meter.steps.means(),
            **timing,
        }
        if job.accelerator.is_main_process:
            job.log(record)
            job.log_lost_output(done)
        left = (job.total - done) * job.plan.global_batch / max(timing["images_per_second"], 1e-9)
        job.progress.report(record, left)
        self.meter.restart(Steps())
        return self.meter.skipped_in_a_row

    def roll_back(self) -> None:
        """Restore the last checkpoint, and continue with the data after the skipped steps.

        Raises:
            UserError: on every rank, if there is no checkpoint, or after an earlier roll-back.
        """
        job = self.job
        skipped = f"{job.settings.skip_at_most} steps in a row were skipped up to step {self.done}"
        why = "because loss or gradient was not finite"
        remedy = "lower optim.base_lr or set optim.clip_grad in another run_dir, or look at the samples in"
        if job.folder.rollback() is not None:
            raise UserError(f"{skipped}, again after a return to a checkpoint, {why}; {remedy} {job.folder.skipped}")
        self.finish_writing()
        found = newest_checkpoint(job.folder.checkpoints, job.progress.say)
        if found is None:
            raise UserError(
                f"{skipped}, {why}, and there is no checkpoint to go back to; {remedy} {job.folder.skipped}"
            )
        job.state.restore(found)
        job.notes.clear()
        job.notes.update(found.run_position.notes.get("pipeline", {}))
        if job.accelerator.is_main_process:
            job.folder.record_rollback(Rollback(found.step, self.samples))
            job.folder.forget_after(found.step)
        job.accelerator.wait_for_everyone()
        job.progress.say(f"{skipped}: returned to step {found.step}; data continue after sample {self.samples:,}")
        self.meter.skipped_in_a_row = 0
        self.meter.restart(Steps())
        self.go_to(found.step, self.samples)

    def leave(self, reason: str) -> None:
        """Save, and end the run on all ranks.

        Raises:
            PreemptedError: always.
        """
        job, done = self.job, self.done
        if not self.is_new_line():
            self.meter.read(done)
        if self.meter.skipped_in_a_row:
            self.finish_writing()
            raise PreemptedError(
                f"{reason}: stopped at step {done} of {job.total} within skipped steps, which are not saved; "
                "the same command resumes from the last checkpoint"
            )
        self.save({_STEP_HOOK_PENDING: True, _UNLOGGED_STEPS: self.meter.steps.to_json()})
        self.require_written()
        raise PreemptedError(f"{reason}: saved at step {done} of {job.total}; the same command resumes from there")

    def is_new_line(self) -> bool:
        """Return whether the log holds all steps so far."""
        settings = self.job.settings
        return self.done % settings.log_every == 0 or self.done % settings.checkpoint_every == 0

    def save(self, notes: Mapping[str, Any] | None = None) -> None:
        """Start to write a checkpoint.

        Raises:
            UserError: if a weight is not finite; earlier checkpoints stay.
        """
        job = self.job
        if not job.state.are_finite():
            raise UserError(
                f"a weight is not finite after step {self.done}, so nothing is saved; "
                "begin another run_dir from the last checkpoint (--resume) with a lower optim.base_lr"
            )
        position = DataPosition(self.samples, job.start.position.fingerprint, job.plan.global_batch)
        run_position = RunPosition(
            self.done, position, job.start.settings, {"pipeline": dict(job.notes), **(notes or {})}
        )
        if job.writer is not None:
            job.writer.save(job.state.tensors(), job.task.description.metadata(), run_position)

    def warn_of_failed_writes(self) -> None:
        """Report once what went wrong with the last checkpoint; training continues and writes the next."""
        writer = self.job.writer
        warning = (writer.failure or writer.warning) if writer else None
        if warning and warning != self.last_warning:
            self.job.progress.say(f"warning: {warning}; training continues")
        self.last_warning = warning

    def finish_writing(self) -> None:
        """Wait until no rank is writing a checkpoint."""
        if self.job.writer is not None:
            self.job.writer.wait()
        self.job.accelerator.wait_for_everyone()

    def require_written(self) -> None:
        """Wait until the last checkpoint is on the disk.

        Raises:
            CheckpointError: on every rank, if it could not be written.
        """
        self.finish_writing()
        failure = self.job.writer.failure if self.job.writer else None
        failures: list[str] = gather_object([failure] if failure else [])
        if failures:
            raise CheckpointError(failures[0])
