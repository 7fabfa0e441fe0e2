import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import png

from mae.data.augment import AugmentSettings, eval_view
from mae.data.decode import decode
from mae.data.index import ShardIndex, build_index
from mae.data.loader import (
    Batch,
    BatchPlan,
    DataSettings,
    EvalBatches,
    TrainBatches,
    labelled_subset,
    load,
    normalize,
    plan_batches,
)
from mae.data.order import sample_ids
from mae.data.statistics import PixelStatistics
from mae.errors import UserError

DATA = DataSettings(channels=1, image_size=(8,))
ALL_OF_IT = AugmentSettings(rand_augment=9)
COUNT = 23


@pytest.fixture
def index(make_shards: Callable[..., Path]) -> ShardIndex:
    """23 gray images of 8x8 pixels in three shards."""
    return build_index([str(make_shards([10, 1, 12]))], Path("/nowhere"))


def train_batches(index: ShardIndex, plan: BatchPlan | None = None, rank: int = 0, **other: Any) -> TrainBatches:
    settings = {"seed": 0, "data": DATA, "augmentation": ALL_OF_IT, "patches": 4} | other
    return TrainBatches(index, plan or plan_batches(8, 1, None), rank, **settings)


def assert_equal(left: Batch, right: Batch) -> None:
    for name in ("images", "labels", "ids", "noise"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name
    assert left.bad == right.bad


def joined(batches: Sequence[Batch]) -> Batch:
    tensors = zip(*(batch[:4] for batch in batches), strict=True)
    return Batch(*(torch.cat(parts) for parts in tensors), bad=[name for batch in batches for name in batch.bad])


def by_epoch_and_id(batches: TrainBatches, micro_steps: int) -> dict[tuple[int, int], tuple[Any, ...]]:
    """(epoch, id) -> pixels and noise."""
    whole = joined([batches[step] for step in range(micro_steps)])
    epochs = sample_ids(batches.seed, len(batches.subset), 0, len(whole.ids))[1].tolist()
    pixels, noise = whole.images.flatten(1).tolist(), whole.noise.tolist()
    return {(e, n): (p, m) for e, n, p, m in zip(epochs, whole.ids.tolist(), pixels, noise, strict=True)}


def test_a_batch_holds_what_belongs_to_its_ids(index: ShardIndex) -> None:
    batch = train_batches(index)[0]
    assert (batch.images.dtype, tuple(batch.images.shape)) == (torch.uint8, (8, 1, 8, 8))
    assert batch.ids.tolist() == sample_ids(0, COUNT, 0, 8)[0].tolist()
    assert batch.labels.tolist() == [n % 4 for n in batch.ids.tolist()]
    assert (batch.noise.dtype, tuple(batch.noise.shape)) == (torch.float32, (8, 4))
    assert batch.noise.unique().numel() == 32
    assert batch.bad == []


def test_batches_are_the_same_for_any_number_of_workers(index: ShardIndex) -> None:
    """Over an epoch's end, with RandAugment, which draws from a generator of whichever process makes the batch."""
    batches = train_batches(index)
    expected = [batches[step] for step in range(5)]
    for workers in (0, 1, 2):
        made = list(load(batches, range(5), workers))
        assert len(made) == 5
        for left, right in zip(made, expected, strict=True):
            assert_equal(left, right)


@pytest.mark.parametrize(
    ("processes", "micro_batch"), [(1, 8), (1, 2), (2, None), (2, 1), (4, None), (4, 1), (8, None)]
)
def test_ranks_and_accumulation_steps_together_make_the_same_global_batches(
    index: ShardIndex, processes: int, micro_batch: int | None
) -> None:
    plan = plan_batches(8, processes, micro_batch)
    ranks = [train_batches(index, plan, rank) for rank in range(processes)]
    alone = train_batches(index)
    for step in range(4):
        micro_steps = range(step * plan.accumulation, (step + 1) * plan.accumulation)
        assert_equal(joined([rank[micro] for micro in micro_steps for rank in ranks]), alone[step])


def test_a_start_in_the_middle_goes_on_with_the_uninterrupted_order(index: ShardIndex) -> None:
    uninterrupted = [train_batches(index)[step] for step in range(6)]
    for start in (1, 2, 3, 5):  # an epoch ends within step 2
        for left, right in zip(load(train_batches(index), range(start, 6), 0), uninterrupted[start:], strict=True):
            assert_equal(left, right)


def test_every_sample_occurs_once_in_each_of_three_epochs(index: ShardIndex) -> None:
    batches = train_batches(index, augmentation=AugmentSettings())
    ids = joined([batches[step] for step in range(9)]).ids[: 3 * COUNT].reshape(3, COUNT)
    assert ids.sort(dim=1).values.tolist() == [list(range(COUNT))] * 3


def test_pixels_and_noise_depend_on_seed_epoch_and_id_only(index: ShardIndex) -> None:
    first = by_epoch_and_id(train_batches(index), 9)
    for size in (1, 5, 23):
        other = by_epoch_and_id(train_batches(index, plan_batches(size, 1, None)), 69 // size)
        assert len(other) >= 65
        assert other == {key: first[key] for key in other}
    subset = np.array([3, 5, 20, 7])
    few = by_epoch_and_id(train_batches(index, plan_batches(4, 1, None), subset=subset), 3)
    assert {n for _, n in few} == set(subset.tolist())
    assert few == {key: first[key] for key in few}


def test_another_epoch_or_seed_gives_other_pixels_and_noise(index: ShardIndex) -> None:
    first = by_epoch_and_id(train_batches(index), 6)
    other_seed = by_epoch_and_id(train_batches(index, seed=1), 6)
    for number in range(COUNT):
        pixels, noise = first[0, number]
        for other_pixels, other_noise in (first[1, number], other_seed[0, number]):
            assert pixels != other_pixels
            assert noise != other_noise


def test_augmenting_leaves_the_trainers_generator_as_it_was(index: ShardIndex) -> None:
    """Else drop path would draw other numbers without workers than with them."""
    before = torch.random.manual_seed(5).get_state()
    train_batches(index)[0]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_without_patches_there_is_no_noise(index: ShardIndex) -> None:
    assert train_batches(index, patches=0)[0].noise.shape == (8, 0)


def test_keeping_decoded_images_changes_no_pixel_and_spares_the_file(make_shards: Callable[..., Path]) -> None:
    folder = make_shards([8])
    index = build_index([str(folder)], Path("/nowhere"))
    keeping = DataSettings(channels=1, image_size=(8,), keep_decoded=True)
    plain, kept = train_batches(index), train_batches(index, data=keeping)
    expected = [plain[step] for step in range(4)]
    assert_equal(kept[0], expected[0])
    os.truncate(folder / "train-000000.tar", 0)
    for step in (3, 1, 2, 0):
        assert_equal(kept[step], expected[step])
    assert len(plain[0].bad) == 8


@pytest.mark.parametrize("keep_decoded", [False, True])
def test_a_bad_image_is_named_and_black_and_nothing_else_changes(
    write_tar: Callable[..., Path], keep_decoded: bool
) -> None:
    files = {f"{n}.png": png(n) for n in range(8)}
    good = build_index([str(write_tar("good.tar", files))], Path("/nowhere"))
    bad_path = write_tar("bad.tar", files | {"5.png": b"<html>" + bytes(100)})
    bad = build_index([str(bad_path)], Path("/nowhere"))
    data = DataSettings(channels=1, image_size=(8,), keep_decoded=keep_decoded)
    batches = train_batches(bad, data=data)
    for step in range(2):
        expected, found = train_batches(good)[step], batches[step]
        assert found.ids.tolist() == expected.ids.tolist()
        assert torch.equal(found.noise, expected.noise)
        row = found.ids.tolist().index(5)
        assert found.images[row].max() == 0
        others = found.ids != 5
        assert torch.equal(found.images[others], expected.images[others])
        assert len(found.bad) == 1
        assert found.bad[0].startswith(f"{bad_path}: 5.png (")


def test_a_bad_image_is_named_in_evaluation_too(write_tar: Callable[..., Path]) -> None:
    path = write_tar("x.tar", {"a.png": png(0), "b.png": b"x"})
    (batch,) = load(EvalBatches(build_index([str(path)], Path("/nowhere")), 2, DATA), range(1), 0)
    assert batch.images[0].max() > 0
    assert batch.images[1].max() == 0
    assert batch.bad[0].startswith(f"{path}: b.png (")


@pytest.mark.parametrize(
    ("processes", "batch_size", "workers"), [(1, 23, 0), (1, 4, 1), (3, 4, 0), (3, 100, 0), (24, 4, 0)]
)
def test_evaluation_sees_every_sample_exactly_once_over_all_ranks(
    index: ShardIndex, processes: int, batch_size: int, workers: int
) -> None:
    ranks = [EvalBatches(index, batch_size, DATA, rank, processes) for rank in range(processes)]
    made = [batch for rank in ranks for batch in load(rank, range(len(rank)), workers)]
    assert all(1 <= len(batch.ids) <= batch_size for batch in made)
    ids = [n for batch in made for n in batch.ids.tolist()]
    assert sorted(ids) == list(range(COUNT))
    assert {rank.total for rank in ranks} == {COUNT}
    for batch in made:
        for image, label, number in zip(batch.images, batch.labels.tolist(), batch.ids.tolist(), strict=True):
            assert label == number % 4
            assert torch.equal(image, eval_view(decode(png(number), 1), (8, 8), DATA.crop_pct))


def test_evaluation_may_be_limited_to_some_ids(index: ShardIndex) -> None:
    batches = EvalBatches(index, 2, DATA, ids=np.array([4, 2, 9]))
    assert [batch.ids.tolist() for batch in load(batches, range(len(batches)), 0)] == [[4, 2], [9]]
    assert batches.total == 3


def test_workers_leave_ctrl_c_to_the_trainer(index: ShardIndex) -> None:
    batches = load(train_batches(index), range(20), 2)
    next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGINT)
    assert len(list(batches)) == 19


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
    assert [position for part in dealt for position in part] == list(range(global_batch))


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


def test_a_batch_larger_than_the_data_is_refused(index: ShardIndex) -> None:
    with pytest.raises(UserError, match="batch_size is 24 but the data holds 23 samples; allowed: 1 to 23"):
        train_batches(index, plan_batches(24, 2, None))
    with pytest.raises(UserError, match="batch_size is 8 but the data holds 5 samples"):
        train_batches(index, subset=np.arange(5))


def test_rand_augment_of_other_than_gray_or_rgb_is_refused_at_the_start(index: ShardIndex) -> None:
    four = DataSettings(channels=4, image_size=(8,))
    with pytest.raises(UserError, match=r"augment\.rand_augment is 9 but the images have 4 channels"):
        train_batches(index, data=four)
    assert train_batches(index, data=four, augmentation=AugmentSettings())[0].images.shape == (8, 4, 8, 8)


def test_rectangular_images_are_height_then_width(index: ShardIndex) -> None:
    data = DataSettings(channels=3, image_size=(8, 12))
    assert train_batches(index, data=data)[0].images.shape == (8, 3, 8, 12)
    assert EvalBatches(index, 4, data)[0].images.shape == (4, 3, 8, 12)


def test_normalised_pixels_have_the_data_set_s_mean_and_deviation_taken_out() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = np.array([0.1, 0.5, 0.9]), np.array([0.2, 0.3, 0.4])
    found = normalize(images, PixelStatistics(tuple(mean.tolist()), tuple(std.tolist())))
    expected = (images.numpy() / 255 - mean[:, None, None]) / std[:, None, None]
    assert found.dtype == torch.float32
    assert np.abs(found.numpy() - expected).max() < 1e-5


def test_a_labelled_subset_has_as_many_of_each_class_and_depends_on_the_seed(index: ShardIndex) -> None:
    subsets = [labelled_subset(index, 2, seed) for seed in range(5)]
    for subset in subsets:
        assert np.bincount(index.label[subset]).tolist() == [2, 2, 2, 2]
        assert subset.tolist() == sorted(set(subset.tolist()))
    assert len({tuple(subset.tolist()) for subset in subsets}) > 1
    assert labelled_subset(index, 2, 3).tolist() == subsets[3].tolist()


def test_a_larger_labelled_subset_contains_the_smaller(index: ShardIndex) -> None:
    assert set(labelled_subset(index, 2, 0).tolist()) < set(labelled_subset(index, 4, 0).tolist())


def test_more_labels_than_a_class_has_are_refused(index: ShardIndex) -> None:
    with pytest.raises(UserError, match="class 3 has 5 samples, labels_per_class asks for 6; allowed: 1 to 5"):
        labelled_subset(index, 6, 0)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("data.workers", {"workers": -1}),
        ("data.image_size", {"image_size": ()}),
        ("data.image_size", {"image_size": (1, 2, 3)}),
        ("data.image_size", {"image_size": (0,)}),
        ("data.channels", {"channels": 0}),
        ("data.crop_pct", {"crop_pct": 0.0}),
        ("data.crop_pct", {"crop_pct": 1.1}),
        ("data.crop_pct", {"crop_pct": float("nan")}),
        ("data.mean", {"mean": (0.5,) * 3}),
        ("data.mean", {"std": (0.5,) * 3}),
        ("data.mean", {"mean": (0.5,), "std": (0.5,)}),
        ("data.std", {"mean": (0.5,) * 3, "std": (0.5,)}),
        ("data.mean", {"mean": (0.5, 0.5, 1.5), "std": (0.5,) * 3}),
        ("data.std", {"mean": (0.5,) * 3, "std": (0.5, 0.5, 0.0)}),
        ("data.std", {"mean": (0.5,) * 3, "std": (0.5, 0.5, float("nan"))}),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"^{name} is .*; allowed: "):
        DataSettings(**settings)


def test_one_number_is_a_square() -> None:
    assert (DataSettings(image_size=(32,)).size, DataSettings(image_size=(32, 16)).size) == ((32, 32), (32, 16))
