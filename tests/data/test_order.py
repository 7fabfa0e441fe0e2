import hashlib
import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mae.data.order import ORDER_VERSION, permute, sample_ids

COUNTS = [1, 2, 3, 4, 5, 7, 13, 15, 16, 17, 63, 64, 65, 97, 255, 256, 257, 1023, 1024, 1025, 4093, 4097]
# sha256 of the first 10,000 ids (little-endian int64) of seed 0 over 60,000 samples.
GOLDEN = {1: "a0d32405e642ac02766435032f2a33b226016fec2a4ed0e21209199f8f70fafb"}


def digest(seed: int, count: int, stop: int) -> str:
    ids, _ = sample_ids(seed, count, 0, stop)
    return hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()


def assert_permutation(ids: np.ndarray, count: int) -> None:
    assert np.sort(ids).tolist() == list(range(count))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("base", [0, 1, 2**64 - 1])
def test_permute_is_a_bijection_of_the_range(count: int, base: int) -> None:
    assert_permutation(permute(np.arange(count), count, np.uint64(base)), count)


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 3000), base=st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection_for_any_count_and_key(count: int, base: int) -> None:
    assert_permutation(permute(np.arange(count), count, np.uint64(base)), count)


def test_permute_stays_inside_a_range_of_a_billion() -> None:
    places = np.concatenate([np.arange(1000), np.arange(10**9 - 1000, 10**9)])
    ids = permute(places, 10**9, np.uint64(5))
    assert ids.min() >= 0
    assert ids.max() < 10**9
    assert len(np.unique(ids)) == len(places)


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 200),
    seed=st.integers(0, 2**31),
    cuts=st.lists(st.integers(1, 150), min_size=1, max_size=10),
)
def test_each_sample_occurs_exactly_once_an_epoch_for_any_batch_cut(count: int, seed: int, cuts: list[int]) -> None:
    edges = sorted({0, 3 * count, *(int(c) for c in np.cumsum(cuts) if c < 3 * count)})
    batches = [sample_ids(seed, count, start, stop) for start, stop in pairwise(edges)]
    ids, epochs = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    assert epochs.tolist() == [0] * count + [1] * count + [2] * count
    for epoch in range(3):
        assert_permutation(ids[epochs == epoch], count)


def test_a_batch_across_the_end_of_an_epoch_goes_on_with_the_next() -> None:
    ids, epochs = sample_ids(0, 10, 7, 23)
    stream, _ = sample_ids(0, 10, 0, 30)
    assert ids.tolist() == stream[7:23].tolist()
    assert epochs.tolist() == [0] * 3 + [1] * 10 + [2] * 3


def test_any_position_computed_alone_equals_the_stream() -> None:
    stream, epochs = sample_ids(3, 37, 0, 37 * 4)
    for position in range(37 * 4):
        alone = sample_ids(3, 37, position, position + 1)
        assert (alone[0].tolist(), alone[1].tolist()) == ([stream[position]], [epochs[position]])


def test_a_far_position_is_reached_directly() -> None:
    ids, epochs = sample_ids(0, 1_281_167, 10**15, 10**15 + 4)
    assert len(set(ids.tolist())) == 4
    assert epochs.tolist() == [10**15 // 1_281_167] * 4


def test_no_positions_give_no_ids() -> None:
    ids, epochs = sample_ids(0, 10, 5, 5)
    assert (ids.shape, epochs.shape) == ((0,), (0,))


def test_other_seeds_and_epochs_give_other_orders() -> None:
    streams = [sample_ids(seed, 50, 0, 5 * 50)[0].reshape(5, 50) for seed in range(5)]
    orders = {tuple(epoch) for stream in streams for epoch in stream.tolist()}
    assert len(orders) == 25


def test_neighbours_of_one_epoch_are_no_neighbours_of_the_next() -> None:
    """Each id stands next to its predecessor with chance 1/n only, so the batches of two epochs differ."""
    count = 4096
    pairs = [set(pairwise(sample_ids(0, count, e * count, (e + 1) * count)[0].tolist())) for e in range(2)]
    assert len(pairs[0] & pairs[1]) < 10  # expected: 1


def test_every_id_is_equally_likely_at_every_place() -> None:
    """Chi-square over 1,000 epochs of 10 samples."""
    count, epochs = 10, 1000
    ids = sample_ids(1, count, 0, count * epochs)[0].reshape(epochs, count)
    seen = np.stack([np.bincount(ids[:, place], minlength=count) for place in range(count)])
    expected = epochs / count
    chi_square = ((seen - expected) ** 2 / expected).sum()
    assert 40 < chi_square < 140  # 81 degrees of freedom: mean 81, standard deviation 12.7


def test_order_is_the_same_in_a_new_process_with_another_hash_seed() -> None:
    program = (
        "import hashlib; from mae.data.order import sample_ids; "
        "print(hashlib.sha256(sample_ids(7, 1000, 0, 3000)[0].astype('<i8').tobytes()).hexdigest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == digest(7, 1000, 3000)


def test_the_order_changes_only_with_its_version() -> None:
    """A run resumes under the order it was started with: a new order needs a new ORDER_VERSION and line here."""
    assert digest(0, 60_000, 10_000) == GOLDEN[ORDER_VERSION]
