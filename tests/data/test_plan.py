"""Batch plans deal out the whole global batch, or name the nearest that can be dealt out."""

import pytest

from mae.data.plan import BatchPlan, plan_batches, require_whole_images
from mae.errors import UserError


@pytest.mark.parametrize(
    ("global_batch", "processes", "micro_batch", "per_process", "accumulation"),
    [
        (256, 1, None, 256, 1),
        (256, 4, None, 64, 1),
        (256, 1, 64, 64, 4),
        (256, 2, 64, 64, 2),
        (256, 4, 64, 64, 1),
        (32, 1, 64, 32, 1),
        (100, 2, 64, 50, 1),
        (1, 1, 1, 1, 1),
    ],
)
def test_a_plan_deals_out_the_whole_batch_at_most_micro_batch_at_a_time(
    global_batch: int, processes: int, micro_batch: int | None, per_process: int, accumulation: int
) -> None:
    plan = plan_batches(global_batch, processes, micro_batch)
    assert plan == BatchPlan(global_batch, processes, per_process, accumulation)
    dealt = [range(*plan.positions(micro, rank)) for micro in range(accumulation) for rank in range(processes)]
    assert sorted(position for part in dealt for position in part) == list(range(global_batch))
    for rank in range(processes):
        rows = [p for micro in range(accumulation) for p in range(*plan.positions(micro, rank))]
        assert rows == list(range(rank * global_batch // processes, (rank + 1) * global_batch // processes))
    start = 3 * global_batch
    assert plan.positions(3 * accumulation, 0) == (start, start + per_process)


@pytest.mark.parametrize(
    ("global_batch", "processes", "micro_batch", "nearest"),
    [
        (10, 3, None, "9 or 12"),
        (2, 3, None, "3"),
        (100, 1, 64, "64 or 128"),
        (200, 3, 64, "192 or 384"),
        (101, 2, 64, "100 or 102"),
    ],
)
def test_a_batch_that_cannot_be_dealt_out_is_refused_with_the_nearest_that_can(
    global_batch: int, processes: int, micro_batch: int | None, nearest: str
) -> None:
    with pytest.raises(UserError, match=rf"batch_size {global_batch} cannot be .* {processes} processes.*: {nearest}$"):
        plan_batches(global_batch, processes, micro_batch)
    for size in nearest.split(" or "):
        assert plan_batches(int(size), processes, micro_batch).global_batch == int(size)


def test_a_micro_batch_must_hold_all_views_of_its_images() -> None:
    require_whole_images(plan_batches(12, 2, 3), views_per_image=3)
    message = r"a process takes 2 samples at a time, which is not a multiple of the 3 views of an image"
    with pytest.raises(UserError, match=message):
        require_whole_images(plan_batches(12, 2, 2), views_per_image=3)
