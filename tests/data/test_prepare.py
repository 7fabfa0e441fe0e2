from collections.abc import Callable
from pathlib import Path

import pytest

from mae.data.loader import DataSettings
from mae.data.prepare import open_shards, resolve_statistics, statistics_of
from mae.data.statistics import INFO_FILE, PixelStatistics, measure

STORED = '{"splits": {"train": {"filenames": ["train-000000.tar"], "mean": [0.25], "std": [0.5]}}}'


def test_statistics_that_are_set_win_over_all_others(make_shards: Callable[..., Path]) -> None:
    folder = make_shards([2])
    (folder / INFO_FILE).write_text(STORED)
    data = DataSettings(channels=1, mean=(0.1,), std=(0.2,))
    said: list[str] = []
    assert resolve_statistics(open_shards((str(folder),), data), data, said.append) == data
    assert not said


def test_stored_statistics_win_over_measuring(make_shards: Callable[..., Path]) -> None:
    folder = make_shards([2])
    (folder / INFO_FILE).write_text(STORED)
    data = DataSettings(channels=3)
    said: list[str] = []
    resolved = resolve_statistics(open_shards((str(folder),), data), data, said.append)
    assert statistics_of(resolved) == PixelStatistics((0.25,) * 3, (0.5,) * 3)
    assert not said


def test_without_either_the_images_are_measured_and_it_is_said(make_shards: Callable[..., Path]) -> None:
    data = DataSettings(channels=1)
    index = open_shards((str(make_shards([3, 2])),), data)
    said: list[str] = []
    resolved = resolve_statistics(index, data, said.append)
    assert statistics_of(resolved) == measure(index, 1)[0]
    assert len(said) == 1
    assert "measured on 5 of 5 images" in said[0]
    assert f"mean {statistics_of(resolved).mean[0]:.4f}" in said[0]


@pytest.mark.parametrize("given", [True, False])
def test_gzipped_shards_go_into_the_cache_folder_that_is_set(
    make_shards: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: bool
) -> None:
    import gzip

    folder = make_shards([2])
    plain = folder / "train-000000.tar"
    (folder / "train-000000.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    data = DataSettings(cache_dir=tmp_path / "given" if given else None)
    (file,) = open_shards((str(folder),), data).files
    assert file.is_relative_to(tmp_path / ("given" if given else "xdg/mae"))
