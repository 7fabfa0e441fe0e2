"""Number of worker processes, and threads that end a process when its parent or launcher is gone."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

_POLL_SECONDS = 1.0

_LAUNCHER_WATCH = "end with launcher"
_ACCELERATE = {"accelerate", "accelerate-launch", "accelerate.commands.launch", "accelerate.commands.accelerate_cli"}


def default_workers() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def end_with_parent() -> None:
    """End this worker process when its parent ends; call it at the start of the worker.

    Otherwise the worker of a killed parent would wait for work forever and hold the parent's locks and connections.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent_id = os.getppid()

    def watch() -> None:
        # A process forked later may keep the pipe open that `is_alive` and `join` watch; the parent's id still changes.
        while parent.is_alive() and os.getppid() == parent_id:
            parent.join(_POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()


def end_with_launcher() -> None:
    """Send this process SIGTERM when the launcher that started it is gone, so that no orphan keeps a GPU.

    A process that a shell, nohup or srun started is not watched: it may outlive its parent.
    """
    if not is_started_by_launcher() or any(thread.name == _LAUNCHER_WATCH for thread in threading.enumerate()):
        return
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(_POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name=_LAUNCHER_WATCH, daemon=True).start()


def is_started_by_launcher() -> bool:
    """Return whether torchrun or accelerate launch started this process.

    torchrun sets `TORCHELASTIC_RUN_ID`, and so does accelerate launch for several processes. For one process it sets
    only the precision, which a user may set too, so the command of the parent decides.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return True
    return "ACCELERATE_MIXED_PRECISION" in os.environ and not _ACCELERATE.isdisjoint(_command(os.getppid())[:3])


def _command(process: int) -> list[str]:
    """Return the words of a process's command line, each without its folder."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:  # it has ended, or this is not Linux
        return []
    return [Path(os.fsdecode(word)).name for word in words]
