"""The folder of a run: one set of settings, one log, its checkpoints, its model, its report."""

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
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class Rollback:
    """A return of the weights to an earlier step, while the data went on."""

    step: int
    """Of the checkpoint that was taken up again."""
    samples: int
    """Data position from which it went on."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run, and what is written there."""

    path: Path
    _locks: list[BinaryIO] = field(default_factory=list, repr=False, compare=False)

    @property
    def checkpoints(self) -> Path:
        """`step-NNNNNNNNN` folders."""
        return self.path / "checkpoints"

    @property
    def pictures(self) -> Path:
        """PNG files named by step."""
        return self.path / "pictures"

    @property
    def model(self) -> Path:
        """The whole model at the end of the run."""
        return self.path / MODEL_FILE

    @property
    def report(self) -> Path:
        """One self-contained page."""
        return self.path / REPORT_FILE

    @property
    def skipped(self) -> Path:
        """Samples of the steps that were skipped because loss or gradient was not finite."""
        return self.path / SKIPPED_FILE

    def check(self, settings: Any) -> None:
        """Refuse a folder that belongs to something else; read only, so that every rank may ask.

        Raises:
            UserError: if the folder holds other files or a run with other settings, naming the differences.
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
        """Refuse a run among the data, which may be read-only, shared, or cleared away.

        Raises:
            UserError: naming the folder of the shards that the run would lie in.
        """
        run = self.path.resolve()
        for folder in {Path(shard.url).parent for shard in shards if not shard.is_remote}:
            if run.is_relative_to(folder.resolve()):
                raise UserError(f"run_dir {self.path} lies in the folder of the shards, {folder}; give one outside")

    def with_its_statistics(self, data: DataSettings) -> DataSettings:
        """`data` with the mean and std that the run began with, unless they are set: they may be measured better since,
        but a run goes on with its own."""
        if data.mean is not None:
            return data
        before = self._begun_with()
        mean, std = before.get("data.mean"), before.get("data.std")
        return replace(data, mean=tuple(mean), std=tuple(std)) if mean and std else data

    def with_its_micro_batch(self, settings: Settings) -> Settings:
        """`settings` with the micro-batch that the run began with where one is to be found by trial: another one would
        change the last bits."""
        before = self._begun_with() if settings.micro_batch_size == AUTO else {}
        return replace(settings, micro_batch_size=before.get("micro_batch_size")) if before else settings

    def _begun_with(self) -> dict[str, Any]:
        """The settings that are saved here, by their full names; empty for a new run."""
        saved = self.path / SETTINGS_FILE
        return flatten(load_yaml(saved)) if saved.exists() else {}

    def create(self, settings: Any) -> None:
        """Make the folder and save the resolved settings.

        Raises:
            UserError: if the folder cannot be written.
        """
        try:
            self.pictures.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / SETTINGS_FILE, dump(settings).encode())
        except OSError as error:
            raise UserError(f"run_dir {self.path} cannot be written: {error.strerror}") from None

    def lock(self) -> None:
        """Keep every other process out until `unlock`, or until this one ends in whatever way.

        Raises:
            UserError: if another process, which is named, holds the folder, or if it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / LOCK_FILE).open("a+b")
        except OSError as error:
            raise UserError(f"run_dir {self.path} cannot be written: {error.strerror}") from None
        try:
            # A record lock is not inherited by workers, which may live a little longer than a trainer that is killed.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:
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
        """Let others in."""
        while self._locks:
            self._locks.pop().close()

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to `metrics.jsonl`."""
        self._append(METRICS_FILE, [record])

    def record_samples(self, rank: int, step: int, ids: Sequence[int]) -> None:
        """Append the ids that one rank takes at one step to its own file."""
        self._append(f"samples-rank{rank}.jsonl", [{"step": step, "ids": list(ids)}])

    def record_skipped(self, samples: Mapping[int, Sequence[int]]) -> None:
        """Append the sample ids of skipped steps, by step."""
        self._append(SKIPPED_FILE, [{"step": step, "ids": sorted(ids)} for step, ids in samples.items()])

    def record_rollback(self, rollback: Rollback) -> None:
        """Remember that the weights went back, also over a restart."""
        write_atomically(self.path / ROLLBACK_FILE, json.dumps(asdict(rollback)).encode())

    def rollback(self) -> Rollback | None:
        """The return of this run, of which there is one at most."""
        path = self.path / ROLLBACK_FILE
        return Rollback(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def record_exit(self, reason: str, message: str) -> None:
        """Write how this start of the run ended, for whoever decides about the next; launchers hide exit codes."""
        time = datetime.now(UTC).isoformat(timespec="seconds")
        record = {"reason": reason, "message": message, "time": time, "host": socket.gethostname()}
        with suppress(OSError):  # a full disk is what the message may be about
            write_atomically(self.path / EXIT_FILE, json.dumps(record, indent=2).encode())

    def forget_exit(self) -> None:
        """A start that has not ended yet has no reason for it."""
        (self.path / EXIT_FILE).unlink(missing_ok=True)

    def record_bad_samples(self, names: Sequence[str]) -> None:
        """Append bad images, which were replaced, to `bad-samples.txt`."""
        path = self.path / BAD_SAMPLES_FILE
        with path.open("a", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines(f"{name}\n" for name in names)

    def bad_samples(self) -> set[str]:
        """The bad images that the run has met so far."""
        path = self.path / BAD_SAMPLES_FILE
        return set(path.read_text("utf-8", "surrogateescape").splitlines()) if path.exists() else set()

    def metrics(self) -> list[dict[str, Any]]:
        """All whole lines of `metrics.jsonl`; a line cut off by a kill is left out."""
        path = self.path / METRICS_FILE
        if not path.exists():
            return []
        return [
            json.loads(line)
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
            if line.endswith("\n")
        ]

    def forget_after(self, step: int) -> None:
        """Drop the log of steps that will be run again."""
        kept = [record for record in self.metrics() if record["step"] <= step]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        write_atomically(self.path / METRICS_FILE, text.encode())

    def publish(self, weights: Mapping[str, Tensor], metadata: Mapping[str, str], name: str = MODEL_FILE) -> None:
        """Put a model where everybody looks for it; it appears whole."""
        write_weights(self.path / name, weights, metadata)

    def _append(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Add lines of JSON to a log. A log that cannot be written, on a full disk say, does not end a run."""
        path = self.path / name
        try:
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
        except OSError as error:
            with suppress(OSError):  # stderr may be on the same disk
                sys.stderr.write(f"warning: a line is missing from {path}: {error.strerror}\n")
