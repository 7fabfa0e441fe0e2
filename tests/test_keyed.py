import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mae import keyed
from mae.keyed import Purpose

BASE = keyed.key(Purpose.CROP, 0, 0)
# Kolmogorov-Smirnov: sqrt(n) times the greatest distance is below the first for half of all uniform samples,
# and below the second for 95 of 100.
KS_MEDIAN, KS_95 = 0.8276, 1.3581


def ks_distance(numbers: np.ndarray) -> float:
    """sqrt(n) times the greatest distance between the numbers' distribution and the uniform one."""
    ordered, steps = np.sort(numbers.ravel()), np.arange(numbers.size + 1) / numbers.size
    return float(max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max()) * numbers.size**0.5)


def test_mix_is_the_output_function_of_splitmix64() -> None:
    """The first three outputs of the reference implementation (Vigna, splitmix64.c) seeded with 0."""
    states = np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert keyed.mix(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_one_flipped_input_bit_flips_about_half_of_the_output_bits() -> None:
    words = keyed.bits(BASE, np.arange(1000), 1)[:, 0]
    for bit in range(64):
        changed = keyed.mix(words) ^ keyed.mix(words ^ np.uint64(1 << bit))
        flipped = np.unpackbits(changed.view(np.uint8)).mean()
        assert 0.48 < flipped < 0.52


@settings(max_examples=30, deadline=None)
@given(ids=st.lists(st.integers(0, 2**40), min_size=1, max_size=20), count=st.integers(1, 5))
def test_the_numbers_of_an_id_do_not_depend_on_the_other_ids_or_the_count(ids: list[int], count: int) -> None:
    together = keyed.bits(BASE, np.array(ids), count)
    assert together.shape == (len(ids), count)
    for row, number in enumerate(ids):
        alone = keyed.bits(BASE, np.array([number]), count + 3)
        assert alone[0, :count].tolist() == together[row].tolist()


def test_every_purpose_and_every_part_of_a_key_selects_other_numbers() -> None:
    parts = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1), (0, 0, 0), (-1,), (2**63,)]
    keys = {int(keyed.key(purpose, *these)) for purpose in Purpose for these in parts}
    assert len(keys) == len(Purpose) * len(parts)
    rows = {tuple(keyed.bits(np.uint64(base), np.arange(3), 2).ravel().tolist()) for base in keys}
    assert len(rows) == len(keys)


def test_a_key_is_the_same_each_time() -> None:
    assert keyed.key(Purpose.MASK, 3, 4) == keyed.key(Purpose.MASK, 3, 4)


def test_the_purposes_keep_their_numbers() -> None:
    """A renumbered purpose would change every crop, mask and order of a resumed run."""
    assert {p.name: p.value for p in Purpose} == {
        "ORDER": 1, "CROP": 2, "MASK": 3, "STEP": 4, "LABELS": 5, "AUGMENT": 6, "PACK": 7, "PICTURE": 8,
        "STREAM": 9, "BASELINE": 10, "HELD_OUT": 11, "FEW_SHOT": 12, "EVALUATION": 13, "ERASE": 14,
    }  # fmt: skip


@pytest.mark.parametrize("draw", [keyed.uniform, keyed.uniform_float32])
@pytest.mark.parametrize(("ids", "count"), [(100_000, 1), (1000, 100), (1, 100_000)])
def test_numbers_are_uniform_over_ids_and_over_counts(draw, ids: int, count: int) -> None:
    """Under 40 keys the distances are as great as chance makes them: not greater, and not smaller either."""
    keys = [keyed.key(purpose, 0, epoch) for purpose in (Purpose.CROP, Purpose.MASK) for epoch in range(20)]
    distances = np.array([ks_distance(draw(base, np.arange(ids), count)) for base in keys])
    assert (distances > KS_95).sum() <= 6  # of 40; expected: 2
    assert 10 <= (distances > KS_MEDIAN).sum() <= 30


def test_numbers_of_neighbouring_ids_epochs_and_places_are_uncorrelated() -> None:
    numbers = keyed.uniform(BASE, np.arange(1001), 101)
    next_epoch = keyed.uniform(keyed.key(Purpose.CROP, 0, 1), np.arange(1001), 101)
    for left, right in [
        (numbers[1:], numbers[:-1]),
        (numbers[:, 1:], numbers[:, :-1]),
        (numbers, next_epoch),
    ]:
        # The correlation of n independent pairs has a standard deviation of 1 / sqrt(n); allow four.
        assert abs(np.corrcoef(left.ravel(), right.ravel())[0, 1]) < 4 / left.size**0.5


@pytest.mark.parametrize(("draw", "places"), [(keyed.uniform, 53), (keyed.uniform_float32, 24)])
def test_numbers_are_exact_multiples_below_one(draw, places: int) -> None:
    numbers = draw(BASE, np.arange(100_000), 1).astype(np.float64)
    scaled = numbers * 2.0**places
    assert (scaled == np.floor(scaled)).all()
    assert (scaled % 2 == 1).any()
    assert numbers.min() >= 0
    assert numbers.max() < 1


@pytest.mark.parametrize("draw", [keyed.uniform, keyed.uniform_float32])
def test_even_the_greatest_word_stays_below_one(draw, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyed, "bits", lambda *_: np.full((1, 1), 2**64 - 1, dtype=np.uint64))
    assert 0.9999999 < draw(BASE, np.arange(1), 1)[0, 0] < 1


def test_float32_noise_has_almost_no_ties() -> None:
    """The mask is the order of a sample's noise: two equal numbers would leave it to the sort."""
    noise = keyed.uniform_float32(keyed.key(Purpose.MASK, 0, 0), np.arange(1000), 196)
    ties = sum(196 - len(np.unique(row)) for row in noise)
    assert ties < 5  # expected: 1000 * 196**2 / 2 / 2**24 = 1.1
