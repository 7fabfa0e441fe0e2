"""Tar files of any members and any tar format, made on the fly."""

import io
import tarfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest


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
