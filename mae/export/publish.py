"""Publication of an export: it is written aside and compared, and appears under its name only if both succeed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mae.errors import UserError
from mae.files import sync


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder beside `out` to write to: it becomes `out` at the end, and is removed after an error.

    What a killed export has left there is removed first.

    Raises:
        UserError: if `out` exists and is not an empty folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; give a new one with --out")
    out = out.resolve()
    part = out.with_name(f".{out.name}.part")
    if part.exists():
        shutil.rmtree(part)
    part.mkdir(parents=True)
    try:
        yield part
    except BaseException:
        shutil.rmtree(part)
        raise
    if out.exists():
        out.rmdir()
    part.rename(out)
    sync(out.parent)


def require_equal_features(library: str, difference: float, tolerance: float) -> None:
    """Raise a `UserError` if the features of the loaded export differ from the run's by more than `tolerance`."""
    if not difference <= tolerance:
        raise UserError(
            f"{library}'s features differ by {difference:.2e} from the run's, at most {tolerance:.0e} is allowed; "
            "nothing was exported. Please report this with the run's settings.yaml"
        )
