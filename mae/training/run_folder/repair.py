"""Repair of a run folder: files that a run can do without, and that cannot be used, are set aside and named."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

from mae.errors import UserError
from mae.files import unused_name
from mae.run_files import METRICS_FILE
from mae.training.run_folder.folder import (
    BAD_SAMPLES_FILE,
    EXIT_FILE,
    REPORT_FILE,
    ROLLBACK_FILE,
    SKIPPED_FILE,
    RunFolder,
)
from mae.training.trackers.position import TRACKERS_FILE, read_positions

_WITHOUT = {
    METRICS_FILE: "the log begins anew",
    SKIPPED_FILE: "the list begins anew",
    BAD_SAMPLES_FILE: "bad images are counted anew",
    ROLLBACK_FILE: "if the run had returned to a checkpoint, it takes that checkpoint's data, and may return once more",
    TRACKERS_FILE: "each tracker begins a new run, which gets everything",
}


def set_damage_aside(folder: RunFolder, say: Callable[[str], None]) -> None:
    """Rename each of these files that cannot be used, which keeps it, and report it."""
    samples = [path.name for path in folder.path.glob("samples-rank*.jsonl")]
    for name in (*_WITHOUT, EXIT_FILE, REPORT_FILE, *samples):
        path = folder.path / name
        if os.path.lexists(path) and (damage := _damage(folder, path)):
            kept = path.rename(unused_name(path, ".damaged"))
            say(f"warning: {damage}; it is kept as {kept.name}, and {_WITHOUT.get(name, 'another is written')}")


def _damage(folder: RunFolder, path: Path) -> str | None:
    """Return why a file cannot be used; None if it can."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return f"{path} is not a regular file"
        if path.name == ROLLBACK_FILE:
            folder.rollback()
        if path.name == TRACKERS_FILE:
            read_positions(folder.path)
        if path.name == BAD_SAMPLES_FILE:
            folder.bad_samples()
    except UserError as error:
        return str(error).rpartition(";")[0]
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return None
