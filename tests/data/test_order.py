"""The order of training: each sample once an epoch, the same wherever and however it is computed."""

import hashlib
import os
import subprocess
import sys
import time
import tracemalloc
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mae.data.order import ORDER_VERSION, Order, invert, permute
from mae.data.plan import BatchPlan

COUNTS = [1, 2, 3, 4, 5, 7, 13, 15, 16, 17, 63, 64, 65, 97, 255, 256, 257, 1023, 1024, 1025, 4093, 4097]
WHOLE = {"count": 60_000, "batch": 256}
LANED = {"count": 60_001, "batch": 250, "chunk": 16, "window": 4, "lanes": 16}
# sha256 of the first 10,000 ids (little-endian int64) of seed 0: of a set permuted as a whole, and of one in lanes.
GOLDEN = {
    2: (
        "5a38117ff9dff20bfbe8a632523273efb53b73e2a31bc72a776cf4ad6a9d914a",
        "b0691d7ff8b915b8f9c290cfed21dc87e99c06d46813557d9d1e1a3abac4b821",
    )
}


def order(**other: Any) -> Order:
    """A small set in lanes: 16 windows, most of them of 12 samples."""
    return Order(**{"seed": 0, "count": 187, "batch": 10, "chunk": 3, "window": 4, "lanes": 4} | other)


def digest(stream: Order, stop: int) -> str:
    return hashlib.sha256(stream.at(0, stop)[0].astype("<i8").tobytes()).hexdigest()


def assert_permutation(ids: np.ndarray, count: int) -> None:
    assert np.sort(ids).tolist() == list(range(count))


def permuted(places: np.ndarray, count: int, base: int) -> np.ndarray:
    return permute(places, np.array(count), np.array(base, dtype=np.uint64))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("base", [0, 1, 2**64 - 1])
def test_permute_is_a_bijection_of_the_range(count: int, base: int) -> None:
    assert_permutation(permuted(np.arange(count), count, base), count)


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 3000), base=st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection_for_any_count_and_key(count: int, base: int) -> None:
    assert_permutation(permuted(np.arange(count), count, base), count)


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 2**45), base=st.integers(0, 2**64 - 1), data=st.data())
def test_invert_undoes_permute(count: int, base: int, data: st.DataObject) -> None:
    places = np.array(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=20)))
    there = permuted(places, count, base)
    assert 0 <= there.min() <= there.max() < count
    assert invert(there, count, np.uint64(base)).tolist() == places.tolist()
    assert permuted(invert(places, count, np.uint64(base)), count, base).tolist() == places.tolist()


def test_places_of_different_ranges_are_permuted_together_as_alone() -> None:
    counts = np.arange(1, 200)
    bases = np.arange(1, 200, dtype=np.uint64)
    together = permute(counts - 1, counts, bases)
    alone = [int(permuted(np.array([n - 1]), int(n), int(base))[0]) for n, base in zip(counts, bases, strict=True)]
    assert together.tolist() == alone


def test_permute_stays_inside_a_range_of_a_billion() -> None:
    places = np.concatenate([np.arange(1000), np.arange(10**9 - 1000, 10**9)])
    ids = permuted(places, 10**9, 5)
    assert ids.min() >= 0
    assert ids.max() < 10**9
    assert len(np.unique(ids)) == len(places)


SHAPES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "count": st.integers(1, 200),
        "batch": st.integers(1, 40),
        "chunk": st.integers(1, 9),
        "window": st.integers(1, 5),
        "lanes": st.integers(1, 50),
    }
)


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, cuts=st.lists(st.integers(1, 150), min_size=1, max_size=10))
def test_each_sample_occurs_exactly_once_an_epoch_for_any_cut_o03_o05_o06(
    shape: dict[str, int], cuts: list[int]
) -> None:
    stream, count = Order(**shape), shape["count"]
    edges = sorted({0, 3 * count, *(int(c) for c in np.cumsum(cuts) if c < 3 * count)})
    ids, epochs = (np.concatenate(p) for p in zip(*(stream.at(*edge) for edge in pairwise(edges)), strict=True))
    assert epochs.tolist() == [0] * count + [1] * count + [2] * count
    for epoch in range(3):
        assert_permutation(ids[epochs == epoch], count)
    straight, _ = stream.at(0, 3 * count)
    assert ids.tolist() == straight.tolist()


@settings(max_examples=25, deadline=None)
@given(
    shape=SHAPES,
    resumes=st.lists(
        st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 3]), st.integers(1, 3)), max_size=4
    ),
)
def test_any_ranks_and_micro_batches_resumed_in_sequence_give_the_same_batches_o02_o04_o07_o15(
    shape: dict[str, int], resumes: list[tuple[int, int, int]]
) -> None:
    shape |= {"batch": 48}
    stream, step = Order(**shape), 0
    for processes, accumulation, steps in resumes:
        plan = BatchPlan(48, processes, 48 // (processes * accumulation), accumulation)
        for _ in range(steps):
            parts = {
                (rank, micro): stream.at(*plan.positions(step * accumulation + micro, rank))[0].tolist()
                for rank in range(processes)
                for micro in range(accumulation)
            }
            dealt = [n for part in sorted(parts) for n in parts[part]]
            assert dealt == stream.at(step * 48, (step + 1) * 48)[0].tolist()
            step += 1


@pytest.mark.parametrize("shape", [{}, {"count": 48}], ids=["lanes", "whole"])
def test_a_batch_across_the_end_of_an_epoch_goes_on_with_the_next_o06(shape: dict[str, int]) -> None:
    stream = order(**shape)
    count = stream.count
    ids, epochs = stream.at(count - 3, 2 * count + 3)
    whole, _ = stream.at(0, 3 * count)
    assert ids.tolist() == whole[count - 3 : 2 * count + 3].tolist()
    assert epochs.tolist() == [0] * 3 + [1] * count + [2] * 3


@pytest.mark.parametrize("shape", [{}, {"count": 48}], ids=["lanes", "whole"])
def test_any_position_computed_alone_equals_the_stream_o03(shape: dict[str, int]) -> None:
    stream = order(**shape)
    ids, epochs = stream.at(0, 3 * stream.count)
    for position in range(3 * stream.count):
        alone = stream.at(position, position + 1)
        assert (alone[0].tolist(), alone[1].tolist()) == ([ids[position]], [epochs[position]])


def test_no_positions_give_no_ids() -> None:
    ids, epochs = order().at(5, 5)
    assert (ids.shape, epochs.shape) == ((0,), (0,))


def test_a_set_that_fits_into_the_windows_is_permuted_as_a_whole() -> None:
    """Then the batch size does not matter, and one sample more brings lanes."""
    largest = 3 * 4 * 4
    streams = [order(count=largest, batch=batch).at(0, 100)[0].tolist() for batch in (4, 10, 48)]
    assert streams[0] == streams[1] == streams[2]
    assert order(count=largest).horizon == largest
    assert order(count=largest + 1).at(0, 49)[0].tolist() != order(count=largest + 1, batch=4).at(0, 49)[0].tolist()


def test_a_far_position_among_a_billion_samples_is_reached_at_once_with_little_memory() -> None:
    stream = Order(seed=0, count=10**9 + 7, batch=4096)
    tracemalloc.start()
    began = time.perf_counter()
    ids, epochs = stream.at(10**15, 10**15 + 4096)
    assert time.perf_counter() - began < 5
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    assert len(set(ids.tolist())) == 4096
    assert (ids.min() >= 0, ids.max() < stream.count) == (True, True)
    assert epochs.tolist() == [10**15 // stream.count] * 4096


@pytest.mark.parametrize("shape", [{}, {"count": 48}], ids=["lanes", "whole"])
def test_other_seeds_and_epochs_give_other_orders_o11(shape: dict[str, int]) -> None:
    streams = [order(seed=seed, **shape) for seed in range(5)]
    orders = {tuple(epoch) for s in streams for epoch in s.at(0, 5 * s.count)[0].reshape(5, s.count).tolist()}
    assert len(orders) == 25


@pytest.mark.parametrize(
    ("shape", "expected"), [(WHOLE | {"count": 4096}, 1), (LANED | {"count": 4096}, 15)], ids=["whole", "lanes"]
)
def test_neighbours_of_one_epoch_are_no_neighbours_of_the_next(shape: dict[str, int], expected: int) -> None:
    """Each id stands next to its predecessor with chance 1/n, or in lanes 1/window for those of its chunk."""
    stream = Order(seed=0, **shape)
    pairs = [set(pairwise(stream.at(e * 4096, (e + 1) * 4096)[0].tolist())) for e in range(2)]
    assert len(pairs[0] & pairs[1]) < 3 * expected + 7


@pytest.mark.parametrize(
    "shape",
    [{"count": 10}, {"count": 12, "batch": 4, "chunk": 1, "window": 1, "lanes": 2}],
    ids=["whole", "lanes"],
)
def test_every_id_is_equally_likely_at_every_place(shape: dict[str, int]) -> None:
    """Chi-square over 500 seeds; with chunks of one sample nothing but the permutation of chunks is seen."""
    seeds, count = 500, shape["count"]
    ids = np.stack([order(seed=seed, **shape).at(0, count)[0] for seed in range(seeds)])
    seen = np.stack([np.bincount(ids[:, place], minlength=count) for place in range(count)])
    expected = seeds / count
    chi_square = ((seen - expected) ** 2 / expected).sum()
    freedom = (count - 1) ** 2
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


def test_every_sample_of_a_set_in_lanes_is_equally_likely_to_come_first() -> None:
    """Over 800 seeds of 60 samples in chunks of 3; the last chunk holds one sample only."""
    shape = {"count": 61, "batch": 5, "chunk": 3, "window": 2, "lanes": 5}
    first = [int(order(seed=seed, **shape).at(0, 1)[0][0]) for seed in range(800)]
    seen, expected = np.bincount(first, minlength=61), 800 / 61
    assert abs(((seen - expected) ** 2 / expected).sum() - 60) < 5 * np.sqrt(2 * 60)


def test_the_whole_permutation_moves_each_sample_a_third_of_the_set() -> None:
    """The mean distance between two places drawn at random is n / 3."""
    ids, _ = Order(seed=3, **WHOLE).at(0, 60_000)
    moved = np.abs(ids - np.arange(60_000)).mean()
    assert moved == pytest.approx(20_000, rel=0.02)


def test_batches_of_a_set_in_lanes_mix_chunks_from_all_over_the_set() -> None:
    """A batch of 256 from 16,384 chunks of 64: by chance 254 chunks, evenly over every sixteenth of the set."""
    stream = Order(seed=0, count=1 << 20, batch=256)
    for step in (0, 1, 17, 2000):
        ids, _ = stream.at(step * 256, (step + 1) * 256)
        assert len(np.unique(ids // 64)) > 220
        sixteenths = np.bincount(ids >> 16, minlength=16)
        assert ((sixteenths - 16) ** 2 / 16).sum() < 50  # 15 degrees of freedom: mean 15, standard deviation 5.5
    one, other = (set((stream.at(s * 256, (s + 1) * 256)[0] // 64).tolist()) for s in (3, 4))
    assert len(one & other) > 30  # a window's chunks are drawn from by many batches, and so are read once


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_a_rank_touches_few_chunks_at_a_time(processes: int) -> None:
    """Within one window a rank reads its lanes' windows, and at most one chunk more of each for a shifted border."""
    shape = {"count": 100_003, "batch": 64, "chunk": 8, "window": 4, "lanes": 16}
    stream, plan = Order(seed=0, **shape), BatchPlan(64, processes, 64 // processes, 1)
    steps = stream.horizon // 64
    for window in (0, 3, 7):
        for rank in range(processes):
            rows = [plan.positions(step, rank) for step in range(window * steps, (window + 1) * steps)]
            touched = {n // 8 for row in rows for n in stream.at(*row)[0].tolist()}
            assert len(touched) <= 16 // processes * (4 + 1)


@pytest.mark.parametrize("batch", [1, 3, 5, 7, 16, 64])
def test_a_batch_smaller_than_the_lanes_has_one_lane_a_row(batch: int) -> None:
    stream = order(count=5000, batch=batch, lanes=64, chunk=2, window=2)
    assert_permutation(stream.at(5000, 10_000)[0], 5000)


def test_order_is_the_same_in_a_new_process_with_another_hash_seed_o11() -> None:
    program = (
        "import hashlib; from mae.data.order import Order; "
        f"o = [Order(seed=7, **shape).at(0, 3000)[0] for shape in {[WHOLE, LANED]}]; "
        "print(*(hashlib.sha256(ids.astype('<i8').tobytes()).hexdigest() for ids in o))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [digest(Order(seed=7, **shape), 3000) for shape in (WHOLE, LANED)]


def test_the_order_changes_only_with_its_version_o12() -> None:
    """A run resumes under the order it was started with: a new order needs a new ORDER_VERSION and line here."""
    assert tuple(digest(Order(seed=0, **shape), 10_000) for shape in (WHOLE, LANED)) == GOLDEN[ORDER_VERSION]
