"""Commands in processes of their own, which end in time whatever they do."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from .place import ROOT, Place
from .results import FailedError, UnfinishedError, last_lines

_POLL_SECONDS = 0.02
_SECONDS_TO_END = 5.0
_PR_SET_PDEATHSIG = 1


class Ended(NamedTuple):
    """A command that has ended."""

    code: int
    """Exit code; negative: the number of the signal."""
    seconds: float
    output: str
    was_stopped: bool
    """Whether it ended because it was told to."""


def mae(place: Place, *words: object, limit: float = 240.0) -> Ended:
    """Run a command of `mae`.

    Raises:
        FailedError: if it fails or takes longer than `limit` seconds.
        UnfinishedError: if the time of this call ends first.
    """
    return run_python(place, "-m", "mae", *words, limit=limit)


def run_python(place: Place, *words: object, limit: float = 240.0) -> Ended:
    """Run Python with these words; see `mae`."""
    left = place.seconds_left()
    began = time.monotonic()
    ended = run_until(place, words, lambda: time.monotonic() - began > min(limit, left))
    shown = " ".join(map(str, words[:4]))
    if ended.was_stopped and left < limit:
        raise UnfinishedError(f"the time of this call was up after {ended.seconds:.0f} s of `{shown} ...`")
    if ended.was_stopped:
        raise FailedError(f"`{shown} ...` took longer than {limit:.0f} s", ended.output)
    if ended.code:
        said = last_lines(ended.output, 1)
        raise FailedError(f"`{shown} ...` ended with exit code {ended.code}: {said}", ended.output)
    return ended


def run_until(
    place: Place, words: Sequence[object], is_enough: Callable[[], bool], first: signal.Signals = signal.SIGTERM,
    grace: float = _SECONDS_TO_END,
) -> Ended:  # fmt: skip
    """Run Python with these words until it ends, or until `is_enough`; then send `first`, and SIGKILL `grace` s later.

    All its processes are in one process group, but in the session of this program, and so end with it.
    """
    log = place.work / "logs" / f"{time.monotonic_ns()}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 (our own command)
            [sys.executable, *map(str, words)], cwd=ROOT, env=place.environment(), stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, process_group=0, preexec_fn=end_with_parent,  # noqa: PLW1509
        )  # fmt: skip
    was_stopped = False
    try:
        while process.poll() is None and not was_stopped:
            was_stopped = is_enough()
            time.sleep(_POLL_SECONDS)
        was_stopped = was_stopped and process.poll() is None
    finally:
        end_group(process, first, grace)
    text = _without_progress(log)
    log.unlink()
    return Ended(process.returncode, round(time.monotonic() - began, 1), text, was_stopped)


def end_with_parent() -> None:
    """Let the kernel send this process SIGTERM when this program is killed, so that no orphan keeps the GPU."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def end_group(process: "subprocess.Popen[bytes]", first: signal.Signals, grace: float) -> None:
    """End a process and all that it started."""
    if process.poll() is None:
        _tell_group(process.pid, first)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    _tell_group(process.pid, signal.SIGKILL)
    process.wait()


def _tell_group(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


def _without_progress(log: Path) -> str:
    """Return the text of a log, of lines that were overwritten the last state only."""
    lines = log.read_text(errors="replace").split("\n")
    return "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in lines)
