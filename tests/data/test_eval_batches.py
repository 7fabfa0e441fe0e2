"""Evaluation batches hold every sample once; labelled subsets are chosen by the seed."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import png

from mae.data.eval_batches import EvalBatches, labelled_subset
from mae.data.images.augment import eval_view
from mae.data.images.decode import decode
from mae.data.index import ShardIndex
from mae.data.loader import load
from mae.data.settings import DataSettings
from mae.errors import UserError

DATA = DataSettings(channels=1, image_size=(8,))
COUNT = 23


def test_a_bad_image_is_named_in_evaluation_too_s01(
    write_tar: Callable[..., Path], index_of: Callable[..., ShardIndex]
) -> None:
    path = write_tar("x.tar", {"a.png": png(0), "b.png": b"x"})
    (batch,) = load(EvalBatches(index_of(path), 2, DATA), range(1), 0)
    assert batch.images[0].max() > 0
    assert batch.images[1].max() == 0
    assert batch.bad[0].startswith(f"{path}: b.png (")


@pytest.mark.parametrize(
    ("processes", "batch_size", "workers"), [(1, 23, 0), (1, 4, 1), (3, 4, 0), (3, 100, 0), (24, 4, 0)]
)
def test_evaluation_sees_every_sample_exactly_once_over_all_ranks_r12(
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


def test_rectangular_images_are_height_then_width(index: ShardIndex) -> None:
    data = DataSettings(channels=3, image_size=(8, 12))
    assert EvalBatches(index, 4, data)[0].images.shape == (4, 3, 8, 12)


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
    with pytest.raises(UserError, match="class 3 has 5 samples, but labels_per_class is 6; allowed: 1 to 5, or None"):
        labelled_subset(index, 6, 0)
