"""Folder of a run: its settings, log, lock, checkpoints, model and report."""

import errno
import fcntl
import json
import os
import socket
import sys
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
from mae.files import write_atomically
from mae.models.weights import write_weights
from mae.settings import dump, flatten, load_yaml
from mae.training.checkpoints.manifest import MODEL_FILE
from mae.training.run_folder.compare import differences
from mae.training.settings import AUTO, TrainSettings

Settings = TypeVar("Settings", bound=TrainSettings)

SETTINGS_FILE, METRICS_FILE, REPORT_FILE = "settings.yaml", "metrics.jsonl", "report.html"
BAD_SAMPLES_FILE, SKIPPED_FILE = "bad-samples.txt", "skipped-steps.jsonl"
ROLLBACK_FILE, EXIT_FILE, LOCK_FILE = "rollback.json", "exit.json", ".lock"
# What a file system answers that has no locks.
_LOCKS_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


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
        return self.path / "checkpoints"

    @property
    def pictures(self) -> Path:
        """Folder of PNG files named by step."""
        return self.path / "pictures"

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
        saved = self.path / SETTINGS_FILE
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"run_dir {self.path} is a file; give a new or empty folder")
        if not saved.exists():
            if self.path.is_dir() and any(not p.name.startswith(".") for p in self.path.iterdir()):
                raise UserError(
                    f"run_dir {self.path} is not empty and holds no run ({SETTINGS_FILE} is missing); "
                    "give a new or empty folder"
                )
            return
        if found := differences(self._begun_with(), settings):
            raise UserError(
                f"run_dir {self.path} holds a run with other settings: "
                + first_of(found, most=6)
                + "; start it with its own settings to resume it, or give another run_dir"
            )

    def keep_out_of(self, shards: Iterable[Shard]) -> None:
        """Refuse a run folder inside a folder of shards, which may be read-only, shared, or cleared.

        Raises:
            UserError: if it is inside one, which is named.
        """
        run = self.path.resolve()
        for folder in {Path(shard.url).parent for shard in shards if not shard.is_remote}:
            if run.is_relative_to(folder.resolve()):
                raise UserError(f"run_dir {self.path} is in the folder of the shards, {folder}; give one outside it")

    def with_its_statistics(self, data: DataSettings) -> DataSettings:
        """Return `data` with the mean and std that the run began with, unless they are set.

        They may have been measured again since then, but must not change within a run.
        """
        if data.mean is not None:
            return data
        before = self._begun_with()
        mean, std = before.get("data.mean"), before.get("data.std")
        return replace(data, mean=tuple(mean), std=tuple(std)) if mean and std else data

    def with_its_micro_batch(self, settings: Settings) -> Settings:
        """Return `settings` with the run's first micro-batch in place of auto: another would change the last bits."""
        before = self._begun_with() if settings.micro_batch_size == AUTO else {}
        return replace(settings, micro_batch_size=before.get("micro_batch_size")) if before else settings

    def _begun_with(self) -> dict[str, Any]:
        """Return the saved settings by full name; empty for a new run."""
        saved = self.path / SETTINGS_FILE
        return flatten(load_yaml(saved)) if saved.exists() else {}

    def create(self, settings: Any) -> None:
        """Create the folder and save the resolved settings.

        Raises:
            UserError: if the folder cannot be written.
        """
        try:
            self.pictures.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / SETTINGS_FILE, dump(settings).encode())
        except OSError as error:
            raise UserError(f"run_dir {self.path} cannot be written: {error.strerror}") from None

    def lock(self) -> None:
        """Keep every other process out until `unlock`, or until this process ends in any way.

        Raises:
            UserError: if another process, which is named, has locked the folder, or if it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / LOCK_FILE).open("a+b")
        except OSError as error:
            raise UserError(f"run_dir {self.path} cannot be written: {error.strerror}") from None
        try:
            # A record lock is not inherited by workers, which may outlive a killed trainer for a moment.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _LOCKS_UNSUPPORTED:
                file.seek(0)
                holder = file.read().decode(errors="replace").strip() or "another process"
                file.close()
                raise UserError(
                    f"run_dir {self.path} is in use by {holder}; wait for it or end it, or give another run_dir"
                ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        file.flush()
        self._locks.append(file)

    def unlock(self) -> None:
        """Let other processes use the folder."""
        while self._locks:
            self._locks.pop().close()

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to `metrics.jsonl`."""
        self._append(METRICS_FILE, [record])

    def record_samples(self, rank: int, step: int, ids: Sequence[int]) -> None:
        """Append the sample ids of one rank at one step to the file of that rank."""
        self._append(f"samples-rank{rank}.jsonl", [{"step": step, "ids": list(ids)}])

    def record_skipped(self, samples: Mapping[int, Sequence[int]]) -> None:
        """Append the sample ids of skipped steps, by step."""
        self._append(SKIPPED_FILE, [{"step": step, "ids": sorted(ids)} for step, ids in samples.items()])

    def record_rollback(self, rollback: Rollback) -> None:
        """Save a rollback, so that it is also known after a restart."""
        write_atomically(self.path / ROLLBACK_FILE, json.dumps(asdict(rollback)).encode())

    def rollback(self) -> Rollback | None:
        """Return the rollback of this run, of which there is at most one."""
        path = self.path / ROLLBACK_FILE
        return Rollback(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def record_exit(self, reason: str, message: str) -> None:
        """Write how this launch ended, for the script that decides about the next; launchers hide exit codes."""
        time = datetime.now(UTC).isoformat(timespec="seconds")
        record = {"reason": reason, "message": message, "time": time, "host": socket.gethostname()}
        with suppress(OSError):  # the message may be about a full disk
            write_atomically(self.path / EXIT_FILE, json.dumps(record, indent=2).encode())

    def forget_exit(self) -> None:
        """Remove the record of how the last launch ended."""
        (self.path / EXIT_FILE).unlink(missing_ok=True)

    def record_bad_samples(self, names: Sequence[str]) -> None:
        """Append the names of bad images that were replaced to `bad-samples.txt`."""
        path = self.path / BAD_SAMPLES_FILE
        with path.open("a", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines(f"{name}\n" for name in names)

    def bad_samples(self) -> set[str]:
        """Return the names of the bad images that the run has found so far."""
        path = self.path / BAD_SAMPLES_FILE
        return set(path.read_text("utf-8", "surrogateescape").splitlines()) if path.exists() else set()

    def metrics(self) -> list[dict[str, Any]]:
        """Return the records of `metrics.jsonl`, without a last line that was cut off by a kill."""
        path = self.path / METRICS_FILE
        if not path.exists():
            return []
        return [
            json.loads(line)
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
            if line.endswith("\n")
        ]

    def forget_after(self, step: int) -> None:
        """Remove the records of later steps, which will be run again, from `metrics.jsonl`."""
        kept = [record for record in self.metrics() if record["step"] <= step]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        write_atomically(self.path / METRICS_FILE, text.encode())

    def publish(self, weights: Mapping[str, Tensor], metadata: Mapping[str, str], name: str = MODEL_FILE) -> None:
        """Write a model file atomically into the folder."""
        write_weights(self.path / name, weights, metadata)

    def _append(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Append lines of JSON to a log; one that cannot be written, as on a full disk, does not end the run."""
        path = self.path / name
        try:
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
        except OSError as error:
            with suppress(OSError):  # stderr may be on the same disk
                sys.stderr.write(f"warning: a line is missing from {path}: {error.strerror}\n")
