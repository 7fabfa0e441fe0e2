"""Folder of a run: its settings, log, lock, checkpoints, model and report."""

import json
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from torch import Tensor

from mae.data.settings import DataSettings
from mae.data.store.shards import Shard
from mae.errors import UserError, first_of
from mae.files import read_bounded, write_atomically
from mae.models.description import MODEL_FILE
from mae.models.weights import write_weights
from mae.run_files import CHECKPOINTS, METRICS_FILE, PICTURES, SETTINGS_FILE, keep_up_to, read_records
from mae.settings import check, check_name, dump, flatten
from mae.training.checkpoints.manifest import MALFORMED, FileIdentity, require_types
from mae.training.run_folder.compare import differences
from mae.training.run_folder.history import append_end, append_lines
from mae.training.run_folder.lock import cannot_be_written, lock_folder
from mae.training.settings import AUTO, TrainSettings
from mae.yaml_files import load_yaml

Settings = TypeVar("Settings", bound=TrainSettings)

REPORT_FILE = "report.html"
BAD_SAMPLES_FILE, SKIPPED_FILE = "bad-samples.txt", "skipped-steps.jsonl"
ROLLBACK_FILE, EXIT_FILE = "rollback.json", "exit.json"
# What a start makes before the settings are saved, or has made in earlier versions, if it is killed then.
_MADE_FIRST = {CHECKPOINTS, PICTURES, EXIT_FILE}
_MOST_BYTES, _MOST_BYTES_OF_NAMES = 1 << 16, 1 << 26


@dataclass(frozen=True)
class Rollback:
    """Return of a run to the weights of an earlier step, after which it continued with new data."""

    step: int
    """Step of the checkpoint to which it returned."""
    samples: int
    """Data position at which it continued."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run; reads and writes the files there."""

    path: Path
    _locks: list[BinaryIO] = field(default_factory=list, repr=False, compare=False)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints, which are called `step-NNNNNNNNN`."""
        return self.path / CHECKPOINTS

    @property
    def pictures(self) -> Path:
        """Folder of PNG files named by step."""
        return self.path / PICTURES

    @property
    def model(self) -> Path:
        """File of the complete model at the end of the run."""
        return self.path / MODEL_FILE

    @property
    def report(self) -> Path:
        """File of the report, a single self-contained page."""
        return self.path / REPORT_FILE

    @property
    def skipped(self) -> Path:
        """File of the sample ids of steps that were skipped because loss or gradient was not finite."""
        return self.path / SKIPPED_FILE

    def check(self, settings: Any) -> None:
        """Compare the folder with `settings`; reads only, so that every rank may call it.

        Raises:
            UserError: if the folder holds other files, or a run with other settings, which are named.
        """
        check_name("run_dir", self.path)
        if os.path.lexists(self.path) and not self.path.exists():
            raise UserError(f"run_dir {self.path} is a link that leads nowhere; give a new or empty folder")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"run_dir {self.path} is a file; give a new or empty folder")
        for name, is_folder in ((MODEL_FILE, False), (CHECKPOINTS, True), (PICTURES, True)):
            if os.path.lexists(self.path / name) and (self.path / name).is_dir() != is_folder:
                kinds = ("a folder", "a file") if is_folder else ("a file", "a folder")
                raise UserError(f"{self.path / name} is to be {kinds[0]}, but is {kinds[1]}; rename it")
        if not self.is_begun():
            if not self.is_new():
                raise UserError(
                    f"run_dir {self.path} is not empty and holds no run ({SETTINGS_FILE} is missing); "
                    "give a new or empty folder"
                )
        elif found := differences(self.begun_with(), settings):
            raise UserError(
                f"run_dir {self.path} holds a run with other settings: "
                + first_of(found, most=6)
                + f"; start it with its own settings to resume it, or give another run_dir{self._branch()}"
            )

    def is_begun(self) -> bool:
        """Return whether the folder holds a run."""
        return (self.path / SETTINGS_FILE).exists()

    def is_new(self) -> bool:
        """Return whether the folder does not exist, or holds only what a start that was killed leaves."""
        if not self.path.is_dir():
            return True
        return all(path.name.startswith(".") or self._is_made_first(path) for path in self.path.iterdir())

    def _is_made_first(self, path: Path) -> bool:
        is_empty = not path.is_dir() or all(entry.name.startswith(".") for entry in path.iterdir())
        return path.name in _MADE_FIRST and is_empty

    def _branch(self) -> str:
        """Return how to go on with other settings from the newest checkpoint, if there is one."""
        newest = max(self.checkpoints.glob("step-*"), default=None, key=lambda path: path.name)
        return f"; to go on from its weights with the new settings: --resume {newest} --run_dir NEW" if newest else ""

    def keep_out_of(self, shards: Iterable[Shard]) -> None:
        """Refuse a run folder inside a folder of shards, which may be read-only, shared, or cleared.

        Raises:
            UserError: if it is inside one, which is named.
        """
        run = Path(os.path.realpath(self.path))
        for folder in {Path(shard.url).parent for shard in shards if not shard.is_remote}:
            if run.is_relative_to(os.path.realpath(folder)):
                raise UserError(f"run_dir {self.path} is in the folder of the shards, {folder}; give one outside it")

    def with_its_statistics(self, data: DataSettings) -> DataSettings:
        """Return `data` with the mean, std and range of values that the run began with, unless they are set.

        They may have been measured again since then, or inherited, but must not change within a run.
        """
        before = self.begun_with()
        if data.value_range is None:
            data = replace(data, value_range=self._saved_numbers(before, "data.value_range"))
        if data.mean is None:
            mean, std = (self._saved_numbers(before, name) for name in ("data.mean", "data.std"))
            if mean and std:
                data = replace(data, mean=mean, std=std)
        return data

    def _saved_numbers(self, before: Mapping[str, Any], name: str) -> tuple[float, ...] | None:
        """Return a list of numbers that the run has saved in its settings; None without any."""
        values = before.get(name)
        if not values:
            return None
        is_saved = isinstance(values, list) and all(type(value) in (int, float) for value in values)
        check(is_saved, f"{self.path / SETTINGS_FILE}: {name}", values, "what the run has saved there; restore it")
        return tuple(map(float, values))

    def with_its_micro_batch(self, settings: Settings) -> Settings:
        """Return `settings` with the run's first micro-batch in place of auto: another would change the last bits.

        Raises:
            UserError: if the run began without a limit, with which auto would change nothing.
        """
        before = self.begun_with() if settings.micro_batch_size == AUTO else {}
        found = before.get("micro_batch_size")
        is_saved = found is None or type(found) is int
        check(is_saved, f"{self.path / SETTINGS_FILE}: micro_batch_size", found, "what the run has saved; restore it")
        if not before:
            return settings
        if found is None:
            raise UserError(
                f"run_dir {self.path} holds a run that began without micro_batch_size, which {AUTO} cannot change; "
                f"give another run_dir{self._branch()}"
            )
        return replace(settings, micro_batch_size=found)

    def begun_with(self) -> dict[str, Any]:
        """Return the saved settings by full name; empty for a new run."""
        return flatten(load_yaml(self.path / SETTINGS_FILE)) if self.is_begun() else {}

    def create(self, settings: Any) -> None:
        """Create the folder and save the resolved settings.

        Raises:
            UserError: if the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / SETTINGS_FILE, dump(settings).encode())
            self.pictures.mkdir(exist_ok=True)
        except OSError as error:
            raise cannot_be_written(self.path, error) from None

    def lock(self) -> None:
        """Keep every other process out until `unlock`, or until this process ends in any way.

        Raises:
            UserError: if another process, which is named, has locked the folder, or if it cannot be written.
        """
        self._locks.append(lock_folder(self.path))

    def unlock(self) -> None:
        """Let other processes use the folder."""
        while self._locks:
            self._locks.pop().close()

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to `metrics.jsonl`."""
        append_lines(self.path / METRICS_FILE, [record])

    def record_samples(self, rank: int, step: int, ids: Sequence[int]) -> None:
        """Append the sample ids of one rank at one step to the file of that rank."""
        append_lines(self.path / f"samples-rank{rank}.jsonl", [{"step": step, "ids": list(ids)}])

    def record_skipped(self, samples: Mapping[int, Sequence[int]]) -> None:
        """Append the sample ids of skipped steps, by step."""
        records = [{"step": step, "ids": sorted(ids)} for step, ids in samples.items()]
        append_lines(self.path / SKIPPED_FILE, records)

    def record_rollback(self, rollback: Rollback) -> None:
        """Save a rollback, so that it is also known after a restart."""
        write_atomically(self.path / ROLLBACK_FILE, json.dumps(asdict(rollback)).encode())

    def rollback(self) -> Rollback | None:
        """Return the rollback of this run, of which there is at most one.

        Raises:
            UserError: if the file is damaged.
        """
        path = self.path / ROLLBACK_FILE
        if not os.path.lexists(path):
            return None
        try:
            found = json.loads(read_bounded(path, _MOST_BYTES))
            require_types(found, step=int, samples=int)
        except (OSError, ValueError, *MALFORMED) as error:
            raise UserError(f"{path} cannot be used: {type(error).__name__}: {error}; restore or remove it") from None
        return Rollback(found["step"], found["samples"])

    def record_exit(self, reason: str, message: str) -> None:
        """Write how this launch ended, for the script that decides about the next; launchers hide exit codes."""
        time = datetime.now(UTC).isoformat(timespec="seconds")
        record = {"reason": reason, "message": message, "time": time, "host": socket.gethostname()}
        with suppress(OSError):  # the message may be about a full disk
            write_atomically(self.path / EXIT_FILE, json.dumps(record, indent=2).encode())
            append_end(self.path, reason, message)

    def forget_exit(self) -> None:
        """Remove the record of how the last launch ended."""
        (self.path / EXIT_FILE).unlink(missing_ok=True)

    def last_exit(self) -> str | None:
        """Return how the last launch ended; None if it is unknown."""
        try:
            return str(json.loads(read_bounded(self.path / EXIT_FILE, _MOST_BYTES))["reason"])
        except (OSError, ValueError, *MALFORMED):
            return None

    def record_bad_samples(self, names: Sequence[str]) -> None:
        """Append the names of bad images that were replaced to `bad-samples.txt`."""
        path = self.path / BAD_SAMPLES_FILE
        with path.open("a", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines(f"{name}\n" for name in names)

    def bad_samples(self) -> set[str]:
        """Return the names of the bad images that the run has found so far."""
        path = self.path / BAD_SAMPLES_FILE
        text = read_bounded(path, _MOST_BYTES_OF_NAMES) if os.path.lexists(path) else b""
        return set(text.decode("utf-8", "surrogateescape").splitlines())

    def metrics(self) -> list[dict[str, Any]]:
        """Return the records of `metrics.jsonl`, each with a step, without lines that are no records."""
        return read_records(self.path / METRICS_FILE)

    def forget_after(self, step: int) -> str | None:
        """Remove the records of later steps, which will be run again, from `metrics.jsonl`.

        Lines that are no records are removed too; what happened to them is returned.
        """
        path = self.path / METRICS_FILE
        found = keep_up_to(path, step)
        return found and f"{path}: {found[0]:,} lines are no records of this run; they are kept in {found[1].name}"

    def publish(self, weights: Mapping[str, Tensor], metadata: Mapping[str, str], name: str = MODEL_FILE) -> str:
        """Write a model file atomically into the folder, and return its sha256."""
        return write_weights(self.path / name, weights, metadata)

    def damage(self, name: str, sha256: str) -> str | None:
        """Return what is wrong with a published file, which should have this hash; None if nothing is."""
        try:
            return None if FileIdentity.of(self.path / name).sha256 == sha256 else "has changed since it was written"
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read ({error.strerror})"
