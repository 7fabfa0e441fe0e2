"""Two ranks without a launcher: forked from a server that has imported what they need, so that they start at once."""

import faulthandler
import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing import forkserver
from typing import Any

import pytest
from accelerate.state import PartialState
from conftest import results_of

from mae.errors import UserError

# The checks of shapes are set up before mae is imported. Where the first is not found from the current folder, the
# ranks import all of it themselves.
PRELOADED = ["tests.conftest", "accelerate", "mae.training.loop"]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the server before any test does, which would leave imports to the ranks."""
    if any("on_two_ranks" in getattr(item, "fixturenames", ()) for item in session.items):
        multiprocessing.set_forkserver_preload(PRELOADED)
        forkserver.ensure_running()


def on_rank(
    rank: int, environment: dict[str, str], work: Callable[[], Any], results: "multiprocessing.Queue[tuple[int, Any]]"
) -> None:
    """Put what `work` returns on this rank, or the text of its `UserError`, into `results`."""
    os.environ.clear()
    os.environ |= environment | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
    faulthandler.enable()  # where a rank crashed is told with the output of its test
    try:
        results.put((rank, work()))
    except UserError as error:
        results.put((rank, f"error: {error}"))
    except Exception as error:
        results.put((rank, f"{type(error).__name__}: {error}"))
    PartialState().destroy_process_group()


@pytest.fixture
def on_two_ranks() -> Callable[[Callable[[], Any]], list[Any]]:
    """A function that does some work on two ranks at once and gives what each returned, or why it stopped.

    The ranks know nothing of what a test has replaced in its own process, but have its environment. They are not forked
    from it: it has threads, and objects of torch whose threads would be missing in them, so that they might crash.
    """
    context = multiprocessing.get_context("forkserver")

    def run(work: Callable[[], Any]) -> list[Any]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = dict(os.environ) | {
            "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"
        }  # fmt: skip
        results = context.Queue()
        arguments = environment, work, results
        ranks = [context.Process(target=on_rank, args=(rank, *arguments)) for rank in range(2)]
        for rank in ranks:
            rank.start()
        found = dict(results_of(ranks, results))
        return [found[0], found[1]]

    return run
