"""Checkpoint in the making: a hidden folder in which several ranks put their parts together.

The ranks only exchange files: each rank but 0 lists what it has written, and rank 0 waits for all lists. A rank that
cannot write its part renames the folder, which needs no disk space, and leaves the reason in it.
"""

import errno
import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from mae.errors import MACHINE_REMEDIES
from mae.files import write_atomically
from mae.training.checkpoints.manifest import FileIdentity, RunPosition
from mae.training.checkpoints.retention import remove

_FAILED, _REASON = ".failed-", "reason"
_REASON_TIMEOUT = 2.0
_POLL_SECONDS = 0.02
_REMEDIES = MACHINE_REMEDIES | {
    errno.ENOSPC: "make room there, or lower keep_checkpoints",
    errno.EDQUOT: "make room in your quota, or lower keep_checkpoints",
    errno.EROFS: "mount it writable",
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.ESTALE), "the folder has vanished: mount it or make it again"),
}


class NotWrittenError(Exception):
    """Reason, other than the disk, why a checkpoint was given up."""


@dataclass(frozen=True)
class PendingSave:
    """Checkpoint that is being written, as one of its `writers` ranks sees it."""

    run_position: RunPosition
    folder: Path
    """Hidden folder. No other save has had this name."""
    bytes_needed: int
    """Size of the tensors of all ranks."""
    rank: int
    writers: int

    def list_part(self, files: Mapping[str, FileIdentity]) -> None:
        """Tell rank 0 which files this rank has written."""
        listed = {name: asdict(identity) for name, identity in files.items()}
        write_atomically(self._part_list(self.rank), json.dumps(listed).encode())

    def take_part(self, rank: int, deadline: Callable[[], float]) -> dict[str, FileIdentity]:
        """Wait until `rank` has listed its files; return the list and remove it from the folder.

        `deadline` returns the value of `time.monotonic()` at which to give up; it may change while this waits.

        Raises:
            NotWrittenError: if a rank has failed, or the deadline has passed.
        """
        path = self._part_list(rank)
        while not path.exists():
            self.require_no_failure()
            if time.monotonic() > deadline():
                raise NotWrittenError(f"rank {rank} has not written its part in time")
            time.sleep(_POLL_SECONDS)
        listed = json.loads(path.read_bytes())
        path.unlink()
        return {name: FileIdentity(**identity) for name, identity in listed.items()}

    def require_no_failure(self) -> None:
        """Give up with the first rank that gives up.

        Raises:
            NotWrittenError: with the reason of that rank.
        """
        failure = self.failure_of_others()
        if failure is not None:
            raise failure

    def failure_of_others(self) -> NotWrittenError | None:
        """Return why another rank could not write its part and renamed the folder; None if no rank has failed."""
        for failed in sorted(self.folder.parent.glob(f"{self.folder.name}{_FAILED}*")):
            deadline = time.monotonic() + _REASON_TIMEOUT
            while not (failed / _REASON).exists() and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
            try:
                return NotWrittenError((failed / _REASON).read_text("utf-8"))
            except FileNotFoundError:
                return NotWrittenError(f"rank {failed.name.rpartition(_FAILED)[2]} could not write its part")
        return None

    def give_up(self, error: Exception) -> str:
        """Remove this save, leave the reason for the other ranks, and return it."""
        failed = self.folder.with_name(f"{self.folder.name}{_FAILED}{self.rank}")
        with suppress(OSError):  # another rank has renamed the folder first, or the disk is gone
            self.folder.rename(failed)
            for path in failed.iterdir():
                remove(path)
        reason = self._reason(error)  # by now the disk space of this part is free again
        with suppress(OSError):
            if self.writers > 1:
                write_atomically(failed / _REASON, reason.encode())
            else:
                remove(failed)
        return reason

    def _reason(self, error: Exception) -> str:
        if not isinstance(error, OSError):
            return str(error)
        root = self.folder.parent
        try:
            free = f"{shutil.disk_usage(root).free:,} bytes"
        except OSError:
            free = "unknown"
        remedy = _REMEDIES.get(error.errno or 0, "look at the disk")
        return f"{error.strerror} in {root}; needed {self.bytes_needed:,} bytes, free {free}; {remedy}"

    def _part_list(self, rank: int) -> Path:
        return self.folder / f"part-{rank:05d}.json"
