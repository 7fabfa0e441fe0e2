"""From settings to an index that may be trained on."""

import gzip
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import png

from mae.data.prepare import open_shards
from mae.data.reader import ImageReader
from mae.data.settings import DataSettings
from mae.errors import UserError


def npy(*shape: int) -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(shape, np.uint8))
    return file.getvalue()


@pytest.mark.parametrize(
    ("image", "extension", "planes", "fitting"),
    [
        pytest.param(png(0), "png", "1 or 3 or 4", (1, 3, 4), id="gray"),
        pytest.param(png(0, mode="RGB"), "png", "1 or 3 or 4", (1, 3, 4), id="colour"),
        pytest.param(npy(4, 4), "npy", "1", (1,), id="array-of-1"),
        pytest.param(npy(4, 4, 3), "npy", "3", (3,), id="array-of-3"),
        pytest.param(npy(4, 4, 5), "npy", "5", (5,), id="array-of-5"),
    ],
)
def test_other_channels_than_the_images_have_are_refused_with_the_number_to_set(
    write_tar: Callable[..., Path], data_of: Callable[..., DataSettings],
    image: bytes, extension: str, planes: str, fitting: tuple[int, ...],
) -> None:  # fmt: skip
    path = write_tar("x.tar", {f"{n:02}.{extension}": image for n in range(40)})
    for channels in (1, 2, 3, 4, 5):
        if channels in fitting:
            assert len(open_shards((str(path),), data_of(channels=channels), lambda text: None)) == 40
            continue
        with pytest.raises(UserError) as caught:
            open_shards((str(path),), data_of(channels=channels), lambda text: None)
        assert str(caught.value) == (
            f"16 of 16 inspected images cannot have {channels} channels (data.channels): "
            f"{path}: 00.{extension} has {planes}; {path}: 02.{extension} has {planes} and 14 more; "
            f"set it to {planes}"
        )


def test_as_many_images_of_other_channels_as_may_be_bad_are_no_reason_to_refuse(
    write_tar: Callable[..., Path], data_of: Callable[..., DataSettings]
) -> None:
    arrays = {"a.npy": npy(4, 4, 5), "b.npy": npy(4, 4, 2), "c.npy": npy(4, 4, 5), "d.npy": b"\x93NUMPY damaged"}
    path = write_tar("x.tar", arrays)
    message = rf"^1 of 4 inspected images cannot have 5 channels .*: {path}: b\.npy has 2; pack .* again without them$"
    with pytest.raises(UserError, match=message):
        open_shards((str(path),), data_of(channels=5), lambda text: None)
    assert len(open_shards((str(path),), data_of(channels=5, max_bad_samples=2), lambda text: None)) == 4
    with pytest.raises(UserError, match=r"^3 of 4 inspected images cannot have 3 channels .*; set it to 5$"):
        open_shards((str(path),), data_of(channels=3, max_bad_samples=5), lambda text: None)


def test_making_an_index_is_said_once(make_shards: Callable[..., Path], data_of: Callable[..., DataSettings]) -> None:
    folder, said = make_shards([2, 1]), list[str]()
    for _ in range(2):
        open_shards((str(folder),), data_of(), said.append)
    assert said == ["indexing 2 shards"]


def test_the_index_lies_where_it_is_set_to(
    make_shards: Callable[..., Path], data_of: Callable[..., DataSettings], tmp_path: Path
) -> None:
    index = open_shards((str(make_shards([2])),), data_of(index=tmp_path / "here"), lambda text: None)
    assert index.folder == tmp_path / "here"
    assert not (tmp_path / "cache" / "index").exists()


def test_samples_without_an_image_stop_the_run_unless_allowed_s03(
    write_tar: Callable[..., Path], data_of: Callable[..., DataSettings]
) -> None:
    path = write_tar("x.tar", {"a.png": png(0)} | {f"k{n}.cls": b"1" for n in range(7)})
    keys = "; ".join(f"{path}: k{n}" for n in range(5))
    with pytest.raises(UserError) as caught:
        open_shards((str(path),), data_of(), lambda text: None)
    assert str(caught.value).startswith(f"7 samples have no image: {keys} and 2 more; ")
    assert "--data.skip_without_image True" in str(caught.value)
    assert len(open_shards((str(path),), data_of(skip_without_image=True), lambda text: None)) == 1


def test_more_images_that_are_none_than_allowed_stop_the_run_s01(
    write_tar: Callable[..., Path], data_of: Callable[..., DataSettings]
) -> None:
    path = write_tar("x.tar", {"a.png": png(0), "b.png": b"<html>", "c.png": b""})
    for allowed in (0, 1):
        message = rf"^2 bad images: {path}: b\.png \(it begins .*; {path}: c\.png .*--data\.max_bad_samples$"
        with pytest.raises(UserError, match=message):
            open_shards((str(path),), data_of(max_bad_samples=allowed), lambda text: None)
    assert len(open_shards((str(path),), data_of(max_bad_samples=2), lambda text: None)) == 3


@pytest.mark.parametrize("given", [True, False])
def test_gzipped_shards_go_into_the_cache_folder_that_is_set(
    make_shards: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: bool
) -> None:
    folder = make_shards([2])
    plain = folder / "train-000000.tar"
    (folder / "train-000000.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    settings: dict[str, Any] = {"cache_dir": tmp_path / "given"} if given else {}
    data = DataSettings(**settings)
    index = open_shards((str(folder),), data, lambda text: None)
    cache = tmp_path / ("given" if given else "xdg/mae")
    (unpacked,) = cache.rglob("*.tar")
    reader = ImageReader(index, data.cache, data.cache_bytes)
    assert [reader.read(place) for place in reader.locate(np.arange(2))] == [png(0), png(1)]
    assert unpacked.is_relative_to(cache / "shards")


def test_what_is_not_used_is_said_at_every_start(
    write_tar: Callable[..., Path], data_of: Callable[..., DataSettings]
) -> None:
    path = write_tar("x.tar", {"README": b"", "a.png": png(0), "a.cls": b"cat", "b.png": png(1), "b.cls": b"-1"})
    empty = write_tar("y.tar", {})
    for _ in range(2):
        said = list[str]()
        open_shards((str(path), str(empty)), data_of(), said.append)
        assert said[-2:] == [
            f"warning: left out of the shards: files without an extension: 1 (the first: {path}: README), "
            f"labels that are no integer >= 0 of at most 18 digits: 2 (the first: {path}: a.cls is b'cat')",
            f"warning: 1 of 2 shards have no images: {empty}",
        ]


def test_images_with_dotted_names_are_counted_and_every_remedy_keeps_them(
    write_tar: Callable[..., Path], data_of: Callable[..., DataSettings]
) -> None:
    files = {f"{n}.jpg": png(n) for n in range(8)} | {f"cam.2024.{n:04d}.jpg": png(n) for n in range(100)}
    path = write_tar("x.tar", files)
    with pytest.raises(UserError) as caught:
        open_shards((str(path),), data_of(), lambda text: None)
    assert str(caught.value).startswith(
        f"100 image files belong to no sample, the first: {path}: cam.2024.0000.jpg: their extension begins at the "
        "first dot"
    )
    assert "pack the folder with mae pack" in str(caught.value)
    assert len(open_shards((str(path),), data_of(skip_without_image=True), lambda text: None)) == 8


def test_the_setting_of_the_images_extension_reaches_the_index(
    write_tar: Callable[..., Path], data_of: Callable[..., DataSettings]
) -> None:
    path = write_tar("x.tar", {f"{n}.{name}": png(n) for n in range(3) for name in ("image.png", "mask.png")})
    with pytest.raises(UserError, match=r"by data\.image_extension .* such as image\.png"):
        open_shards((str(path),), data_of(), lambda text: None)
    assert len(open_shards((str(path),), data_of(image_extension="image.png"), lambda text: None)) == 3
