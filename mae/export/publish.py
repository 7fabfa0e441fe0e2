"""Publication of an export: it is written aside and compared, and appears under its name only if both succeed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from filecmp import cmp
from pathlib import Path

from mae.data.store.lock import lock_folder
from mae.errors import UserError, first_of
from mae.files import sync
from mae.run_files import checkpoint_around

VERIFICATION_FILE = "verification.json"
"""File of every export, by which one is recognised."""
CARD_FILE, PICTURE_FILE = "README.md", "reconstructions.png"
"""Model card, and its picture."""
_OF_THE_CARD = (CARD_FILE, PICTURE_FILE)


def require_free(out: Path) -> None:
    """Raise a `UserError` if `out` is neither new, an empty folder nor an earlier export, or is in a checkpoint."""
    if (checkpoint := checkpoint_around(out)) is not None:
        raise UserError(
            f"{out} is in the checkpoint {checkpoint}, which training would then take for damaged; give another --out"
        )
    if out.is_dir() and (not any(out.iterdir()) or (out / VERIFICATION_FILE).is_file()):
        return
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists and is not an empty folder; give a new one with --out")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder beside `out` to write an export to: it becomes `out` at the end, and is removed after an error.

    What a killed export has left there is removed first. If `out` is an earlier export, it stays, once it is found to
    be equal; a card that differs stays too, because its licence is for the user to write, and one that is missing is
    added.

    Raises:
        UserError: if `out` exists and is not an empty folder, holds an export that is another or damaged, or is being
            written by another process.
    """
    require_free(out)
    out = Path(os.path.realpath(out))
    part = out.with_name(f".{out.name}.part")
    with _made_alone(part, out):
        try:
            yield part
            there = out.is_dir() and any(out.iterdir())
            if there:
                _require_equal_files(part, out)
        except BaseException:
            shutil.rmtree(part)
            raise
        _publish(part, out, there)


@contextmanager
def _made_alone(part: Path, out: Path) -> Iterator[None]:
    """Make an empty folder that no other process writes to meanwhile; after an error, remove the new folders above."""
    missing = [folder for folder in part.parents if not folder.exists()]
    try:
        part.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, FileNotFoundError) as error:
        raise UserError(f"{part} cannot be made: {error.strerror}; remove it, or give another --out") from None
    with lock_folder(part) as is_ours:
        if not is_ours:
            raise UserError(f"{out} is being written by another export; wait for it, or give another --out")
        try:
            for path in part.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            yield
        except BaseException:
            for folder in missing:
                with suppress(OSError):  # not empty: another export is there
                    folder.rmdir()
            raise


def _publish(part: Path, out: Path, there: bool) -> None:
    """Give a folder its name; if an equal export is `there`, add what is missing of its card."""
    if there:
        for name in _OF_THE_CARD:
            if (part / name).exists() and not os.path.lexists(out / name):
                (part / name).rename(out / name)
        shutil.rmtree(part)
        return
    # Libraries that write files themselves leave that to the system.
    for path in (part, *part.rglob("*")):
        sync(path)
    if out.exists():
        out.rmdir()
    part.rename(out)
    sync(out.parent)


def _require_equal_files(part: Path, out: Path) -> None:
    names = sorted({path.name for folder in (part, out) for path in folder.iterdir()})
    differing = [name for name in names if name not in _OF_THE_CARD and not _are_equal(part / name, out / name)]
    if differing:
        raise UserError(
            f"{out} holds another export, or a damaged one: {first_of(differing)} differs; remove the folder, or give "
            "a new one with --out"
        )


def _are_equal(one: Path, other: Path) -> bool:
    return one.is_file() and other.is_file() and cmp(one, other, shallow=False)
