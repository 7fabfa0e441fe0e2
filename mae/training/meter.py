"""Figures of a run: collected on the device, and only read to log a line."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from mae.data.batch import Batch
from mae.errors import BadDataError, first_of
from mae.models.flops import peak_flops
from mae.output import counted
from mae.training.memory import peak_memory
from mae.training.progress import TrainingProgress
from mae.training.run_folder.folder import RunFolder


@dataclass
class Steps:
    """Figures of the steps since the last line of the log, equal on all ranks."""

    losses: list[float] = field(default_factory=list)
    """Losses, each the mean over the ranks."""
    norms: list[float] = field(default_factory=list)
    """Norms of the whole gradient."""
    skipped: list[bool] = field(default_factory=list)
    """Whether each step was skipped, because loss or gradient was not finite."""

    def means(self) -> dict[str, Any]:
        """Return mean loss and gradient norm of the steps taken, None without any, and the number of skipped steps."""
        return {
            "loss": _mean(self.losses, self.skipped),
            "grad_norm": _mean(self.norms, self.skipped),
            "skipped": sum(self.skipped),
        }

    def to_json(self) -> dict[str, Any]:
        """Return all figures for JSON, which has no NaN: skipped steps get 0."""
        return {
            "losses": _finite(self.losses, self.skipped),
            "norms": _finite(self.norms, self.skipped),
            "skipped": self.skipped,
        }


class Meter:
    """Collector of the figures of each step on the device; the host only waits in `read`."""

    def __init__(
        self,
        accelerator: Accelerator,
        folder: RunFolder,
        progress: TrainingProgress,
        max_bad_samples: int,
        unlogged_steps: dict[str, Any] | None = None,
    ) -> None:
        self._accelerator, self._folder, self._progress = accelerator, folder, progress
        self._max_bad_samples = max_bad_samples
        self._known_bad = folder.bad_samples()
        self._bad: list[str] = []
        self._lost = ""
        self._began = time.perf_counter()
        self.skipped_in_a_row = 0
        """Number of steps skipped in a row, up to the newest that was read."""
        self.restart(Steps(**unlogged_steps) if unlogged_steps else Steps())

    def restart(self, steps: Steps) -> None:
        """Start a new line of the log, which includes `steps`, known but not timed."""
        self.steps, self._untimed = steps, len(steps.losses)
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._ids: list[list[Tensor]] = []
        self._waited, self._since = 0.0, time.perf_counter()

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """Return the next batch, and measure the wait for it."""
        asked = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - asked
        self._bad += batch.bad
        self._lost = self._lost or batch.lost
        return batch

    def add(self, loss: Tensor, norm: Tensor, ids: list[Tensor]) -> None:
        """Collect loss and gradient norm of a step, both on the device, and the sample ids of its micro-batches."""
        self._losses.append(loss)
        self._norms.append(norm)
        self._ids.append(ids)

    def read(self, done: int) -> list[int]:
        """Wait for the device, and share the figures of all steps up to `done` among the ranks.

        Returns:
            For each step read, the number of steps skipped in a row up to and including it.

        Raises:
            UserError: on every rank, if any rank has lost its data or met more bad images than allowed. Nothing learned
                from such a batch has been saved by then.
        """
        troubles = torch.tensor(float(len(self._bad) + bool(self._lost)), device=self._accelerator.device)
        *sums, found = self._accelerator.reduce(torch.stack([*self._losses, troubles]), "sum").tolist()
        if found:
            self._share_troubles()
        losses = [each / self._accelerator.num_processes for each in sums]
        norms = torch.stack(self._norms).tolist() if self._norms else []
        skipped = [not math.isfinite(norm) for norm in norms]
        rows = []
        for skip in skipped:
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if skip else 0
            rows.append(self.skipped_in_a_row)
        if any(skipped):
            self._record_skipped(done - len(skipped), skipped)
        self.steps = Steps(self.steps.losses + losses, self.steps.norms + norms, self.steps.skipped + skipped)
        self._losses, self._norms, self._ids = [], [], []
        return rows

    def timing(self, global_batch: int, flops_per_image: int) -> dict[str, float]:
        """Return the speed since the last line, pictures and evaluations included; memory and time since the start.

        `tflops` counts the operations of the model, per device; `mfu` is their share of the GPU's nominal bf16 speed.
        `peak_memory` is the most bytes that this process held at a time, on its GPU or the machine.
        """
        accelerator, seconds = self._accelerator, time.perf_counter() - self._since
        steps = len(self.steps.losses) - self._untimed
        images_per_second = steps * global_batch / seconds
        flops = flops_per_image * images_per_second / accelerator.num_processes
        peak = peak_flops(accelerator.device) if accelerator.mixed_precision == "bf16" else None
        return {
            "images_per_second": round(images_per_second, 1),
            "step_seconds": _rounded(seconds / steps),
            "data_wait": round(self._waited / seconds, 4),
            "tflops": _rounded(flops / 1e12),
            **({"mfu": round(flops / peak, 4)} if peak else {}),
            "peak_memory": peak_memory(accelerator.device),
            "seconds": round(time.perf_counter() - self._began, 2),
        }

    def _record_skipped(self, before: int, skipped: Sequence[bool]) -> None:
        """Write the samples of skipped steps; `skipped` begins after `before` steps."""
        mine = [(before + at, torch.cat(self._ids[at]).tolist()) for at, skip in enumerate(skipped) if skip]
        of_all: list[tuple[int, list[int]]] = gather_object(mine)
        samples: dict[int, list[int]] = {}
        for step, ids in of_all:
            samples.setdefault(step, []).extend(ids)
        if self._accelerator.is_main_process:
            self._folder.record_skipped(samples)
        self._progress.say(
            "loss or gradient was not finite, so these steps were skipped: "
            f"{first_of([f'{step:,}' for step in samples], separator=', ')}; "
            f"their samples are listed in {self._folder.skipped.name}"
        )

    def _share_troubles(self) -> None:
        """Share bad images and lost data among the ranks; record the images, or raise if there are too many."""
        lost: list[str] = gather_object([self._lost] if self._lost else [])
        if lost:
            raise BadDataError(f"data are lost: {lost[0]}; then start the same command again")
        new = sorted(set(gather_object(self._bad)) - self._known_bad)
        self._known_bad |= set(new)
        self._bad = []
        known = len(self._known_bad)
        if known > self._max_bad_samples:
            raise BadDataError(
                f"{counted(known, 'bad image')}, {self._max_bad_samples} are allowed "
                f"(data.max_bad_samples): {first_of(new or sorted(self._known_bad))}; "
                "pack the shards again without them (mae pack SHARDS --out DIR --skip_bad True)"
            )
        if self._accelerator.is_main_process:
            self._folder.record_bad_samples(new)
        if new:
            self._progress.say(f"{counted(len(new), 'bad image')} replaced by neighbours: {first_of(new)}")


def _rounded(value: float) -> float:
    """Round to four significant digits."""
    return float(f"{value:.4g}")


def _finite(values: Sequence[float], skipped: Sequence[bool]) -> list[float]:
    return [0.0 if skip else value for value, skip in zip(values, skipped, strict=True)]


def _mean(values: Sequence[float], skipped: Sequence[bool]) -> float | None:
    taken = [value for value, skip in zip(values, skipped, strict=True) if not skip]
    return sum(taken) / len(taken) if taken else None
