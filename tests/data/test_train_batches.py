"""Training batches of indexed shards: equal for any workers, processes and starts; bad images are named."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import png

from mae.data import reader
from mae.data.batch import Batch, BatchRecipe
from mae.data.images.augment import AugmentSettings
from mae.data.images.decode import decode
from mae.data.index import ShardIndex
from mae.data.loader import load
from mae.data.order import Order
from mae.data.plan import BatchPlan, plan_batches
from mae.data.reader import ImageReader
from mae.data.settings import DataSettings
from mae.data.train_batches import TrainBatches
from mae.errors import UserError

DATA = DataSettings(channels=1, image_size=(8,))
ALL_OF_IT = AugmentSettings(rand_augment="rand-m9-mstd0.5-inc1", erase=0.5)
COUNT = 23
TENSORS = ("images", "labels", "ids", "noise")
# 23 samples in chunks of 2, windows of 2 chunks and at most 3 lanes.
LANES = {"chunk_samples": 2, "window_chunks": 2, "lanes": 3}


def train_batches(
    index: ShardIndex, plan: BatchPlan | None = None, rank: int = 0, subset: Any = None, **other: Any
) -> TrainBatches:
    recipe = BatchRecipe(**({"seed": 0, "data": DATA, "augment": ALL_OF_IT, "noise_columns": 4} | other))
    return TrainBatches(index, plan or plan_batches(8, 1, None), rank, recipe, subset)


def assert_equal(left: Batch, right: Batch) -> None:
    for name in TENSORS:
        assert torch.equal(getattr(left, name), getattr(right, name)), name
    assert (left.words, left.bad, left.lost) == (right.words, right.bad, right.lost)


def joined(batches: Sequence[Batch]) -> Batch:
    parts = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in TENSORS}
    words = [word for batch in batches for word in batch.words]
    return batches[0]._replace(**parts, words=words, bad=[name for batch in batches for name in batch.bad])


def by_epoch_and_id(batches: TrainBatches, micro_steps: int) -> dict[tuple[int, int], tuple[Any, ...]]:
    """(epoch, id) -> pixels, noise and word."""
    whole = joined([batches[step] for step in range(micro_steps)])
    epochs = [place // batches.samples for place in range(len(whole.ids))]
    pixels, noise = whole.images.flatten(1).tolist(), whole.noise.tolist()
    rows = zip(epochs, whole.ids.tolist(), pixels, noise, whole.words, strict=True)
    return {(epoch, number): of_image for epoch, number, *of_image in rows}


def test_a_batch_holds_what_belongs_to_its_ids(index: ShardIndex) -> None:
    batch = train_batches(index)[0]
    assert (batch.images.dtype, tuple(batch.images.shape)) == (torch.uint8, (8, 1, 8, 8))
    assert batch.ids.tolist() == Order(0, COUNT, 8).at(0, 8)[0].tolist()
    assert batch.labels.tolist() == [n % 4 for n in batch.ids.tolist()]
    assert (batch.noise.dtype, tuple(batch.noise.shape)) == (torch.float32, (8, 4))
    assert batch.noise.unique().numel() == 32
    assert (len(set(batch.words)), batch.bad, batch.lost) == (8, [], "")


@pytest.mark.parametrize(
    "other",
    [{}, LANES, {"keep_decoded": True}, {"views_per_image": 2}],
    ids=["whole", "lanes", "kept", "two-views"],
)
def test_batches_are_the_same_for_any_workers_and_threads_o01_o10(index: ShardIndex, other: dict[str, Any]) -> None:
    """Over an epoch's end, with RandAugment and random erasing."""
    data = replace(DATA, **other)
    alone = train_batches(index, data=data)
    expected = [alone[step] for step in range(5)]
    for workers, threads in ((0, 1), (1, 3), (2, 1)):
        made = list(load(train_batches(index, data=replace(data, threads=threads)), range(5), workers))
        assert len(made) == 5
        for left, right in zip(made, expected, strict=True):
            assert_equal(left, right)


@pytest.mark.parametrize("other", [{}, LANES, {"views_per_image": 2}], ids=["whole", "lanes", "two-views"])
@pytest.mark.parametrize(
    ("processes", "micro_batch"), [(1, 16), (1, 2), (2, None), (2, 4), (4, None), (4, 2), (8, None)]
)
def test_ranks_and_accumulation_steps_together_make_the_same_global_batches_o02_o15(
    index: ShardIndex, processes: int, micro_batch: int | None, other: dict[str, Any]
) -> None:
    """As lists: row by row the batches of one process, dealt out rank by rank."""
    data, plan = replace(DATA, **other), plan_batches(16, processes, micro_batch)
    ranks = [train_batches(index, plan, rank, data=data) for rank in range(processes)]
    alone = train_batches(index, plan_batches(16, 1, None), data=data)
    for step in range(3):
        micro_steps = range(step * plan.accumulation, (step + 1) * plan.accumulation)
        assert_equal(joined([rank[micro] for rank in ranks for micro in micro_steps]), alone[step])


def test_views_that_do_not_fit_into_a_share_are_refused(index: ShardIndex) -> None:
    message = r"a process takes 2 samples at a time, which is not a multiple of the 3 views of an image"
    with pytest.raises(UserError, match=message):
        train_batches(index, plan_batches(12, 2, 2), data=replace(DATA, views_per_image=3))


@pytest.mark.parametrize("other", [{}, LANES, {"views_per_image": 4}], ids=["whole", "lanes", "four-views"])
def test_a_start_in_the_middle_goes_on_with_the_uninterrupted_order_o03_o04_o06_o07(
    index: ShardIndex, other: dict[str, Any]
) -> None:
    """With as many workers and processes as there happen to be then; an epoch ends within step 2."""
    data = replace(DATA, **other)
    alone = train_batches(index, data=data)
    uninterrupted = [alone[step] for step in range(6)]
    for start in (1, 2, 3, 5):
        for left, right in zip(
            load(train_batches(index, data=data), range(start, 6), start % 2), uninterrupted[start:], strict=True
        ):
            assert_equal(left, right)
    ranks = [load(train_batches(index, plan_batches(8, 2, None), rank, data=data), range(3, 6), 0) for rank in (0, 1)]
    for step, parts in enumerate(zip(*ranks, strict=True), 3):
        assert_equal(joined(parts), uninterrupted[step])


def test_batches_made_ahead_and_never_used_change_nothing_o16(index: ShardIndex) -> None:
    """A loader has made some by the time it dies; the next one is told the step, nothing else."""
    ahead = load(train_batches(index), range(20), 2)
    next(ahead)
    del ahead
    assert_equal(next(load(train_batches(index), range(1, 20), 0)), train_batches(index)[1])


def test_every_sample_occurs_once_in_each_of_three_epochs_o05(index: ShardIndex) -> None:
    batches = train_batches(index, augment=AugmentSettings())
    ids = joined([batches[step] for step in range(9)]).ids[: 3 * COUNT].reshape(3, COUNT)
    assert ids.sort(dim=1).values.tolist() == [list(range(COUNT))] * 3


def test_pixels_and_noise_depend_on_seed_epoch_and_id_only_o10(index: ShardIndex) -> None:
    first = by_epoch_and_id(train_batches(index), 9)
    for size in (1, 5, 23):
        other = by_epoch_and_id(train_batches(index, plan_batches(size, 1, None)), 69 // size)
        assert len(other) >= 65
        assert other == {key: first[key] for key in other}
    subset = np.array([3, 5, 20, 7])
    few = by_epoch_and_id(train_batches(index, plan_batches(4, 1, None), subset=subset), 3)
    assert {n for _, n in few} == set(subset.tolist())
    assert few == {key: first[key] for key in few}


def test_another_epoch_or_seed_gives_other_pixels_and_noise_o11(index: ShardIndex) -> None:
    first = by_epoch_and_id(train_batches(index), 6)
    other_seed = by_epoch_and_id(train_batches(index, seed=1), 6)
    for number in range(COUNT):
        pixels, noise, word = first[0, number]
        for other_pixels, other_noise, other_word in (first[1, number], other_seed[0, number]):
            assert pixels != other_pixels
            assert noise != other_noise
            assert word != other_word


def test_augmenting_leaves_the_trainers_generator_as_it_was(index: ShardIndex) -> None:
    """Else drop path would draw other numbers without workers than with them."""
    before = torch.random.manual_seed(5).get_state()
    train_batches(index)[0]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_without_patches_there_is_no_noise(index: ShardIndex) -> None:
    assert train_batches(index, noise_columns=0)[0].noise.shape == (8, 0)


def test_keeping_decoded_images_changes_no_pixel_and_spares_the_file(
    make_shards: Callable[..., Path], index_of: Callable[..., ShardIndex]
) -> None:
    folder = make_shards([8])
    index = index_of(folder)
    plain, kept = train_batches(index), train_batches(index, data=replace(DATA, keep_decoded=True))
    expected = [plain[step] for step in range(4)]
    assert_equal(kept[0], expected[0])
    os.truncate(folder / "train-000000.tar", 0)
    for step in (3, 1, 2, 0):
        assert_equal(kept[step], expected[step])
    assert "shorter" in plain[0].lost


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("keep_decoded", [False, True], ids=["read", "kept"])
def test_the_views_of_an_image_differ_and_the_first_is_the_only_one_s(
    index: ShardIndex, views: int, keep_decoded: bool
) -> None:
    data = replace(DATA, keep_decoded=keep_decoded)
    single = train_batches(index, plan_batches(6, 1, None), data=data)
    several = train_batches(index, plan_batches(6 * views, 1, None), data=replace(data, views_per_image=views))
    for step in range(4):
        one, found = single[step], several[step]
        assert len(found.ids) == 6 * views
        for name in TENSORS:
            assert torch.equal(getattr(found, name)[::views], getattr(one, name)), name
        for view in range(1, views):
            assert torch.equal(found.ids[view::views], one.ids)
            assert torch.equal(found.labels[view::views], one.labels)
            for row in range(6):
                assert not torch.equal(found.images[row * views + view], one.images[row])
                assert not torch.equal(found.noise[row * views + view], one.noise[row])


def test_an_epoch_of_several_views_shows_a_part_of_the_images_once(index: ShardIndex) -> None:
    batches = train_batches(index, plan_batches(6, 1, None), data=replace(DATA, views_per_image=3))
    ids = joined([batches[step] for step in range(12)]).ids
    assert ids[:69:3].sort().values.tolist() == list(range(COUNT))
    assert torch.equal(ids[0::3], ids[2::3])


def bad_set(write_tar: Callable[..., Path], *bad: int) -> tuple[Path, Path]:
    """Twelve images under the labels 0 ... 11, whole and with some that only decoding shows to be bad."""
    files = {f"{n}.{kind}": png(n) if kind == "png" else str(n).encode() for n in range(12) for kind in ("png", "cls")}
    good = write_tar("good.tar", files)
    return good, write_tar("bad.tar", files | {f"{n}.png": png(n)[:60] for n in bad})


@pytest.mark.parametrize("keep_decoded", [False, True], ids=["read", "kept"])
def test_a_bad_image_is_named_and_black_and_nothing_else_changes_s01(
    write_tar: Callable[..., Path], index_of: Callable[..., ShardIndex], keep_decoded: bool
) -> None:
    good, bad = bad_set(write_tar, 5)
    data = replace(DATA, keep_decoded=keep_decoded)
    plan = plan_batches(12, 1, None)
    whole, batches = train_batches(index_of(good), plan), train_batches(index_of(bad), plan, data=data)
    for step in range(2):
        expected, found = whole[step], batches[step]
        assert torch.equal(found.noise, expected.noise)
        assert found.ids.tolist() == expected.ids.tolist()
        # A label of none would end fine-tuning in a traceback before the image can be named.
        assert found.labels.tolist() == expected.labels.tolist()
        row = found.ids.tolist().index(5)
        assert found.images[row].max() == 0
        others = found.ids != 5
        assert torch.equal(found.images[others], expected.images[others])
        assert [name.partition(" (")[0] for name in found.bad] == [f"{bad}: 5.png"]
        assert found.lost == ""


@pytest.mark.parametrize("keep_decoded", [False, True], ids=["read", "kept"])
def test_a_bad_image_is_replaced_by_the_next_good_one_s01(
    write_tar: Callable[..., Path], index_of: Callable[..., ShardIndex], keep_decoded: bool
) -> None:
    """Under the random numbers, the mask and the id of the bad one, but its own label; the last by the first."""
    good, bad = bad_set(write_tar, 4, 5, 11)
    data = replace(DATA, max_bad_samples=3, keep_decoded=keep_decoded)
    plan = plan_batches(12, 1, None)
    still = AugmentSettings(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=False)
    expected = train_batches(index_of(good), plan, augment=still)[0]
    found = train_batches(index_of(bad), plan, augment=still, data=data)[0]
    assert torch.equal(found.noise, expected.noise)
    ids = found.ids.tolist()
    assert ids == expected.ids.tolist()
    for row, number in enumerate(ids):
        shown = {4: 6, 5: 6, 11: 0}.get(number, number)
        assert found.labels[row] == shown
        assert torch.equal(found.images[row], decode(png(shown), 1)[:, :8, :8])
    names = [name.partition(" (")[0].removeprefix(f"{bad}: ") for name in found.bad]
    assert sorted(names) == ["11.png", "4.png", "5.png", "5.png"]  # 5 as itself and as the neighbour of 4


def test_substitutes_are_the_same_for_any_workers_threads_and_processes_s01_s02(
    write_tar: Callable[..., Path], index_of: Callable[..., ShardIndex]
) -> None:
    index = index_of(bad_set(write_tar, 2, 3, 8)[1])
    data = replace(DATA, max_bad_samples=3, views_per_image=2)
    alone = train_batches(index, data=data)
    expected = [alone[step] for step in range(4)]
    for workers, threads in ((0, 1), (2, 1), (1, 3)):
        for left, right in zip(
            load(train_batches(index, data=replace(data, threads=threads)), range(4), workers), expected, strict=True
        ):
            assert_equal(left, right)
    ranks = [train_batches(index, plan_batches(8, 4, None), rank, data=data) for rank in range(4)]
    for step in range(4):
        assert_equal(joined([rank[step] for rank in ranks]), expected[step])


def test_with_too_many_bad_neighbours_all_that_were_met_are_named_s01(
    write_tar: Callable[..., Path], index_of: Callable[..., ShardIndex]
) -> None:
    """One more than allowed, so the run stops."""
    _, bad = bad_set(write_tar, 6, 7, 8)
    batches = train_batches(index_of(bad), plan_batches(12, 1, None), data=replace(DATA, max_bad_samples=2))
    batch = batches[0]
    row = batch.ids.tolist().index(6)
    assert batch.images[row].max() == 0
    assert batch.labels[row] == 6
    assert {name.partition(" (")[0] for name in batch.bad} == {f"{bad}: {n}.png" for n in (6, 7, 8)}


def test_any_number_of_bad_images_may_be_allowed_s01(
    write_tar: Callable[..., Path], index_of: Callable[..., ShardIndex]
) -> None:
    index = index_of(bad_set(write_tar, *range(1, 12))[1])
    batch = train_batches(index, plan_batches(12, 1, None), data=replace(DATA, max_bad_samples=10**12))[0]
    assert batch.labels.tolist() == [0] * 12
    assert all(image.max() > 0 for image in batch.images)


@pytest.mark.parametrize("keep_decoded", [False, True], ids=["read", "kept"])
@pytest.mark.parametrize("workers", [0, 2])
def test_lost_data_are_named_however_many_bad_images_are_allowed_d12(
    make_shards: Callable[..., Path], index_of: Callable[..., ShardIndex], keep_decoded: bool, workers: int
) -> None:
    folder = make_shards([10, 13])
    index = index_of(folder)
    path, offset = folder / "train-000001.tar", int(index.records["offset"][17])
    with path.open("r+b") as file:
        file.seek(offset + 70)
        file.write(b"\xa5")
    data = replace(DATA, max_bad_samples=100, keep_decoded=keep_decoded)
    batches = list(load(train_batches(index, data=data), range(4), workers))
    (first, *_) = (batch for batch in batches if batch.lost)
    assert 17 in first.ids.tolist()
    assert first.lost.startswith(f"{path}: 000017.png (its crc32 is ")
    assert all(batch.bad == [] for batch in batches)
    assert all(batch.lost or 17 not in batch.ids.tolist() for batch in batches)


def test_after_a_loss_a_worker_reads_no_more_d13(
    make_shards: Callable[..., Path], index_of: Callable[..., ShardIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each image of a store that is gone would be waited for in vain."""
    folder = make_shards([10, 13])
    batches = train_batches(index_of(folder))
    monkeypatch.setattr(reader, "_SECONDS_BEFORE_RETRIES", (0.0,))
    for path in folder.iterdir():
        path.unlink()
    lost = batches[0].lost
    assert re.fullmatch(rf"{folder}/train-00000\d\.tar: the image at byte \d+ \(the shard cannot be read: .*\)", lost)
    monkeypatch.setattr(ImageReader, "read", None)
    assert [batches[step].lost for step in (1, 2)] == [lost, lost]


def test_a_batch_larger_than_the_data_is_refused_d16(index: ShardIndex) -> None:
    with pytest.raises(
        UserError, match="24 but the data have 23 samples; allowed: 2 to 22, for example --batch_size 22"
    ):
        train_batches(index, plan_batches(24, 2, None))
    with pytest.raises(UserError, match="batch_size is 8 but the data have 5 samples"):
        train_batches(index, subset=np.arange(5))
    with pytest.raises(UserError, match=r"allowed: 3 to 21, for example --batch_size 21$"):
        train_batches(index, plan_batches(24, 1, None), data=DataSettings(views_per_image=3))
    with pytest.raises(UserError, match=r"must be 32 at least \(processes x views of an image\)"):
        train_batches(index, plan_batches(32, 32, None))


def test_rand_augment_of_other_than_gray_or_rgb_is_refused_at_the_start(index: ShardIndex) -> None:
    four = DataSettings(channels=4, image_size=(8,))
    with pytest.raises(UserError, match=r"augment\.rand_augment is rand-m9-.* but the images have 4 channels.* none$"):
        train_batches(index, data=four)
    assert train_batches(index, data=four, augment=AugmentSettings())[0].images.shape == (8, 4, 8, 8)


@pytest.mark.parametrize("lengths", [[23], [1] * 23, [1, 19, 2, 1]], ids=["one-shard", "d15-of-one", "d15-uneven"])
def test_shards_of_any_number_and_length_are_dealt_evenly_d14_d15(
    make_shards: Callable[..., Path], index_of: Callable[..., ShardIndex], lengths: list[int]
) -> None:
    """Eight ranks of one shard: each sample exactly once, and as many steps for all."""
    index, plan = index_of(make_shards(lengths)), plan_batches(8, 8, None)
    ranks = [train_batches(index, plan, rank, augment=AugmentSettings()) for rank in range(8)]
    ids = [rank[step].ids.item() for step in range(COUNT) for rank in ranks]
    assert [sorted(ids[start : start + COUNT]) for start in range(0, 8 * COUNT, COUNT)] == [list(range(COUNT))] * 8


def test_rectangular_images_are_height_then_width(index: ShardIndex) -> None:
    data = DataSettings(channels=3, image_size=(8, 12))
    assert train_batches(index, data=data)[0].images.shape == (8, 3, 8, 12)
