"""Batch plan: how a global batch is divided among processes and accumulation steps."""

from dataclasses import dataclass

from mae.errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    """Division of a global batch into `accumulation` micro-batches of `per_process` images on each process."""

    global_batch: int
    processes: int
    per_process: int
    accumulation: int

    def positions(self, micro_step: int, rank: int) -> tuple[int, int]:
        """Return the first position of a micro-batch in the endless sample order, and the one after its last.

        A rank takes consecutive positions of each global batch, so that it reads from as few lanes as possible.
        """
        step, micro = divmod(micro_step, self.accumulation)
        start = step * self.global_batch + (rank * self.accumulation + micro) * self.per_process
        return start, start + self.per_process


def plan_batches(global_batch: int, processes: int, micro_batch: int | None) -> BatchPlan:
    """Divide `global_batch` samples among `processes`, at most `micro_batch` at a time on each.

    Raises:
        UserError: if the numbers do not divide; it names the nearest global batches that do.
    """
    is_limited = micro_batch is not None and micro_batch * processes < global_batch
    unit = processes * micro_batch if is_limited and micro_batch else processes
    if global_batch % unit:
        below, above = global_batch // unit * unit, (global_batch // unit + 1) * unit
        raise UserError(
            f"batch_size {global_batch} cannot be divided among {processes} processes"
            + (f" in micro-batches of {micro_batch}" if is_limited else "")
            + f"; nearest that can: {f'{below} or ' if below else ''}{above}"
        )
    accumulation = global_batch // unit if is_limited else 1
    return BatchPlan(global_batch, processes, global_batch // (processes * accumulation), accumulation)


def require_whole_images(plan: BatchPlan, views_per_image: int) -> None:
    """Raise a `UserError` if a micro-batch would hold some views of an image but not all."""
    if plan.per_process % views_per_image:
        raise UserError(
            f"a process takes {plan.per_process} samples at a time, which is not a multiple of the {views_per_image} "
            "views of an image (data.views_per_image); change batch_size or micro_batch_size"
        )
