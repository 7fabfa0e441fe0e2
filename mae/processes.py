"""Processes: how many work for this one, and that none outlives the one it works for."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

_SECONDS_BETWEEN_LOOKS = 1.0

_LAUNCHER_WATCH = "end with launcher"
_ACCELERATE = {
    "accelerate",
    "accelerate-launch",
    "accelerate.commands.launch",
    "accelerate.commands.accelerate_cli",
}


def default_workers() -> int:
    """One process per core that this process may use."""
    return len(os.sched_getaffinity(0))


def end_with_parent() -> None:
    """For the begin of a worker: without it, it outlives a parent that is killed, waits for work for ever, and holds
    the parent's locks and connections."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    born_to = os.getppid()

    def watch() -> None:
        # A process forked after this one may hold the pipe open whose end `join` waits for; it cannot hold the number.
        while parent.is_alive() and os.getppid() == born_to:
            parent.join(_SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()


def end_with_launcher() -> None:
    """Send this process SIGTERM when the launcher that started it is gone: no orphan goes on holding a GPU.

    Nothing is watched in a process that a shell, nohup or srun started: it may well outlive what started it.
    """
    if not _is_started_by_launcher() or any(thread.name == _LAUNCHER_WATCH for thread in threading.enumerate()):
        return
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name=_LAUNCHER_WATCH, daemon=True).start()


def _is_started_by_launcher() -> bool:
    """torchrun names the job, and so does accelerate launch for several processes. For one, it only sets the precision,
    as a user may do too; so the parent is asked for its command."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return True
    return "ACCELERATE_MIXED_PRECISION" in os.environ and not _ACCELERATE.isdisjoint(_command(os.getppid())[:3])


def _command(process: int) -> list[str]:
    """Its words, without their folders."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:  # it has ended, or this is no Linux
        return []
    return [Path(os.fsdecode(word)).name for word in words]
