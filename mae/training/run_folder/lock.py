"""Lock of a run folder, so that no two runs ever write into one."""

import os
import socket
from pathlib import Path
from typing import BinaryIO

from mae.data.store.lock import lock_for_process
from mae.errors import MACHINE_REMEDIES, UserError

LOCK_FILE = ".lock"
_MOST_BYTES = 1 << 10


class FolderInUseError(UserError):
    """Error for a run folder that another process has locked."""


def lock_folder(path: Path) -> BinaryIO:
    """Make the folder, and keep every other process out until the returned file is closed.

    Raises:
        UserError: if another process, which is named, has locked the folder, or if it cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = (path / LOCK_FILE).open("a+b")
    except OSError as error:
        raise cannot_be_written(path, error) from None
    if not lock_for_process(file):
        file.seek(0)
        holder = file.read(_MOST_BYTES).decode(errors="replace").strip() or "another process"
        file.close()
        raise FolderInUseError(f"run_dir {path} is in use by {holder}; wait for it or end it, or give another run_dir")
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        file.flush()
    except OSError as error:
        raise cannot_be_written(path, error) from None
    return file


def cannot_be_written(path: Path, error: OSError) -> UserError:
    """Return the error for a run folder of which the system has refused a change."""
    reason = error.strerror or str(error)  # an error of Python's own has no number
    remedy = MACHINE_REMEDIES.get(error.errno or 0, "give another run_dir")
    return UserError(f"run_dir {path} cannot be written: {reason}; {remedy}")
