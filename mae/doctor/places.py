"""Where on this machine a path lies, though it may not exist yet."""

import os
from collections.abc import Iterator
from pathlib import Path


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the nearest above it that exists."""
    absolute = path.resolve()
    return next(folder for folder in (absolute, *absolute.parents) if folder.is_dir())


def broken_link(path: Path) -> Path | None:
    """A symbolic link on the way to `path` that leads nowhere."""
    absolute = path.absolute()
    return next((part for part in (absolute, *absolute.parents) if part.is_symlink() and not part.exists()), None)


def missing_mounts(path: Path, table: Path = Path("/etc/fstab")) -> Iterator[Path]:
    """Places above `path` where this machine is told to mount a disk, and none is."""
    lines = table.read_text().splitlines() if table.is_file() else []
    places = {Path(words[1]) for line in lines if len(words := line.split()) > 1 and not line.startswith("#")}
    yield from (place for place in path.resolve().parents if place in places and not os.path.ismount(place))
