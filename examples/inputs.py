"""What the examples are given: tars of samples, exported encoders, and the arguments that a result is stored with."""

import argparse
import json
import platform
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch

import mae
from mae.errors import UserError
from mae.files import write_atomically
from mae.formats.config_values import read_json

Decoded = TypeVar("Decoded")


def decoded(path: Path, limit: int | None, needs: str, decode: Callable[[dict[str, bytes]], Decoded]) -> list[Decoded]:
    """Decode the first `limit` samples of a tar; a sample is given as the contents of its files by extension.

    Raises:
        UserError: if there is no such tar, it has no sample, or one lacks what it `needs`.
    """
    samples: dict[str, dict[str, bytes]] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.removeprefix("./").partition(".")
                if (file := tar.extractfile(member)) is not None:
                    samples.setdefault(key, {})[extension] = file.read()
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UserError(f"{path} cannot be read as a tar ({error}); give a tar of {needs}") from error
    found = []
    for key, sample in list(samples.items())[:limit]:
        try:
            found.append(decode(sample))
        except (LookupError, OSError, TypeError, ValueError) as error:
            raise UserError(f"{path}: sample {key!r} cannot be used ({error!r}); each is {needs}") from error
    if not found:
        raise UserError(f"{path} holds no samples; give a tar of {needs}")
    return found


def image_of(sample: dict[str, bytes]) -> bytes:
    """Return the file of the image of a sample."""
    return sample["jpg"] if "jpg" in sample else sample["png"]


def parser_of(description: str, paths: Sequence[str]) -> argparse.ArgumentParser:
    """Return a parser that asks for the paths."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in paths:
        parser.add_argument(f"--{name}", type=Path, required=True)
    return parser


def count(text: str) -> int:
    """Return a number of things in an argument, at least 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def exported(folder: Path, size: Sequence[int], patch: int | None = None) -> str:
    """Return timm's name of a folder that `mae export --to timm` has written, for images of `size`.

    Raises:
        UserError: if it is none, or its patches are not squares of `patch` pixels or do not divide the size.
    """
    if "architecture" not in (read_json(folder / "config.json") or {}):
        raise UserError(f"{folder} is no export for timm; write one: mae export RUN --to timm --out {folder}")
    own = mae.load(folder, "cpu").description.patch_size
    if any(side < 1 or side % each for side, each in zip(size, own, strict=True)):
        raise UserError(f"images are {size[0]}x{size[1]}, which patches of {own[0]}x{own[1]} do not divide")
    if patch is not None and own != (patch, patch):
        raise UserError(f"--patch is {patch}, but {folder} has patches of {own[0]}x{own[1]}; give those")
    return f"local-dir:{folder}"


def record(args: argparse.Namespace) -> dict[str, Any]:
    """Return arguments, commit, versions and settings, to be stored with what is found.

    Raises:
        UserError: if the file could not be written at the end.
    """
    if args.out.is_dir() or not args.out.absolute().parent.is_dir():
        raise UserError(f"{args.out} cannot be written; give a file in a folder that exists")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__}
    settings = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    return {"arguments": sys.argv[1:], "commit": commit, "versions": versions, "settings": settings, "rows": {}}


def resumed(found: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return what `path` holds of a measurement that was stopped and began as `found` does; `found` if there is none.

    Raises:
        UserError: if the file holds no measurement, or one that began otherwise.
    """
    if not path.exists():
        return found
    try:
        earlier = json.loads(path.read_text())
        is_same = {**earlier, "rows": {}} == found
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is there, but holds no results ({error}); give another --out") from error
    if not is_same:
        raise UserError(f"{path} holds results of other arguments, code or versions; remove it, or give another --out")
    return earlier


def store(found: dict[str, Any], path: Path) -> None:
    """Write what is found so far; a stop leaves the old file or the new one."""
    write_atomically(path, f"{json.dumps(found)}\n".encode())
