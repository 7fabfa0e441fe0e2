"""Writing checkpoints: each appears whole or not at all, beside the training, and no trouble of the disk ends a run.

A checkpoint is made in a hidden folder. Every rank that writes brings its files to the disk, then the list
of them; rank 0 waits for all lists, writes the manifest last and renames the folder. Only then do older ones
go. No collective is needed, so that all of it may run in a thread.
"""

import errno
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Thread

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mae.errors import UserError
from mae.files import sync, write_atomically
from mae.training.checkpoints.manifest import (
    MANIFEST_FILE,
    SET_ASIDE,
    FileIdentity,
    Manifest,
    RunPosition,
    is_set_aside,
    step_folder,
    step_of,
)
from mae.training.checkpoints.tensor_files import HostCopy, LocalRows, file_name, local_rows
from mae.versions import library_versions

Tensors = Mapping[str, Mapping[str, Tensor]]
"""Groups (`model`, `optimizer`, `ema`) of named tensors, each whole or distributed by rows."""

_HIDDEN = ".tmp-"
# A rank that cannot write its part renames the hidden folder, which takes no room, and leaves the reason in it.
_FAILED, _REASON = ".failed-", "reason"
_SECONDS_TO_GIVE_A_REASON = 2.0
_PART_TIMEOUT = 600.0  # seconds that rank 0 waits for the parts of the others
_EXIT_TIMEOUT = 10.0  # the same once the run is leaving: who has not written by then may be dead
_POLL_SECONDS = 0.02  # seconds between two looks
_REMEDIES = {
    errno.ENOSPC: "make room there, or lower keep_checkpoints",
    errno.EDQUOT: "make room in your quota, or lower keep_checkpoints",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
    errno.EROFS: "mount it writable",
    errno.EACCES: "make it writable for this user",
    errno.EPERM: "make it writable for this user",
    errno.ENOENT: "the folder has vanished: mount it or make it again",
    errno.ENOTDIR: "the folder has vanished: mount it or make it again",
    errno.ESTALE: "the folder has vanished: mount it or make it again",
}


def bytes_needed(tensors: Tensors) -> int:
    """Bytes that the tensors of all ranks take in a checkpoint; headers and manifest are small beside them."""
    return sum(tensor.numel() * tensor.element_size() for group in tensors.values() for tensor in group.values())


class CheckpointWriter:
    """Saves checkpoints under `root`; keeps the `keep` newest, and every one whose step `keep_every` divides."""

    failure: str | None
    """Why the last save was not written; none if it was."""
    failures_in_a_row: int
    """Saves since the last one that was written."""
    warning: str | None
    """What could not be removed after the last save that was written."""

    def __init__(
        self,
        root: Path,
        keep: int,
        keep_every: int | None = None,
        *,
        rank: int = 0,
        writers: int = 1,
        launch_id: str = "",
        background: bool = True,
    ) -> None:
        """The first `writers` ranks write.

        `launch_id` is a word that all ranks of this start share and no earlier start had.

        Raises:
            UserError: if the folder cannot be made.
        """
        if writers > 1 and not launch_id:
            raise ValueError("several writers need a word that tells their parts from those of an earlier start")
        self.failure, self.failures_in_a_row, self.warning = None, 0, None
        self._root, self._keep, self._keep_every = root, keep, keep_every
        self._rank, self._writers, self._background = rank, writers, background
        self._launch_id = launch_id or uuid.uuid4().hex[:12]
        self._saves = 0
        self._copies: dict[str, HostCopy] = {}
        self._thread: Thread | None = None
        self._bug: BaseException | None = None
        self._deadline = 0.0
        if rank < writers:
            try:
                root.mkdir(parents=True, exist_ok=True)
                sync(root.parent)
            except OSError as error:
                raise UserError(f"folder {root} for checkpoints cannot be made: {error.strerror}") from None

    def save(self, tensors: Tensors, metadata: Mapping[str, str], run_position: RunPosition) -> None:
        """Copy `tensors` to host memory and have them written from there; all ranks save at the same steps.

        Waits for the save before. Returns once the tensors may change again; what then goes wrong on the disk
        is told by `failure`. `metadata` goes into the header of every file.
        """
        self.wait()
        if self._rank >= self._writers:
            return
        self._saves += 1
        self._copy(tensors, metadata)
        notes = json.loads(json.dumps(run_position.notes))  # the loop goes on changing its own
        save = _Save(
            replace(run_position, notes=notes),
            self._root / f"{_HIDDEN}{run_position.step:09d}-{self._launch_id}.{self._saves}",
            bytes_needed(tensors),
        )
        self._deadline = time.monotonic() + _PART_TIMEOUT
        if self._background:
            self._thread = Thread(target=self._write, args=(save,), name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._write(save)
            self.wait()

    def wait(self) -> None:
        """Wait until the last save is written, or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        bug, self._bug = self._bug, None
        if bug is not None:
            raise bug

    def close(self) -> None:
        """Wait for the save in progress, but only a little for the parts of ranks that may be dead."""
        self._deadline = min(self._deadline, time.monotonic() + _EXIT_TIMEOUT)
        self.wait()
        self._copies.clear()

    def _copy(self, tensors: Tensors, metadata: Mapping[str, str]) -> None:
        for group in self._copies.keys() - tensors.keys():
            del self._copies[group]
        for group, members in tensors.items():
            self._copies.setdefault(group, HostCopy()).take(self._own(members), metadata)
        for device in {tensor.device for members in tensors.values() for tensor in members.values()}:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()

    def _own(self, members: Mapping[str, Tensor]) -> dict[str, Tensor | LocalRows]:
        """What this rank writes of a group: its rows; rank 0 also what every rank has."""
        parts = {
            name: local_rows(name, tensor, self._rank, self._writers) if isinstance(tensor, DTensor) else tensor
            for name, tensor in members.items()
        }
        return {name: part for name, part in parts.items() if self._rank == 0 or isinstance(part, LocalRows)}

    def _write(self, save: "_Save") -> None:
        """The work of the thread."""
        try:
            self._commit(save)
            self.failure, self.failures_in_a_row = None, 0
            if self._rank == 0:
                self.warning = self._remove_older(save)
        except FileNotFoundError as error:
            self._give_up(save, _reason_of_others(save) or error)
        except (OSError, _NotWrittenError) as error:
            self._give_up(save, error)
        except BaseException as bug:  # the training meets it when it next waits
            self._bug = bug

    def _commit(self, save: "_Save") -> None:
        if self._rank == 0:
            with suppress(OSError):  # tried again after the save, and then told
                self._remove_leftovers()
        _require_no_failure(save)
        save.hidden.mkdir(exist_ok=self._writers > 1)
        files = self._write_files(save)
        if self._rank > 0:
            listed = {name: asdict(identity) for name, identity in files.items()}
            write_atomically(save.part_list(self._rank), json.dumps(listed).encode())
            return
        for rank in range(1, self._writers):
            files |= self._files_of_rank(save, rank)
        write_atomically(save.hidden / MANIFEST_FILE, Manifest(save.run_position, library_versions(), files).to_json())
        self._put_in_place(save)

    def _write_files(self, save: "_Save") -> dict[str, FileIdentity]:
        for group, copy in self._copies.items():
            name = copy.first_not_finite()
            if name is not None:
                raise _NotWrittenError(f"{name} of the {group} is not finite")
        names = {group: file_name(group, self._rank, self._writers) for group in self._copies}
        return {names[group]: copy.write(save.hidden / names[group]) for group, copy in self._copies.items()}

    def _files_of_rank(self, save: "_Save", rank: int) -> dict[str, FileIdentity]:
        """Wait for the list of what another rank has written, and take it out of the folder."""
        path = save.part_list(rank)
        while not path.exists():
            _require_no_failure(save)
            if time.monotonic() > self._deadline:
                raise _NotWrittenError(f"rank {rank} has not written its part in time")
            time.sleep(_POLL_SECONDS)
        listed = json.loads(path.read_bytes())
        path.unlink()
        return {name: FileIdentity(**identity) for name, identity in listed.items()}

    def _put_in_place(self, save: "_Save") -> None:
        """At no moment is there no checkpoint of this step, if there was one before."""
        place = step_folder(self._root, save.run_position.step)
        if os.path.lexists(place):
            aside = place.with_name(f"{place.name}{SET_ASIDE}")
            if os.path.lexists(aside):
                self._remove_checkpoint(aside)
            place.rename(aside)
        save.hidden.rename(place)
        sync(self._root)

    def _remove_older(self, save: "_Save") -> str | None:
        """Only now that a new one is safe; returns what stands in the way."""
        try:
            self._remove_leftovers()
            for path in superseded(self._root.iterdir(), save.run_position.step, self._keep, self._keep_every):
                self._remove_checkpoint(path)
        except OSError as error:
            return f"{error.filename} cannot be removed ({error.strerror}); the disk may fill up"
        return None

    def _remove_checkpoint(self, path: Path) -> None:
        """Out of sight first, so that no half of it is ever found."""
        gone = self._root / f"{_HIDDEN}gone-{path.name}-{self._launch_id}.{self._saves}"
        path.rename(gone)
        _remove(gone)

    def _remove_leftovers(self) -> None:
        """What saves that were cut short have left; another rank may have begun its part of this save, or the next."""
        for path in self._root.glob(f"{_HIDDEN}*"):
            match = re.match(rf"{re.escape(_HIDDEN)}\d+-{re.escape(self._launch_id)}\.(\d+)", path.name)
            if match is None or int(match[1]) < self._saves:
                _remove(path)

    def _give_up(self, save: "_Save", error: Exception) -> None:
        """Remove what there is of this save, let the other ranks know, and say why."""
        failed = save.hidden.with_name(f"{save.hidden.name}{_FAILED}{self._rank}")
        with suppress(OSError):  # the folder is gone: another rank was first, or the disk is
            save.hidden.rename(failed)
            for path in failed.iterdir():
                _remove(path)
        reason = self._reason(save, error)  # by now the room that the part took is free again
        with suppress(OSError):
            if self._writers > 1:
                write_atomically(failed / _REASON, reason.encode())
            else:
                _remove(failed)
        self.failure = f"checkpoint of step {save.run_position.step} is not written: {reason}"
        self.failures_in_a_row += 1

    def _reason(self, save: "_Save", error: Exception) -> str:
        if not isinstance(error, OSError):
            return str(error)
        try:
            free = f"{shutil.disk_usage(self._root).free:,} bytes"
        except OSError:
            free = "unknown"
        remedy = _REMEDIES.get(error.errno or 0, "look at the disk")
        return f"{error.strerror} in {self._root}; needed {save.needed:,} bytes, free {free}; {remedy}"


def _require_no_failure(save: "_Save") -> None:
    """A save is given up by all ranks as soon as one of them has to.

    Raises:
        _NotWrittenError: with the reason of that one.
    """
    reason = _reason_of_others(save)
    if reason is not None:
        raise reason


def _reason_of_others(save: "_Save") -> "_NotWrittenError | None":
    """Why another rank could not write its part, if that is so: it has then taken the hidden folder away."""
    for failed in sorted(save.hidden.parent.glob(f"{save.hidden.name}{_FAILED}*")):
        give_reason_by = time.monotonic() + _SECONDS_TO_GIVE_A_REASON
        while not (failed / _REASON).exists() and time.monotonic() < give_reason_by:
            time.sleep(_POLL_SECONDS)
        try:
            return _NotWrittenError((failed / _REASON).read_text("utf-8"))
        except FileNotFoundError:
            return _NotWrittenError(f"rank {failed.name.rpartition(_FAILED)[2]} could not write its part")
    return None


def superseded(paths: Iterable[Path], newest: int, keep: int, keep_every: int | None) -> list[Path]:
    """The checkpoints that need not stay once that of step `newest` is written.

    Those of later steps go too: they are damaged, or of a line of training that was given up, and a run that
    takes up the greatest step must not meet them.
    """
    steps = {path: step for path in paths if (step := step_of(path)) is not None}
    proper = sorted({step for path, step in steps.items() if step <= newest and not is_set_aside(path)})
    stay = {step for step in proper if keep_every and step % keep_every == 0} | set(proper[-keep:])
    return [path for path, step in steps.items() if step not in stay or is_set_aside(path)]


def _remove(path: Path) -> None:
    """Remove a folder and all that is in it, or a file; a link, never what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@dataclass(frozen=True)
class _Save:
    """One save in progress."""

    run_position: RunPosition
    hidden: Path
    """Where it is made; no other save has had this name."""
    needed: int
    """Bytes of the tensors of all ranks."""

    def part_list(self, rank: int) -> Path:
        """What a rank has written."""
        return self.hidden / f"part-{rank:05d}.json"


class _NotWrittenError(Exception):
    """Why a save was given up, if it is not the disk."""
