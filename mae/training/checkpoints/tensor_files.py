"""Tensor files of a checkpoint: plain safetensors, one for each group of tensors, or one for each group and rank.

`model.safetensors` holds a whole group. If every rank keeps only some rows of each tensor (FSDP2), rank 1 of 4 writes
its rows into `model-00001-of-00004.safetensors`, and the header names the tensor and the numbers of the rows.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from mae.files import flush
from mae.safetensors_file import CHUNK_BYTES, header, in_file_order
from mae.training.checkpoints.manifest import MALFORMED, FileIdentity

_SHARDS = "shards"
_FILE = re.compile(r"(?P<group>\w+?)(-(?P<rank>\d{5})-of-(?P<writers>\d{5}))?\.safetensors")


class DamagedFileError(Exception):
    """Tensor file that cannot be used, with the reason."""


@dataclass(frozen=True)
class LocalRows:
    """Rows of a tensor that one rank keeps."""

    rows: Tensor
    offset: int
    """Index of the first of them in the whole tensor."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""


def file_name(group: str, rank: int, writers: int) -> str:
    """Return the name of the file that `rank` of `writers` writes for a group."""
    return f"{group}.safetensors" if writers == 1 else f"{group}-{rank:05d}-of-{writers:05d}.safetensors"


def local_rows(name: str, tensor: DTensor, rank: int, writers: int) -> LocalRows | Tensor:
    """Return this rank's rows of a distributed tensor, or the whole tensor if every rank keeps all of it.

    Raises:
        ValueError: if it is not distributed by rows over all writing ranks.
    """
    mesh, placements = tensor.device_mesh, tuple(tensor.placements)
    local: Tensor = tensor.to_local()
    if mesh.size() == 1 or all(placement.is_replicate() for placement in placements):
        return local
    if placements != (Shard(0),) or mesh.size() != writers or mesh.get_local_rank() != rank:
        raise ValueError(
            f"{name} is distributed as {placements} over {mesh}; "
            f"rank {rank} of {writers} can only save tensors that are split by rows (Shard(0)) over all writing ranks"
        )
    begin, end = (first_row(tensor.shape[0], number, writers) for number in (rank, rank + 1))
    assert local.shape[0] == end - begin, f"{name} has {local.shape[0]} rows on rank {rank}, not {begin} to {end}"
    return LocalRows(local, begin, tuple(tensor.shape))


def first_row(rows: int, rank: int, writers: int) -> int:
    """Return the first row of a rank; all have equally many rows, only the last ones fewer or none (`torch.chunk`)."""
    return min(rank * math.ceil(rows / writers), rows)


class HostCopy:
    """Copy of the tensors of one file, in one block of host memory with the layout of the file.

    The block is kept for the next save. It is pinned if the tensors are on a GPU.
    """

    def __init__(self) -> None:
        self._layout: object = None
        self._block = torch.empty(0, dtype=torch.uint8)
        self._views: dict[str, Tensor] = {}
        self._header = b""

    def take(self, tensors: Mapping[str, Tensor | LocalRows], metadata: Mapping[str, str]) -> None:
        """Copy all tensors; from a GPU the copies only start, on the current stream."""
        shards = {
            name: {"offset": part.offset, "shape": part.shape}
            for name, part in tensors.items()
            if isinstance(part, LocalRows)
        }
        whole = {name: (part.rows if isinstance(part, LocalRows) else part).detach() for name, part in tensors.items()}
        self._arrange(whole)
        about = dict(metadata) | ({_SHARDS: json.dumps(shards, sort_keys=True)} if shards else {})
        self._header = header(self._views, about)
        for name, view in self._views.items():
            view.copy_(whole[name], non_blocking=whole[name].is_cuda)  # not safe on other devices

    def first_not_finite(self) -> str | None:
        """Return the name of a tensor that holds NaN or infinity, if any."""
        for name, view in self._views.items():
            if view.is_floating_point() and view.numel():
                values = view if view.element_size() > 1 else view.float()
                if not all(math.isfinite(float(extreme)) for extreme in values.aminmax()):
                    return name
        return None

    def write(self, path: Path) -> FileIdentity:
        """Write the file and flush it to the disk.

        Raises:
            OSError: if it cannot be written.
        """
        digest = hashlib.sha256()
        with path.open("xb") as file:
            for chunk in self._chunks():
                file.write(chunk)
                digest.update(chunk)
            flush(file)
        return FileIdentity(len(self._header) + self._block.numel(), digest.hexdigest())

    def _arrange(self, tensors: Mapping[str, Tensor]) -> None:
        """Give every tensor its place in the block."""
        names = in_file_order(tensors)
        pinned = any(tensor.is_cuda for tensor in tensors.values())
        layout = ([(name, tensors[name].dtype, tensors[name].shape) for name in names], pinned)
        if layout == self._layout:
            return
        sizes = [tensors[name].numel() * tensors[name].element_size() for name in names]
        self._block, self._views = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=pinned), {}
        for name, size, end in zip(names, sizes, accumulate(sizes), strict=True):
            place = self._block[end - size : end]
            self._views[name] = place.view(tensors[name].dtype).view(tensors[name].shape)
        self._layout = layout

    def _chunks(self) -> Iterable[bytes | memoryview]:
        yield self._header
        data = self._block.numpy().data
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]


def files_of(group: str, names: Iterable[str]) -> list[str]:
    """Return the files of a group, in the order of their ranks.

    Raises:
        DamagedFileError: if the files of some ranks are missing.
    """
    matches = sorted(_parse(name) for name in names)
    found = [match for match in matches if match.group == group]
    writers = found[0].writers if found else 0
    wanted = [file_name(group, rank, writers) for rank in range(writers)]
    if [match.name for match in found] != wanted:
        missing = sorted(set(wanted) - {match.name for match in found})
        raise DamagedFileError(f"the files of {group} do not belong together; missing: {missing}")
    return wanted


def groups_of(names: Iterable[str]) -> list[str]:
    """Return the groups that have files.

    Raises:
        DamagedFileError: if a name is not the name of a tensor file.
    """
    return sorted({_parse(name).group for name in names})


def require_whole(folder: Path, files: Sequence[str]) -> None:
    """Raise an error unless the files of a group can be read and hold every row of every tensor once.

    Raises:
        DamagedFileError: naming the file or the tensor.
    """
    with ExitStack() as opened:
        _stored(folder, files, opened)


def read_tensors(folder: Path, files: Sequence[str]) -> dict[str, Tensor]:
    """Return the whole tensors of a group from the files of all ranks that saved it.

    Raises:
        DamagedFileError: naming a file or tensor that is damaged.
    """
    with ExitStack() as opened:
        return {name: _joined(name, parts) for name, parts in _stored(folder, files, opened).items()}


class _FileName(NamedTuple):
    group: str
    rank: int
    writers: int
    name: str


def _parse(name: str) -> _FileName:
    match = _FILE.fullmatch(name)
    if match is None:
        raise DamagedFileError(f"{name} is not the name of a tensor file")
    return _FileName(match["group"], int(match["rank"] or 0), int(match["writers"] or 1), name)


@dataclass(frozen=True)
class _Stored:
    """Rows of a tensor in an open file."""

    file: Any
    offset: int
    """Index of the first row."""
    rows: int | None
    """Number of rows; None if the tensor was not distributed."""
    whole: tuple[int, ...]
    """Shape of the whole tensor."""
    kind: tuple[str, tuple[int, ...]]
    """Data type and shape of a row."""


def _stored(folder: Path, files: Sequence[str], opened: ExitStack) -> dict[str, list[_Stored]]:
    """Return the stored rows of each tensor, in order."""
    found: dict[str, list[_Stored]] = {}
    for name in files:
        try:
            file = opened.enter_context(safe_open(folder / name, framework="pt"))
            shards = json.loads((file.metadata() or {}).get(_SHARDS, "{}"))
            for tensor in file.keys():  # noqa: SIM118  not a mapping
                found.setdefault(tensor, []).append(_stored_rows(file, tensor, shards.get(tensor)))
        except (SafetensorError, OSError, ValueError, *MALFORMED) as error:
            raise DamagedFileError(f"{name} is a damaged safetensors file ({error})") from None
    for tensor, parts in found.items():
        parts.sort(key=lambda part: (part.offset, part.rows or 0))
        _require_all_rows(tensor, parts)
    return found


def _stored_rows(file: Any, name: str, shard: Mapping[str, Any] | None) -> _Stored:
    stored = file.get_slice(name)
    shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
    if shard is None:
        return _Stored(file, 0, None, shape, (dtype, shape))
    whole = tuple(int(length) for length in shard["shape"])
    return _Stored(file, int(shard["offset"]), shape[0], whole, (dtype, shape[1:]))


def _require_all_rows(name: str, parts: Sequence[_Stored]) -> None:
    """Raise an error unless every row of the tensor is in exactly one of `parts`, which are in order."""
    first = parts[0]
    if first.rows is None and len(parts) == 1:
        return
    end = 0
    for part in parts:
        if part.rows is None or (part.whole, part.kind) != (first.whole, first.kind) or part.whole[1:] != part.kind[1]:
            raise DamagedFileError(f"the parts of {name} belong to different tensors")
        if part.offset != end:
            trouble = "are missing" if part.offset > end else "are stored twice"
            raise DamagedFileError(f"rows {min(end, part.offset)} to {max(end, part.offset) - 1} of {name} {trouble}")
        end += part.rows
    if end != first.whole[0]:
        raise DamagedFileError(f"{name} has {end} rows in all, but should have {first.whole[0]}")


def _joined(name: str, parts: Sequence[_Stored]) -> Tensor:
    found: list[Tensor] = [part.file.get_tensor(name) for part in parts]
    # Copied, because tensors of safetensors still read the file, which may vanish.
    return found[0].clone() if parts[0].rows is None else torch.cat(found)
