"""Results of all stages, in one JSON file that is replaced as a whole after each measurement."""

import json
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Figures = dict[str, Any]
Status = Literal["ok", "failed", "skipped", "unfinished"]
_KEPT_LINES = 40


class FailedError(Exception):
    """A measurement failed; `detail` holds the last lines of a command's output or the traceback of another process."""

    def __init__(self, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail


class SkippedError(Exception):
    """A measurement is not possible here; the message says why."""


class UnfinishedError(Exception):
    """The time was up; the next call goes on with this measurement."""

    def __init__(self, message: str, figures: Figures | None = None) -> None:
        super().__init__(message)
        self.figures = figures or {}


@dataclass(frozen=True)
class Record:
    """What became of a measurement."""

    stage: str
    name: str
    status: Status
    seconds: float
    message: str = ""
    figures: Figures = field(default_factory=dict)
    traceback: str = ""
    device: str = ""


class Results:
    """All records, in the order in which they were made, and what is known about the machines."""

    def __init__(self, path: Path) -> None:
        """Read the file, if there is one."""
        self.path = path
        found = json.loads(path.read_text()) if path.exists() else {"about": {}, "records": []}
        self.about: dict[str, Any] = found["about"]
        self._records = {(record["stage"], record["name"]): Record(**record) for record in found["records"]}

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records.values())

    def of(self, stage: str) -> list[Record]:
        """Return the records of a stage."""
        return [record for record in self if record.stage == stage]

    def figures(self, stage: str, name: str) -> Figures:
        """Return the figures of a measurement; none if it was not made."""
        record = self._records.get((stage, name))
        return record.figures if record else {}

    def is_done(self, stage: str, name: str) -> bool:
        """Return whether there is nothing left to do: also if the measurement failed or was skipped."""
        record = self._records.get((stage, name))
        return record is not None and record.status != "unfinished"

    def has_failed(self, stage: str, name: str) -> bool:
        """Return whether the last try of the measurement failed."""
        record = self._records.get((stage, name))
        return record is not None and record.status == "failed"

    def forget_failures(self) -> None:
        """Forget what failed or was skipped, so that it is tried again."""
        self._records = {key: record for key, record in self._records.items() if record.status in ("ok", "unfinished")}

    def add(self, record: Record) -> None:
        """Add a record, or replace the older one of the same measurement, and write the file."""
        self._records[record.stage, record.name] = record
        self.write()

    def write(self) -> None:
        """Replace the file; a cut at any time leaves the old file or the new one."""
        text = json.dumps({"about": self.about, "records": [asdict(record) for record in self]}, indent=1)
        write_atomically(self.path, text)


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is complete as soon as it can be seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def record_of(stage: str, name: str, run: Callable[[], Mapping[str, Any]], device: str = "") -> Record:
    """Run a measurement and return its record, whatever becomes of it."""
    began = time.perf_counter()

    def record(status: Status, message: str = "", figures: Mapping[str, Any] | None = None, trace: str = "") -> Record:
        seconds = round(time.perf_counter() - began, 1)
        return Record(stage, name, status, seconds, message, dict(figures or {}), last_lines(trace), device)

    try:
        return record("ok", figures=run())
    except SkippedError as error:
        return record("skipped", str(error))
    except UnfinishedError as error:
        return record("unfinished", str(error), error.figures)
    except FailedError as error:
        return record("failed", str(error), trace=error.detail or traceback.format_exc())
    except Exception as error:  # whatever it is, the rest goes on
        return record("failed", f"{type(error).__name__}: {error}", trace=traceback.format_exc())


def last_lines(text: str, count: int = _KEPT_LINES) -> str:
    """Return the last lines of a text that are not empty."""
    return "\n".join([line for line in text.splitlines() if line.strip()][-count:])
