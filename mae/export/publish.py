"""Publication of an export: it is written aside and compared, and appears under its name only if both succeed."""

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from filecmp import cmp
from pathlib import Path

from mae.errors import UserError, first_of
from mae.files import sync


@contextmanager
def new_folder(out: Path, files: Collection[str]) -> Iterator[Path]:
    """Yield a folder beside `out` to write these files to: it becomes `out` at the end, and is removed after an error.

    What a killed export has left there is removed first. If `out` holds such files already, it stays, once they are
    found to be equal.

    Raises:
        UserError: if `out` exists and is not an empty folder, or holds an export that is another or damaged.
    """
    there = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if (out.exists() and not out.is_dir()) or there not in (set(), set(files)):
        raise UserError(f"{out} exists and is not an empty folder; give a new one with --out")
    out = out.resolve()
    part = out.with_name(f".{out.name}.part")
    if part.exists():
        shutil.rmtree(part)
    part.mkdir(parents=True)
    try:
        yield part
        _require_equal_files(part, out, there)
    except BaseException:
        shutil.rmtree(part)
        raise
    if there:
        shutil.rmtree(part)
        return
    if out.exists():
        out.rmdir()
    part.rename(out)
    sync(out.parent)


def _require_equal_files(part: Path, out: Path, names: Collection[str]) -> None:
    differing = [name for name in sorted(names) if not cmp(part / name, out / name, shallow=False)]
    if differing:
        raise UserError(
            f"{out} holds another export, or a damaged one: {first_of(differing)} differs; remove the folder, or give "
            "a new one with --out"
        )


def require_equal_features(library: str, difference: float, tolerance: float) -> None:
    """Raise a `UserError` if the features of the loaded export differ from the run's by more than `tolerance`."""
    if not difference <= tolerance:
        raise UserError(
            f"{library}'s features differ by {difference:.2e} from the run's, at most {tolerance:.0e} is allowed; "
            "nothing was exported. Please report this with the run's settings.yaml"
        )
