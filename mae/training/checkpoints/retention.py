"""Retention of checkpoints: which ones go, and how they are removed."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from mae.training.checkpoints.manifest import is_set_aside, step_of


def superseded(paths: Iterable[Path], newest: int, keep: int, keep_every: int | None) -> list[Path]:
    """Return the checkpoints that can go once the one of step `newest` is written.

    Kept are the `keep` newest up to `newest`, and every one whose step `keep_every` divides. Checkpoints of later steps
    go too: they are damaged, or belong to training that was given up, and a resume must not find them.
    """
    steps = {path: step for path in paths if (step := step_of(path)) is not None}
    proper = sorted({step for path, step in steps.items() if step <= newest and not is_set_aside(path)})
    stay = {step for step in proper if keep_every and step % keep_every == 0} | set(proper[-keep:])
    return [path for path, step in steps.items() if step not in stay or is_set_aside(path)]


def remove(path: Path) -> None:
    """Remove a file, a folder with all that is in it, or a link, but never what a link points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
