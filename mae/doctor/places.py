"""Place on this machine of a path that may not exist yet."""

import os
from collections.abc import Iterator
from pathlib import Path


def nearest_folder(path: Path) -> Path:
    """Return the folder itself, or the nearest parent that exists."""
    absolute = path.resolve()
    return next(folder for folder in (absolute, *absolute.parents) if folder.is_dir())


def broken_link(path: Path) -> Path | None:
    """Return the first symbolic link in `path` or its parents whose target is missing, or None."""
    absolute = path.absolute()
    return next((part for part in (absolute, *absolute.parents) if part.is_symlink() and not part.exists()), None)


def missing_mounts(path: Path, table: Path = Path("/etc/fstab")) -> Iterator[Path]:
    """Yield the parents of `path` that /etc/fstab names as mount points, but where no disk is mounted."""
    lines = table.read_text().splitlines() if table.is_file() else []
    places = {Path(words[1]) for line in lines if len(words := line.split()) > 1 and not line.startswith("#")}
    yield from (place for place in path.resolve().parents if place in places and not os.path.ismount(place))
