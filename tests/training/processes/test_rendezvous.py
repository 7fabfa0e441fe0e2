"""The ranks of a start find each other, and nothing that earlier starts have left in the store."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from torch import distributed
from torch.distributed import DistStoreError, HashStore, Store

from mae.training.processes.accelerator import start_accelerator
from mae.training.processes.rendezvous import _agree, start_word


def start(store: Store, ranks: int, late: int | None = None) -> set[str]:
    """The words that the ranks agree on."""

    def agree(rank: int) -> str:
        time.sleep(0.3 if rank == late else 0.0)
        return _agree(store, rank, ranks, timedelta(seconds=20))

    with ThreadPoolExecutor(ranks) as pool:
        return set(pool.map(agree, range(ranks)))


@pytest.mark.parametrize("late", [0, 1, 2])
def test_r02_each_start_has_a_word_of_its_own_whoever_comes_last(late: int) -> None:
    store = HashStore()
    words = [start(store, ranks=3, late=late) for _ in range(4)]
    assert [len(word) for word in words] == [1] * 4
    assert len(set.union(*words)) == 4


@pytest.mark.parametrize("is_there", [0, 1])
def test_r02_a_start_that_was_broken_off_leaves_nothing_behind(is_there: int) -> None:
    store = HashStore()
    with pytest.raises(DistStoreError):
        _agree(store, is_there, 2, timedelta(seconds=0.2))
    assert len(start(store, ranks=2)) == 1
    assert len(start(store, ranks=3)) == 1


def test_ranks_that_do_not_come_are_named() -> None:
    store = HashStore()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(_agree, store, 2, 4, timedelta(seconds=5))
        with pytest.raises(DistStoreError, match=r"^ranks 1, 3 have not come within 0\.5 s$"):
            _agree(store, 0, 4, timedelta(seconds=0.5))


def test_without_a_launcher_rank_zero_has_a_store_that_is_always_new(
    on_two_ranks: Callable[[Callable[[], Any]], list[Any]],
) -> None:
    def meet() -> tuple[int, str]:
        return start_accelerator("fp32").num_processes, start_word()

    assert on_two_ranks(meet) == [(2, ""), (2, "")]


@pytest.mark.parametrize("timeout", [600.0, 60.0])
def test_the_timeout_reaches_the_collectives(
    timeout: float, on_two_ranks: Callable[[Callable[[], Any]], list[Any]]
) -> None:
    """Accelerate does not pass 600 s on."""

    def meet() -> float:
        device = start_accelerator("fp32", timeout).device
        group = distributed.group.WORLD
        assert group is not None
        seconds: float = group._get_backend(device).options._timeout.total_seconds()
        return round(seconds, 3)

    assert on_two_ranks(meet) == [timeout, timeout]
