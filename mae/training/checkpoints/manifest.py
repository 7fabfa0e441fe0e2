"""Manifest of a checkpoint, `manifest.json`: position of the run, versions of libraries, sha256 of every file."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mae.data.order import ORDER_VERSION
from mae.errors import CheckpointError
from mae.files import open_regular

FORMAT_VERSION = 3
_OLDER_FORMAT = 2
SET_ASIDE = ".old"
"""Suffix of a checkpoint's name while another of the same step replaces it."""
MALFORMED = (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""Errors, beside ValueError, of reading JSON that is not of the expected shape."""
_FOLDER = re.compile(rf"step-(\d+)(?:{re.escape(SET_ASIDE)})?")


class BadCheckpointError(CheckpointError):
    """Checkpoint that cannot be used."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"checkpoint {path} cannot be used: {reason}")
        self.reason = reason


@dataclass(frozen=True)
class DataPosition:
    """Position of a run in its data."""

    samples: int
    """Number of samples consumed since the start of training."""
    fingerprint: str
    """Hash of the samples and the order of the shards."""
    global_batch: int
    order_version: int = ORDER_VERSION


@dataclass(frozen=True)
class RunPosition:
    """Position of a run."""

    step: int
    """Number of optimiser steps done."""
    position: DataPosition
    settings: Mapping[str, Any] | None
    """Settings that decide the weights, by full name; None in a checkpoint of format 2, which holds only their hash."""
    notes: dict[str, Any]
    """JSON values that the loop and the pipeline find again after a resume."""


@dataclass(frozen=True)
class FileIdentity:
    """Size and hash with which a file is compared."""

    bytes: int
    sha256: str

    @staticmethod
    def of(path: Path) -> "FileIdentity":
        """Return the identity of a regular file on the disk."""
        with open_regular(path) as file:
            return FileIdentity(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())


@dataclass(frozen=True)
class Manifest:
    """Content of `manifest.json`."""

    run_position: RunPosition
    libraries: Mapping[str, str]
    """Versions of the libraries that wrote the checkpoint."""
    files: Mapping[str, FileIdentity]

    def to_json(self) -> bytes:
        """Return the text of the file, which includes its own sha256."""
        content = {
            "format_version": FORMAT_VERSION,
            **asdict(self.run_position),
            "libraries": dict(self.libraries),
            "files": {name: asdict(identity) for name, identity in self.files.items()},
        }
        return json.dumps(content | {"sha256": _digest(content)}, indent=2).encode()

    @staticmethod
    def from_json(text: bytes) -> "Manifest":
        """Parse the text of the file.

        Raises:
            ValueError: if it was changed after it was written, or has another format.
        """
        try:
            content = json.loads(text)
            found = content["format_version"]
            if found not in (_OLDER_FORMAT, FORMAT_VERSION):
                raise ValueError(
                    f"its format version is {found}, this program reads {_OLDER_FORMAT} and {FORMAT_VERSION}"
                )
            if content.pop("sha256") != _digest(content):
                raise ValueError("its content was changed")
            require_types(content, step=int, position=dict, notes=dict, libraries=dict, files=dict)
            require_types(content["position"], samples=int, fingerprint=str, global_batch=int, order_version=int)
            require_types(content["libraries"], **dict.fromkeys(content["libraries"], str))
            for identity in content["files"].values():
                require_types(identity, bytes=int, sha256=str)
            return Manifest(
                RunPosition(
                    content["step"],
                    DataPosition(**content["position"]),
                    # A hash would differ for each setting added since, so it is not compared; data, batch and the names
                    # and shapes of tensors still are.
                    None if found == _OLDER_FORMAT else dict(content["settings"]),
                    dict(content["notes"]),
                ),
                dict(content["libraries"]),
                {name: FileIdentity(**identity) for name, identity in content["files"].items()},
            )
        except MALFORMED as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None


def require_types(content: Mapping[str, Any], **types: type) -> None:
    """Raise a `ValueError` unless each of these entries has its type, and integers are not negative."""
    for name, wanted in types.items():
        value = content[name]
        if type(value) is not wanted or (isinstance(value, int) and value < 0):
            raise ValueError(f"{name} is {str(value)[:40]!r}")


def step_folder(root: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint, as `root/step-000000123`."""
    return root / f"step-{step:09d}"


def step_of(path: Path) -> int | None:
    """Return the step in the name of a checkpoint's folder; None for any other name."""
    match = _FOLDER.fullmatch(path.name)
    return int(match[1]) if match else None


def is_set_aside(path: Path) -> bool:
    """Return whether another checkpoint of the same step was about to replace this one."""
    return path.name.endswith(SET_ASIDE)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
