"""Two ranks without a launcher: forked from the test, so that they start in an instant."""

import faulthandler
import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import results_of

from mae.errors import UserError


def on_rank(rank: int, port: int, work: Callable[[], Any], results: "multiprocessing.Queue[tuple[int, Any]]") -> None:
    """Put what `work` returns on this rank, or the text of its `UserError`, into `results`."""
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    faulthandler.enable()  # where a rank crashed is told with the output of its test
    # The test's own process has been a world of one.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        results.put((rank, work()))
    except UserError as error:
        results.put((rank, f"error: {error}"))
    except Exception as error:
        results.put((rank, f"{type(error).__name__}: {error}"))
    PartialState().destroy_process_group()


@pytest.fixture
def on_two_ranks() -> Callable[[Callable[[], Any]], list[Any]]:
    """A function that does some work on two ranks at once and gives what each returned, or why it stopped."""

    def run(work: Callable[[], Any]) -> list[Any]:
        context = multiprocessing.get_context("fork")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        results = context.Queue()
        ranks = [context.Process(target=on_rank, args=(rank, port, work, results)) for rank in range(2)]
        for rank in ranks:
            rank.start()
        found = dict(results_of(ranks, results))
        return [found[0], found[1]]

    return run
