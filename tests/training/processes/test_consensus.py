"""All ranks get the greatest numbers that any of them has submitted."""

import os
import time
from collections.abc import Callable
from typing import Any

import pytest

from mae.training.processes.accelerator import start_accelerator
from mae.training.processes.consensus import RankConsensus


def test_p02_each_place_gets_the_greatest_number_of_all_ranks(
    on_two_ranks: Callable[[Callable[[], Any]], list[Any]],
) -> None:
    def submit() -> list[list[int]]:
        rank = int(os.environ["RANK"])
        consensus = RankConsensus(start_accelerator("fp32"), 20.0)
        results = []
        for step in range(50):
            consensus.submit(rank * step, 1 - rank, 2**40)
            results.append(consensus.maximum())
        return results

    expected = [[step, 1, 2**40] for step in range(50)]
    assert on_two_ranks(submit) == [expected, expected]


def test_one_rank_gets_its_own_numbers() -> None:
    consensus = RankConsensus(start_accelerator("fp32"), 20.0)
    consensus.submit(3, 0)
    assert consensus.maximum() == [3, 0]


def test_numbers_are_submitted_without_waiting_for_the_others(
    on_two_ranks: Callable[[Callable[[], Any]], list[Any]],
) -> None:
    def submit() -> tuple[float, list[int]]:
        consensus = RankConsensus(start_accelerator("fp32"), 20.0)
        consensus.submit(0)
        consensus.maximum()
        if os.environ["RANK"] == "1":
            time.sleep(0.5)
        began = time.perf_counter()
        consensus.submit(1)
        seconds = time.perf_counter() - began
        return seconds, consensus.maximum()

    for seconds, result in on_two_ranks(submit):
        assert seconds < 0.4
        assert result == [1]


def test_r03_waiting_for_another_rank_ends_by_the_timeout(
    on_two_ranks: Callable[[Callable[[], Any]], list[Any]],
) -> None:
    def submit() -> float:
        consensus = RankConsensus(start_accelerator("fp32"), 1.0)
        began = time.perf_counter()
        if os.environ["RANK"] == "1":
            time.sleep(3)
            return 0.0
        consensus.submit(1)
        with pytest.raises(RuntimeError, match="Timed out waiting 1000ms"):
            consensus.maximum()
        return time.perf_counter() - began

    assert 0.9 < on_two_ranks(submit)[0] < 2.9
