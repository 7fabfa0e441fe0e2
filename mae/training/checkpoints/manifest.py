"""What `manifest.json` says of a checkpoint: where the run stands, who wrote it, and the sha256 of every file."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mae.data.order import ORDER_VERSION
from mae.errors import CheckpointError

FORMAT_VERSION = 2
MODEL_FILE, MANIFEST_FILE = "model.safetensors", "manifest.json"
SET_ASIDE = ".old"
"""Ends the name of a checkpoint while another of the same step takes its place."""
MALFORMED = (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""What reading JSON of another shape than expected raises, beside ValueError."""
_FOLDER = re.compile(rf"step-(\d+)(?:{re.escape(SET_ASIDE)})?")


class BadCheckpointError(CheckpointError):
    """A checkpoint that cannot be used."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"checkpoint {path} cannot be used: {reason}")
        self.reason = reason


@dataclass(frozen=True)
class DataPosition:
    """All there is to know of where a run stands in its data."""

    samples: int
    """Samples consumed since the start of training."""
    fingerprint: str
    """Which samples, in which order of shards."""
    global_batch: int
    order_version: int = ORDER_VERSION


@dataclass(frozen=True)
class RunPosition:
    """Where a run stands."""

    step: int
    """Optimiser steps done."""
    position: DataPosition
    settings: str
    """sha256 of the settings that decide what is learned."""
    notes: dict[str, Any]
    """What the loop and the pipeline have to remember, as JSON."""


@dataclass(frozen=True)
class FileIdentity:
    """What a file is held against."""

    bytes: int
    sha256: str

    @staticmethod
    def of(path: Path) -> "FileIdentity":
        """Read a file."""
        with path.open("rb") as file:
            return FileIdentity(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`."""

    run_position: RunPosition
    libraries: Mapping[str, str]
    """Versions of what wrote it."""
    files: Mapping[str, FileIdentity]

    def to_json(self) -> bytes:
        """As it is written, with the sha256 of itself."""
        content = {
            "format_version": FORMAT_VERSION,
            **asdict(self.run_position),
            "libraries": dict(self.libraries),
            "files": {name: asdict(identity) for name, identity in self.files.items()},
        }
        return json.dumps(content | {"sha256": _digest(content)}, indent=2).encode()

    @staticmethod
    def from_json(text: bytes) -> "Manifest":
        """As it was written.

        Raises:
            ValueError: if it was changed since, or is of another format.
        """
        try:
            content = json.loads(text)
            found = content["format_version"]
            if found != FORMAT_VERSION:
                raise ValueError(f"its format version is {found}, this program reads {FORMAT_VERSION}")
            if content.pop("sha256") != _digest(content):
                raise ValueError("it is changed")
            return Manifest(
                RunPosition(
                    int(content["step"]),
                    DataPosition(**content["position"]),
                    str(content["settings"]),
                    dict(content["notes"]),
                ),
                dict(content["libraries"]),
                {name: FileIdentity(**identity) for name, identity in content["files"].items()},
            )
        except MALFORMED as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None


def step_folder(root: Path, step: int) -> Path:
    """`root/step-000000123`."""
    return root / f"step-{step:09d}"


def step_of(path: Path) -> int | None:
    """The step in the name of a checkpoint's folder; none if it is no such name."""
    match = _FOLDER.fullmatch(path.name)
    return int(match[1]) if match else None


def is_set_aside(path: Path) -> bool:
    """Whether another of the same step was about to take its place."""
    return path.name.endswith(SET_ASIDE)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
