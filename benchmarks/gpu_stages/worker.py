"""A process that measures what needs torch, so that a crash or a hang of the device loses one figure and no more.

It reads one JSON line per task from its standard input, `{"function": "step_rows.measure", "arguments": [...]}`, calls
this function of this package, and answers with one JSON line. Everything else that is printed goes to its log.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import IO, Any

from .commands import end_group, end_with_parent
from .place import ROOT, Place
from .results import FailedError, Figures, SkippedError, UnfinishedError, last_lines


class Worker:
    """The worker process, seen from outside; it is started when it is needed, and again after it was lost."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._process: subprocess.Popen[bytes] | None = None
        self._log = place.work / "logs" / "worker.txt"

    def ask(self, function: str, *arguments: object, limit: float = 150.0) -> Figures:
        """Return the figures of a function, such as `step_rows.measure`.

        Raises:
            FailedError: if it raises, dies, or takes longer than `limit` seconds.
            SkippedError: if it says that it is not possible here.
            UnfinishedError: if the time of this call ends first.
        """
        left = self._place.seconds_left()
        process = self._process
        if process is None or process.poll() is not None:
            self.close()
            process = self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"function": function, "arguments": arguments}).encode() + b"\n")
        process.stdin.flush()
        line = _line_within(process.stdout, min(limit, left))
        if line is None:
            self.close()
            if left < limit:
                raise UnfinishedError(f"the time of this call was up after {left:.0f} s of {function}")
            raise FailedError(f"took longer than {limit:.0f} s", self._said())
        if not line.endswith(b"\n"):
            self.close()
            raise FailedError(f"the worker process ended with exit code {process.returncode}", self._said())
        answer: dict[str, Any] = json.loads(line)
        if "skipped" in answer:
            raise SkippedError(answer["skipped"])
        if "error" in answer:
            self.close()  # a fault of the device stays with the process, and would fail whatever follows
            raise FailedError(answer["error"], answer["traceback"])
        return dict(answer["figures"])

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            end_group(self._process, signal.SIGTERM, 2.0)
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None

    def _start(self) -> "subprocess.Popen[bytes]":
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "gpu_stages.worker"], cwd=ROOT, env=self._place.environment(),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, process_group=0, bufsize=0,
                preexec_fn=end_with_parent,  # noqa: PLW1509
            )  # fmt: skip
        return self._process

    def _said(self) -> str:
        return last_lines(self._log.read_text(errors="replace"))


def _line_within(stream: IO[bytes], seconds: float) -> bytes | None:
    """Return the next line, without its end if the other side closed; None if the seconds were over first."""
    found, end = b"", time.monotonic() + seconds
    while not found.endswith(b"\n"):
        ready, _, _ = select.select([stream], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            return None
        part = os.read(stream.fileno(), 1 << 16)
        if not part:
            return found
        found += part
    return found


def answer_to(function: str, arguments: Sequence[object]) -> dict[str, Any]:
    """Call a function of this package, and return its figures or its error."""
    module, _, name = function.partition(".")
    try:
        return {"figures": getattr(import_module(f"{__package__}.{module}"), name)(*arguments)}
    except SkippedError as error:
        return {"skipped": str(error)}
    except BaseException as error:  # also a `sys.exit` of what is measured
        return {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}


def main() -> None:
    """Answer until the other side closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        task = json.loads(line)
        print(json.dumps(answer_to(task["function"], task["arguments"])), file=answers, flush=True)


if __name__ == "__main__":
    main()
