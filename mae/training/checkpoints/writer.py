"""Writing of checkpoints: each appears whole or not at all, beside the training, and a full disk ends no run.

A checkpoint is made in a hidden folder. Every rank that writes flushes its files to the disk, then the list of them.
Rank 0 waits for all lists, writes the manifest last and renames the folder. Only then are older checkpoints removed.
This needs no collective, so all of it can run in a thread.
"""

import json
import os
import re
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Thread

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mae.errors import UserError
from mae.files import sync, write_atomically
from mae.run_files import MANIFEST_FILE, UNFINISHED
from mae.training.checkpoints.manifest import (
    SET_ASIDE,
    FileIdentity,
    Manifest,
    RunPosition,
    step_folder,
)
from mae.training.checkpoints.pending_save import NotWrittenError, PendingSave
from mae.training.checkpoints.retention import remove, superseded
from mae.training.checkpoints.tensor_files import HostCopy, LocalRows, file_name, local_rows
from mae.versions import library_versions

Tensors = Mapping[str, Mapping[str, Tensor]]
"""Groups (`model`, `optimizer`, `ema`) of named tensors, each whole or distributed by rows."""

# Seconds that rank 0 waits for the parts of the others, and once the run is leaving: they may be dead by then.
_PART_TIMEOUT, _EXIT_TIMEOUT = 600.0, 10.0


def bytes_needed(tensors: Tensors) -> int:
    """Return the bytes that the tensors of all ranks take in a checkpoint, without the small headers and manifest."""
    return sum(tensor.numel() * tensor.element_size() for group in tensors.values() for tensor in group.values())


class CheckpointWriter:
    """Saves checkpoints under `root`; keeps the `keep` newest, and every one whose step `keep_every` divides."""

    failure: str | None
    """Reason why the last save was not written; None if it was."""
    failures_in_a_row: int
    """Number of failed saves since the last one that was written."""
    warning: str | None
    """What could not be removed after the last save that was written."""
    on_commit: list[Callable[[int], None]]
    """Functions that rank 0 calls with the step of each checkpoint that is on the disk, in the thread that wrote it."""

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
        """Prepare to write as `rank`, one of the first `writers` ranks; other ranks write nothing.

        `launch_id` is a word that all ranks of this launch share and no earlier launch had.

        Raises:
            UserError: if the folder cannot be made.
        """
        if writers > 1 and not launch_id:
            raise ValueError(
                "several writers need a launch_id, which tells their parts from those of an earlier launch"
            )
        self.failure, self.failures_in_a_row, self.warning = None, 0, None
        self.on_commit = []
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
        """Copy `tensors` to host memory and write them from there; all ranks save at the same steps.

        Waits for the save before. Once it returns, the tensors may change. If the disk then fails, `failure` holds the
        reason. `metadata` goes into the header of every file.
        """
        self.wait()
        if self._rank >= self._writers:
            return
        self._saves += 1
        self._copy(tensors, metadata)
        notes = json.loads(json.dumps(run_position.notes))  # the loop continues to change its own
        save = PendingSave(
            replace(run_position, notes=notes),
            self._root / f"{UNFINISHED}{run_position.step:09d}-{self._launch_id}.{self._saves}",
            bytes_needed(tensors),
            self._rank,
            self._writers,
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
        """Wait for the save in progress, but not long for the parts of ranks that may be dead."""
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
        """Return what this rank writes of a group: its rows; on rank 0 also the tensors that every rank has."""
        parts = {
            name: local_rows(name, tensor, self._rank, self._writers) if isinstance(tensor, DTensor) else tensor
            for name, tensor in members.items()
        }
        return {name: part for name, part in parts.items() if self._rank == 0 or isinstance(part, LocalRows)}

    def _write(self, save: PendingSave) -> None:
        """Write a checkpoint, in the thread."""
        try:
            self._commit(save)
            self.failure, self.failures_in_a_row = None, 0
            if self._rank == 0:
                for tell in self.on_commit:
                    tell(save.run_position.step)
                self.warning = self._remove_older(save)
        except (OSError, NotWrittenError) as error:
            is_renamed = isinstance(error, FileNotFoundError)  # perhaps by another rank, which then has the reason
            self._give_up(save, (save.failure_of_others() if is_renamed else None) or error)
        except BaseException as bug:  # `wait` raises it in the main thread
            self._bug = bug

    def _give_up(self, save: PendingSave, error: Exception) -> None:
        self.failure = f"checkpoint of step {save.run_position.step} is not written: {save.give_up(error)}"
        self.failures_in_a_row += 1

    def _commit(self, save: PendingSave) -> None:
        if self._rank == 0:
            with suppress(OSError):  # tried again after the save, which then reports it
                self._remove_leftovers()
        save.require_no_failure()
        save.folder.mkdir(exist_ok=self._writers > 1)
        files = self._write_files(save)
        if self._rank > 0:
            save.list_part(files)
            return
        for rank in range(1, self._writers):
            files |= save.take_part(rank, deadline=lambda: self._deadline)  # `close` may shorten it meanwhile
        write_atomically(save.folder / MANIFEST_FILE, Manifest(save.run_position, library_versions(), files).to_json())
        self._put_in_place(save)

    def _write_files(self, save: PendingSave) -> dict[str, FileIdentity]:
        for group, copy in self._copies.items():
            name = copy.first_not_finite()
            if name is not None:
                raise NotWrittenError(f"{name} of the {group} is not finite")
        names = {group: file_name(group, self._rank, self._writers) for group in self._copies}
        return {names[group]: copy.write(save.folder / names[group]) for group, copy in self._copies.items()}

    def _put_in_place(self, save: PendingSave) -> None:
        """Rename the folder; an older checkpoint of this step stays on the disk, set aside, until then."""
        place = step_folder(self._root, save.run_position.step)
        if os.path.lexists(place):
            aside = place.with_name(f"{place.name}{SET_ASIDE}")
            if os.path.lexists(aside):
                self._remove_checkpoint(aside)
            place.rename(aside)
        save.folder.rename(place)
        sync(self._root)

    def _remove_older(self, save: PendingSave) -> str | None:
        """Remove superseded checkpoints, now that a new one is safe; return why if one cannot be removed."""
        try:
            self._remove_leftovers()
            for path in superseded(self._root.iterdir(), save.run_position.step, self._keep, self._keep_every):
                self._remove_checkpoint(path)
        except OSError as error:
            return f"{error.filename} cannot be removed ({error.strerror}); the disk may fill up"
        return None

    def _remove_checkpoint(self, path: Path) -> None:
        """Hide a checkpoint, then remove it, so that no reader finds half of it."""
        gone = self._root / f"{UNFINISHED}gone-{path.name}-{self._launch_id}.{self._saves}"
        path.rename(gone)
        remove(gone)

    def _remove_leftovers(self) -> None:
        """Remove what interrupted saves have left, but nothing of this save or the next, which other ranks may have
        begun."""
        for path in self._root.glob(f"{UNFINISHED}*"):
            match = re.match(rf"{re.escape(UNFINISHED)}\d+-{re.escape(self._launch_id)}\.(\d+)", path.name)
            if match is None or int(match[1]) < self._saves:
                remove(path)
