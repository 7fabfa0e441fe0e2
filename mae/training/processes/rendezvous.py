"""Rendezvous of the processes of one start, in a part of the launcher's store that no earlier start has used.

torchrun keeps one store over all restarts of a job, and torch 2.15 reads it as if it were new (pytorch #135712): after
a restart, a process may find the addresses of processes that are gone. The number of the restart does not help,
because on several machines each launcher counts its own restarts.
"""

import os
import time
from collections.abc import Iterator
from datetime import timedelta
from uuid import uuid4

from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import DistStoreError
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

INIT_METHOD = "mae-start://"
"""Value for `init_process_group`: `env://`, apart from what earlier starts have left in the store."""

_POLL_SECONDS = 0.05

_start = ""


def start_word() -> str:
    """Return a word that only the processes of this start share; empty until they have met."""
    return _start


def has_launchers_store() -> bool:
    """Return whether the launcher keeps the store, so that it exists before the processes meet and after they end."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _meet(url: str, timeout: timedelta) -> Iterator[tuple[Store, int, int]]:
    global _start  # noqa: PLW0603 - a process is started once
    for store, rank, ranks in rendezvous(url.replace("mae-start", "env", 1), timeout=timeout):
        if has_launchers_store():
            _start = _agree(store, rank, ranks, timeout)
            yield PrefixStore(f"mae/{_start}", store), rank, ranks
        else:
            yield store, rank, ranks


register_rendezvous_handler(INIT_METHOD.partition(":")[0], _meet)  # type: ignore[no-untyped-call]


def _agree(store: Store, rank: int, ranks: int, timeout: timedelta) -> str:
    """Return the word of this start, which rank 0 chooses.

    Each rank asks under a new random name, so only an answer of this start can reach it.
    """
    name = uuid4().hex
    if rank == 0:
        _answer(store, name, ranks, timeout)
        return name
    store.set(f"mae/asks/{rank}", name)
    store.wait([f"mae/answer/{name}"], timeout)
    word = store.get(f"mae/answer/{name}").decode()
    store.set(f"mae/{word}/came/{rank}", "")
    return word


def _answer(store: Store, word: str, ranks: int, timeout: timedelta) -> None:
    """Answer every rank that asks, until all have confirmed. A request from an earlier start is never confirmed.

    Raises:
        DistStoreError: if some ranks have not come within the timeout.
    """
    absent = set(range(1, ranks))
    until = time.monotonic() + timeout.total_seconds()
    while absent := {rank for rank in absent if not store.check([f"mae/{word}/came/{rank}"])}:
        for rank in absent:
            if store.check([f"mae/asks/{rank}"]):
                store.set(f"mae/answer/{store.get(f'mae/asks/{rank}').decode()}", word)
        if time.monotonic() > until:
            names = ", ".join(map(str, sorted(absent)))
            raise DistStoreError(f"ranks {names} have not come within {timeout.total_seconds():g} s")
        time.sleep(_POLL_SECONDS)
