"""Tar files of any members and any tar format, and indexes of shards, made on the fly."""

import io
import tarfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest

from mae.data.index import ShardIndex
from mae.data.indexing import open_index
from mae.data.settings import DataSettings


@pytest.fixture
def write_tar(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a tar of (name, bytes) and returns its path."""

    def write(
        name: str,
        files: Mapping[str, bytes] | Iterable[tuple[str, bytes]],
        tar_format: int = tarfile.USTAR_FORMAT,
        **header: object,
    ) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", format=tar_format) as tar:
            for member, data in files.items() if isinstance(files, Mapping) else files:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                for field, value in header.items():
                    setattr(info, field, value)
                tar.addfile(info, io.BytesIO(data))
        return path

    return write


@pytest.fixture
def data_of(tmp_path: Path) -> Callable[..., DataSettings]:
    """A function that gives settings with a cache of their own."""
    return lambda **settings: DataSettings(cache_dir=tmp_path / "cache", **settings)


@pytest.fixture
def index_of(tmp_path: Path) -> Callable[..., ShardIndex]:
    """A function that gives the index of the shards at a path."""

    def make(path: Path) -> ShardIndex:
        return open_index([str(path)], tmp_path / "cache")

    return make


@pytest.fixture
def index(make_shards: Callable[..., Path], index_of: Callable[..., ShardIndex]) -> ShardIndex:
    """23 gray images of 8x8 pixels in three shards."""
    return index_of(make_shards([10, 1, 12]))
