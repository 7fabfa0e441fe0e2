"""Choice of a learning rate."""

import math
from collections.abc import Callable

import pytest

from mae.evaluation.protocols.learning_rate import choose_rate


def peak_at(best: float) -> Callable[[float], float]:
    """An accuracy that falls with the distance of the rate from the best."""
    return lambda rate: 1 / (1 + abs(math.log(rate / best)))


@pytest.mark.parametrize(
    ("best", "chosen", "tried", "remark"),
    [
        (0.01, 0.01, [0.003, 0.01, 0.03], None),
        (0.09, 0.09, [0.003, 0.01, 0.03, 0.09, 0.27], None),
        (0.001, 0.001, [0.00033, 0.001, 0.003, 0.01, 0.03], None),
        (1e9, 0.81, [0.003, 0.01, 0.03, 0.09, 0.27, 0.81], "chosen learning rate is the largest tried"),
        (1e-9, 0.00011, [0.00011, 0.00033, 0.001, 0.003, 0.01, 0.03], "chosen learning rate is the smallest tried"),
    ],
)
def test_rates_beyond_the_edge_are_tried(best: float, chosen: float, tried: list[float], remark: str | None) -> None:
    found = choose_rate((0.003, 0.01, 0.03), peak_at(best))
    assert (found.rate, list(found.tried), found.remark) == (chosen, tried, remark)
    assert found.accuracy == found.tried[chosen] == max(found.tried.values())


def test_of_equal_rates_the_middle_one_is_taken() -> None:
    found = choose_rate((0.1, 1.0, 10.0), lambda rate: float(rate < 5))
    assert (found.rate, found.remark) == (1.0, None)


@pytest.mark.parametrize(
    ("accuracy", "chosen", "tried"),
    [(1.0, 1.0, [0.1, 1.0, 10.0]), (0.5, 30.0, [0.1, 1.0, 10.0, 30.0, 90.0, 270.0])],
)
def test_rates_that_do_not_differ_are_told_and_larger_ones_tried(
    accuracy: float, chosen: float, tried: list[float]
) -> None:
    found = choose_rate((1.0, 0.1, 10.0), lambda rate: accuracy)
    assert (found.rate, list(found.tried)) == (chosen, tried)
    assert found.remark == f"all {len(tried)} learning rates that were tried are equally good on held-out samples"


def test_small_rates_that_learn_nothing_give_way_to_larger_ones() -> None:
    found = choose_rate((0.003, 0.01, 0.03), lambda rate: 0.9 if 0.1 < rate < 0.5 else 0.1)
    assert (found.rate, found.remark) == (0.27, None)


def test_a_single_rate_is_only_measured() -> None:
    assert choose_rate((0.1,), lambda rate: 0.5) == (0.1, 0.5, {0.1: 0.5})
    assert choose_rate((0.1,), lambda rate: 0.5).remark is None
