"""Files of weights of other programs: what they are, and the tensors in them."""

import json
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from mae.errors import UserError
from mae.files import open_regular, read_bounded
from mae.formats.restricted import read_checkpoint

REMEDY = "give a run of mae, a checkpoint, or weights of timm, transformers, torchvision or the original MAE code"
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model.pth",
    "model.pth",
)
"""Names of the weights in a model folder, the first that is there being read."""
_INDEX = ".index.json"
_INDEX_BYTES = 1 << 26
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
# First bytes of a file, and what it is.
_BEGINNINGS = (
    (b"version https://git-lfs", "a pointer of Git LFS in place of the file, which `git lfs pull` fetches"),
    (b"<", "a web page, probably in place of a download that failed"),
    (b"\x1f\x8b", "a gzip file"),
    (b"\x89HDF", "an HDF5 file, probably of Keras"),
    (b"GGUF", "a GGUF file"),
)
# Tensors within a checkpoint, the first that is there being read: averages come first, as in timm.
_PARTS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher")
# What wrappers put before each name.
_WRAPPERS = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class StoredTensors:
    """Tensors of a file, and what the file says beside them."""

    files: tuple[Path, ...]
    tensors: dict[str, Tensor]
    """Tensors by name, without what wrappers put before it."""
    header: Mapping[str, str] = field(default_factory=dict)
    """Texts in the header of a safetensors file, or at the top of a checkpoint."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the training program, as the published one saves them."""


def is_safetensors(path: Path) -> bool:
    """Return whether a file begins as a safetensors file does, whatever the length of its header looks like."""
    return _beginning(path)[4:9] == b"\0\0\0\0{"


def read_tensors(path: Path) -> StoredTensors:
    """Read a safetensors file, an index of several, or a PyTorch checkpoint.

    Raises:
        UserError: if it is missing, damaged, no such file, or holds no tensors; or if it asks for code.
    """
    if path.name.endswith(_INDEX):
        return _read_shards(path)
    found = _read_file(path)
    if not found.tensors:
        raise UserError(f"{path} holds no weights; {REMEDY}")
    return found


def _read_file(path: Path) -> StoredTensors:
    beginning = _beginning(path)
    if not beginning:
        raise UserError(f"{path} is empty; {REMEDY}")
    if is_safetensors(path):
        return _read_safetensors(path)
    if beginning.startswith((_ZIP, _PICKLE)):
        return _of_checkpoint(path, read_checkpoint(path))
    kinds = (kind for first, kind in _BEGINNINGS if beginning.lstrip().startswith(first))
    kind = next(kinds, "not an intact safetensors file, nor any other file of weights that is known")
    raise UserError(f"{path} is {kind}; {REMEDY}")


def _beginning(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read(64)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {REMEDY}") from None


def _read_safetensors(path: Path) -> StoredTensors:
    try:
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
        return StoredTensors((path,), _named(load_file(path), path), header)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise UserError(f"{path} is not an intact safetensors file: {error}") from None


def _of_checkpoint(path: Path, content: Any) -> StoredTensors:
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__} instead of tensors by name; {REMEDY}")
    parts = (content[name] for name in _PARTS if isinstance(content.get(name), Mapping))
    named = ((name, each) for name, each in next(parts, content).items() if isinstance(name, str))
    tensors = {name: each for name, each in named if isinstance(each, Tensor)}
    header = {name: text for name, text in content.items() if isinstance(name, str) and isinstance(text, str)}
    given = content.get("args")
    return StoredTensors((path,), _named(tensors, path), header, vars(given) if isinstance(given, Namespace) else {})


def _read_shards(path: Path) -> StoredTensors:
    """Read the files that an index of transformers names, all beside it."""
    try:
        places = {str(name): file for name, file in json.loads(read_bounded(path, _INDEX_BYTES))["weight_map"].items()}
        names = sorted(set(places.values()))
        if any(Path(name).name != name or name in ("", "..") or "\0" in name for name in names):
            raise ValueError("a file is elsewhere")
        if not names:
            raise ValueError("it names no file")
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise UserError(f"{path} is not an index of weights: {error}") from None
    shards = {name: _read_file(path.with_name(name)) for name in names}
    tensors: dict[str, Tensor] = {}
    for name, file in places.items():
        if (tensor := shards[file].tensors.get(_unwrapped(name))) is None:
            raise UserError(f"{path} says that {name} is in {file}, which holds no such tensor; copy both again")
        tensors[_unwrapped(name)] = tensor
    return StoredTensors((path, *(file for shard in shards.values() for file in shard.files)), tensors)


def _named(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return tensors by their names without wrappers.

    Raises:
        UserError: if two have one name then.
    """
    found = {_unwrapped(name): tensor for name, tensor in tensors.items()}
    if len(found) < len(tensors):
        twice = next(name for name in found if sum(_unwrapped(each) == name for each in tensors) > 1)
        raise UserError(f"{path} holds {twice} twice, with and without {' or '.join(_WRAPPERS)}; keep one of them")
    return found


def _unwrapped(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    return name
