"""The figures of a run: summed on the device, read where a line is logged, and nowhere else."""

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
from mae.training.memory import peak_memory
from mae.training.progress import TrainingProgress
from mae.training.run_folder.folder import RunFolder


@dataclass
class Steps:
    """Figures of the steps since the last line of the log, the same on all ranks."""

    losses: list[float] = field(default_factory=list)
    """Mean over the ranks."""
    norms: list[float] = field(default_factory=list)
    """Of the whole gradient."""
    skipped: list[bool] = field(default_factory=list)
    """Whether loss or gradient was not finite, and so no step was taken."""

    def means(self) -> dict[str, Any]:
        """Mean loss and gradient norm of the steps that were taken; None if there were none."""
        return {
            "loss": _mean(self.losses, self.skipped),
            "grad_norm": _mean(self.norms, self.skipped),
            "skipped": sum(self.skipped),
        }

    def to_json(self) -> dict[str, Any]:
        """For JSON, which knows no NaN: the figures of skipped steps are left out."""
        return {
            "losses": _finite(self.losses, self.skipped),
            "norms": _finite(self.norms, self.skipped),
            "skipped": self.skipped,
        }


class Meter:
    """Collects what each step leaves on the device. Reading it is the one moment at which the host waits."""

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
        """Steps skipped in succession up to the newest that was read."""
        self.restart(Steps(**unlogged_steps) if unlogged_steps else Steps())

    def restart(self, steps: Steps) -> None:
        """Begin a new line of the log, of which `steps` are known already."""
        self.steps, self._untimed = steps, len(steps.losses)
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._ids: list[list[Tensor]] = []
        self._waited, self._since = 0.0, time.perf_counter()

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """Take a batch, and the time until it comes."""
        asked = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - asked
        self._bad += batch.bad
        self._lost = self._lost or batch.lost
        return batch

    def add(self, loss: Tensor, norm: Tensor, ids: list[Tensor]) -> None:
        """The mean loss of a step and the norm of its gradient, both still on the device; ids of its micro-batches."""
        self._losses.append(loss)
        self._norms.append(norm)
        self._ids.append(ids)

    def read(self, done: int) -> list[int]:
        """Wait for the device, and share the figures of all steps up to `done` among the ranks.

        Returns:
            For each step read, how many in succession have been skipped, itself included.

        Raises:
            UserError: on every rank, if any rank has lost its data or met more bad images than are allowed; nothing
                learned from such a batch has been saved by then.
        """
        troubles = torch.tensor([float(len(self._bad) + bool(self._lost))], device=self._accelerator.device)
        *sums, found = self._accelerator.reduce(torch.cat([*map(_row, self._losses), troubles]), "sum").tolist()
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
        """Speed since the last line, with all that was done meanwhile; memory and seconds since the start.

        Operations are the model's own, per device; `mfu` is their share of what the maker of the GPU promises in bf16.
        Memory is the most that this process held at a time, of its GPU or of the machine.
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
        """Write the samples of skipped steps; `before` steps were done before the first of them."""
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
            f"their samples stand in {self._folder.skipped.name}"
        )

    def _share_troubles(self) -> None:
        """Tell every rank of the bad images and lost data of all; stop if that is too much, else list the images."""
        lost: list[str] = gather_object([self._lost] if self._lost else [])
        if lost:
            raise BadDataError(f"data are lost: {lost[0]}; then start the same command again")
        new = sorted(set(gather_object(self._bad)) - self._known_bad)
        self._known_bad |= set(new)
        self._bad = []
        known = len(self._known_bad)
        if known > self._max_bad_samples:
            raise BadDataError(
                f"{known} bad image{'s' if known > 1 else ''}, {self._max_bad_samples} are allowed "
                f"(data.max_bad_samples): {first_of(new or sorted(self._known_bad))}; "
                "pack the shards again without them (mae pack SHARDS --out DIR --skip_bad True)"
            )
        if self._accelerator.is_main_process:
            self._folder.record_bad_samples(new)
        if new:
            self._progress.say(f"{len(new)} bad images were replaced by their neighbours: {first_of(new)}")


def _rounded(value: float) -> float:
    """To four digits, however small."""
    return float(f"{value:.4g}")


def _row(scalar: Tensor) -> Tensor:
    return scalar.reshape(1)


def _finite(values: Sequence[float], skipped: Sequence[bool]) -> list[float]:
    return [0.0 if skip else value for value, skip in zip(values, skipped, strict=True)]


def _mean(values: Sequence[float], skipped: Sequence[bool]) -> float | None:
    taken = [value for value, skip in zip(values, skipped, strict=True) if not skip]
    return sum(taken) / len(taken) if taken else None
