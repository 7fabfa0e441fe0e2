"""The training loop that every pipeline shares."""

import math
import random
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
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
from mae.training.optimizer import set_learning_rate
from mae.training.processes.consensus import RankConsensus
from mae.training.processes.first_error import failure_of
from mae.training.processes.fsdp2 import local_value
from mae.training.processes.signals import StopRequest, stop_on_signal
from mae.training.processes.watchdog import StackWatchdog
from mae.training.progress import duration
from mae.training.run_folder.folder import Rollback

_FAILED_WRITES_AT_MOST = 3
# Keys of a checkpoint's notes; old checkpoints hold them too.
_STEP_HOOK_PENDING, _UNLOGGED_STEPS = "owes_a_yield", "unlogged"


@contextmanager
def training(job: Job) -> Iterator[Iterator[int]]:
    """The steps that are left, as an iterator of the number of steps done after each, before it is checkpointed.

    What a pipeline does at such a moment (a picture, an evaluation) is thus part of the checkpoint that follows, and is
    done again if the run dies in between. While the context lasts, signals ask for a checkpoint and an end; how the
    run ended is written to its folder.
    """
    watchdog = StackWatchdog(job.settings.timeout)
    try:
        with stop_on_signal() as stop, job.progress.running(job.start.step, job.total):
            yield _Loop(job, stop, watchdog).steps()
    except PreemptedError as end:
        if job.accelerator.is_main_process:
            job.folder.record_exit("preempted", str(end))
        raise
    except BaseException as error:
        failure = failure_of(error)
        if failure.is_first:
            job.folder.record_exit("error", failure.text)
        raise
    else:
        if job.accelerator.is_main_process:
            job.folder.record_exit("finished", f"{job.total} steps")
    finally:
        watchdog.stop()
        if job.writer is not None:
            job.writer.close()
        job.folder.unlock()


def seed_step(seed: int, step: int, rank: int) -> None:
    """Key every generator that a step may draw from (drop path, mixup) by the step itself."""
    word = int(keyed.key(Purpose.STEP, seed, step, rank))
    torch.manual_seed(word >> 1)
    np.random.seed(word & 0xFFFFFFFF)  # timm's mixup draws from the global generator
    random.seed(word)


class _Loop:
    """The steps of a job, and what may come between them: a stop, a roll-back, a checkpoint that fails."""

    def __init__(self, job: Job, stop: StopRequest, watchdog: StackWatchdog) -> None:
        self.job, self.stop, self.watchdog = job, stop, watchdog
        self.consensus = RankConsensus(job.accelerator, job.settings.timeout)
        notes = job.start.notes
        self.step_hook_pending: bool = notes.get(_STEP_HOOK_PENDING, False)
        self.meter = Meter(
            job.accelerator,
            job.folder,
            job.progress,
            job.settings.data.max_bad_samples,
            unlogged_steps=notes.get(_UNLOGGED_STEPS),
        )
        self.complaint: str | None = None
        self.go_to(job.start.step, job.start.position.samples)

    def go_to(self, step: int, samples: int) -> None:
        """Stand after `step` steps, with the data at position `samples`."""
        self.done, self.samples = step, samples
        self.batches = self.job.micro_batches(samples, self.job.total - step)

    def steps(self) -> Iterator[int]:
        """Yields the number of steps done."""
        job = self.job
        if self.step_hook_pending:
            yield self.done
        while self.done < job.total:
            self.watchdog.reset()
            self.consensus.submit(self.stop.number, job.writer.failures_in_a_row if job.writer else 0)
            self.step()
            self.done, self.samples = self.done + 1, self.samples + job.plan.global_batch
            asked, failures = self.consensus.maximum()
            if failures >= _FAILED_WRITES_AT_MOST:
                self.require_written()
            self.complain()

            last = self.done == job.total
            saving = self.done % job.settings.checkpoint_every == 0 or last
            if (saving or self.done % job.settings.log_every == 0) and self.report() >= job.settings.skip_at_most:
                self.roll_back()
                continue
            job.progress.step(self.done)
            if asked and not last:
                self.leave(signal.Signals(asked).name)
            yield self.done
            # Within a row of skipped steps there is nothing new to save, and the weights may be why.
            if saving and (last or not self.meter.skipped_in_a_row):
                self.save()
        if job.start.step < job.total:
            self.require_written()

    def step(self) -> None:
        """One step of the optimiser, unless loss or gradient is not finite."""
        job = self.job
        seed_step(job.settings.seed, self.done, job.accelerator.process_index)
        set_learning_rate(job.optimizer, job.schedule(self.done))
        loss, ids = self.backward()
        norm = local_value(
            job.accelerator.clip_grad_norm_(job.model.parameters(), job.settings.optim.clip_grad or math.inf)
        )
        step_unless(job.optimizer, ~norm.isfinite())
        job.optimizer.zero_grad()
        job.state.update_average()
        self.meter.add(loss, norm, ids)

    def backward(self) -> tuple[Tensor, list[Tensor]]:
        """Accumulate the gradient of one global batch; this rank's mean loss, still on the device, and sample ids."""
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
        """Log and show the figures since the last line; the greatest number of steps skipped in a row."""
        job, done = self.job, self.done
        rows = self.meter.read(done)
        if max(rows, default=0) >= job.settings.skip_at_most:
            # The data go on behind the step that made the row too long, whenever that is noticed.
            late = len(rows) - 1 - rows.index(job.settings.skip_at_most)
            self.samples -= late * job.plan.global_batch
            return job.settings.skip_at_most
        timing = self.meter.timing(job.plan.global_batch, job.task.flops_per_image)
        record = {
            "kind": "train",
            "step": done,
            "epoch": job.epoch_after(done),
            "lr": job.schedule(done - 1),
            **self.meter.steps.means(),
            **timing,
        }
        if job.accelerator.is_main_process:
            job.folder.log(record)
        speed = timing["images_per_second"]
        left = (job.total - done) * job.plan.global_batch / max(speed, 1e-9)
        loss = "not finite" if record["loss"] is None else f"{record['loss']:.4f}"
        mfu = f"  MFU {timing['mfu']:.0%}" if "mfu" in timing else ""
        job.progress.status(
            done,
            f"epoch {record['epoch']:.1f}  loss {loss}  lr {record['lr']:.2e}  {speed:,.0f} images/s  "
            f"data wait {timing['data_wait']:.0%}{mfu}  ETA {duration(left)}",
        )
        self.meter.restart(Steps())
        return self.meter.skipped_in_a_row

    def roll_back(self) -> None:
        """Take up the weights of the last checkpoint again, and leave out the data since.

        Raises:
            UserError: on every rank, if there is none, or if that has been done before.
        """
        job = self.job
        most = job.settings.skip_at_most
        remedy = "lower optim.base_lr or set optim.clip_grad in another run_dir, or look at the samples in " + str(
            job.folder.skipped
        )
        if job.folder.rollback() is not None:
            raise UserError(
                f"{most} steps in a row were skipped up to step {self.done}, again after a return to a checkpoint, "
                f"since loss or gradient was not finite; {remedy}"
            )
        self.finish_writing()
        found = newest_checkpoint(job.folder.checkpoints, job.progress.say)
        if found is None:
            raise UserError(
                f"{most} steps in a row were skipped up to step {self.done}, since loss or gradient was not finite, "
                f"and there is no checkpoint to go back to; {remedy}"
            )
        job.state.restore(found)
        job.notes.clear()
        job.notes.update(found.run_position.notes.get("pipeline", {}))
        if job.accelerator.is_main_process:
            job.folder.record_rollback(Rollback(found.step, self.samples))
            job.folder.forget_after(found.step)
        job.accelerator.wait_for_everyone()
        job.progress.say(
            f"{most} steps in a row were skipped up to step {self.done}: back to step {found.step}, "
            f"with the data that follow sample {self.samples:,}"
        )
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
                f"{reason}: left at step {done} of {job.total} within skipped steps, which are not saved; "
                "start the same command to go on from the last checkpoint"
            )
        self.save({_STEP_HOOK_PENDING: True, _UNLOGGED_STEPS: self.meter.steps.to_json()})
        self.require_written()
        raise PreemptedError(f"{reason}: saved at step {done} of {job.total}; start the same command to go on")

    def is_new_line(self) -> bool:
        """Whether the log holds all steps so far."""
        settings = self.job.settings
        return self.done % settings.log_every == 0 or self.done % settings.checkpoint_every == 0

    def save(self, notes: Mapping[str, Any] | None = None) -> None:
        """Begin to write a checkpoint.

        Raises:
            UserError: if a weight is not finite; what was saved before stays.
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

    def complain(self) -> None:
        """Say once what is wrong with the last checkpoint; training goes on, and tries again at the next."""
        writer = self.job.writer
        complaint = (writer.failure or writer.warning) if writer else None
        if complaint and complaint != self.complaint:
            self.job.progress.say(f"warning: {complaint}; training goes on")
        self.complaint = complaint

    def finish_writing(self) -> None:
        """Wait on all ranks until nothing is being written."""
        if self.job.writer is not None:
            self.job.writer.wait()
        self.job.accelerator.wait_for_everyone()

    def require_written(self) -> None:
        """Wait until the last checkpoint is on the disk.

        Raises:
            CheckpointError: on every rank, if it is not.
        """
        self.finish_writing()
        failure = self.job.writer.failure if self.job.writer else None
        failures: list[str] = gather_object([failure] if failure else [])
        if failures:
            raise CheckpointError(failures[0])
