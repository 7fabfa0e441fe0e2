"""The folder of a run: one set of settings, one log, its checkpoints, its model, its report."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mae.data.settings import DataSettings
from mae.errors import UserError, first_of
from mae.files import sync, write_atomically
from mae.settings import dump, flatten, load_yaml, to_dict
from mae.training.checkpoint import MODEL_FILE
from mae.training.settings import FREE_ON_RESUME

SETTINGS_FILE, METRICS_FILE, REPORT_FILE = "settings.yaml", "metrics.jsonl", "report.html"
BAD_SAMPLES_FILE = "bad-samples.txt"


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run, and what is written there."""

    path: Path

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
        differences = _differences(load_yaml(saved), to_dict(settings))
        if differences:
            raise UserError(
                f"run_dir {self.path} holds a run with other settings: "
                + first_of(differences, most=6)
                + "; start it with its own settings to resume it, or give another run_dir"
            )

    def with_its_statistics(self, data: DataSettings) -> DataSettings:
        """`data` with the mean and std that the run began with, unless they are set: they may be measured better since,
        but a run goes on with its own."""
        saved = self.path / SETTINGS_FILE
        if data.mean is not None or not saved.exists():
            return data
        before = flatten(load_yaml(saved))
        mean, std = before.get("data.mean"), before.get("data.std")
        return replace(data, mean=tuple(mean), std=tuple(std)) if mean and std else data

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

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to `metrics.jsonl`."""
        with (self.path / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def record_samples(self, rank: int, step: int, ids: Sequence[int]) -> None:
        """Append the ids that one rank takes at one step to its own file."""
        with (self.path / f"samples-rank{rank}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "ids": list(ids)}) + "\n")

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

    def publish_model(self, checkpoint: Path) -> None:
        """Put the final checkpoint's model where everybody looks for it."""
        part = self.model.with_name(f".{self.model.name}.part")
        shutil.copyfile(checkpoint / MODEL_FILE, part)
        sync(part)
        part.rename(self.model)
        sync(self.path)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    before, now = flatten(old), flatten(new)
    missing = "(not set)"
    return [
        f"{name} was {before.get(name, missing)}, is {now.get(name, missing)}"
        for name in dict.fromkeys([*before, *now])
        if name not in FREE_ON_RESUME and before.get(name, missing) != now.get(name, missing)
    ]
