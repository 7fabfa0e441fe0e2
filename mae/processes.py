"""Worker processes: how many, and that none outlives the process it works for."""

import multiprocessing
import os
import threading


def default_workers() -> int:
    """One process per core that this process may use."""
    return len(os.sched_getaffinity(0))


def end_with_parent() -> None:
    """For the begin of a pool's process: without it, it outlives a parent that is killed, waits for work for ever, and
    holds the parent's locks."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
