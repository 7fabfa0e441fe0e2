"""History of a run, `history.jsonl`: when and where it was started, and how each start ended. Nothing is removed."""

import json
import socket
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mae.files import open_regular
from mae.output import warn
from mae.settings import changed_settings, flatten, to_dict
from mae.versions import library_versions

HISTORY_FILE = "history.jsonl"
START, END = "start", "end"
_MOST_RECORDS, _MOST_BYTES_OF_A_LINE = 10_000, 1 << 14


def record_start(run_dir: Path, step: int, where: str, settings: Any) -> None:
    """Append a start at a step, on the device `where`, with the names of the settings that are not the defaults."""
    changed = list(changed_settings(type(settings), flatten(to_dict(settings))))
    _append(run_dir, {"kind": START, "step": step, "where": where, "libraries": library_versions(), "changed": changed})


def append_end(run_dir: Path, reason: str, message: str) -> None:
    """Append the end of a start to a history that has begun."""
    if (run_dir / HISTORY_FILE).exists():
        _append(run_dir, {"kind": END, "reason": reason, "message": message[:2000]})


def read_history(run_dir: Path) -> list[dict[str, Any]]:
    """Return the starts and ends, without lines that are none; empty if there is no file.

    Each has `kind` and `time` as text; a start has the number `step` and the text `where`, an end the texts `reason`
    and `message`. A start may have `libraries`, their versions by name, and `changed`, names of settings; both are
    left out where they are something else.
    """
    path = run_dir / HISTORY_FILE
    if not path.exists():
        return []
    found: list[dict[str, Any]] = []
    with open_regular(path) as file:
        while len(found) < _MOST_RECORDS and (line := file.readline(_MOST_BYTES_OF_A_LINE)):
            if (record := _record(line)) is not None:
                found.append(record)
    return found


def _append(run_dir: Path, record: Mapping[str, Any]) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    append_lines(run_dir / HISTORY_FILE, [{"time": now, "host": socket.gethostname(), **record}])


def append_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Append lines of JSON to a log; one that cannot be written, as on a full disk, does not end the run."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    except OSError as error:
        warn(f"a line is missing from {path}: {error.strerror}")


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.get("kind") not in (START, END):
        return None
    texts = ("time", "host", "where") if found["kind"] == START else ("time", "host", "reason", "message")
    is_whole = all(isinstance(found.get(name), str) for name in texts)
    if found["kind"] == START:
        is_whole = is_whole and type(found.get("step")) is int and found["step"] >= 0
        libraries, changed = found.pop("libraries", None), found.pop("changed", None)
        if isinstance(libraries, dict) and all(isinstance(version, str) for version in libraries.values()):
            found["libraries"] = libraries
        if isinstance(changed, list) and all(isinstance(name, str) for name in changed):
            found["changed"] = changed
    return found if is_whole else None
