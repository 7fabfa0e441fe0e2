"""Where no TurboJPEG 3 is installed, and `MAE_TURBOJPEG` names none, only the search for it is tested."""

import ctypes.util
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from data.jpegs import encoded, photo, subsampled
from mae.data.images import jpeg, turbojpeg
from mae.data.images.decode import decode_pixels
from mae.data.images.jpeg import Box, decode_region, read_header
from mae.errors import BadImageError, UserError

LIBRARY = turbojpeg.find()
needs_the_library = pytest.mark.skipif(LIBRARY is None, reason="no TurboJPEG 3; MAE_TURBOJPEG=/path names one")


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The search starts afresh, and what it finds is forgotten."""
    turbojpeg.find.cache_clear()
    yield monkeypatch
    turbojpeg.find.cache_clear()


def test_nothing_is_found_where_nothing_is_installed_or_it_is_turned_off(search: pytest.MonkeyPatch) -> None:
    search.delenv("MAE_TURBOJPEG", raising=False)
    search.setattr(ctypes.util, "find_library", lambda _: None)
    assert turbojpeg.find() is None
    turbojpeg.find.cache_clear()
    search.setattr(ctypes.util, "find_library", lambda _: pytest.fail("it was told not to look"))
    search.setenv("MAE_TURBOJPEG", "")
    assert turbojpeg.find() is None


def test_a_library_without_the_functions_of_version_3_is_passed_over(search: pytest.MonkeyPatch) -> None:
    search.delenv("MAE_TURBOJPEG", raising=False)
    search.setattr(ctypes.util, "find_library", lambda _: "libc.so.6")
    assert turbojpeg.find() is None


def test_a_named_library_that_is_none_is_the_users_mistake(search: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "empty.so").write_bytes(b"")
    for path in (tmp_path / "missing.so", tmp_path / "empty.so", Path("libc.so.6")):
        search.setenv("MAE_TURBOJPEG", str(path))
        turbojpeg.find.cache_clear()
        with pytest.raises(UserError, match=r"MAE_TURBOJPEG=.* is not a TurboJPEG library of version 3"):
            turbojpeg.find()


def images() -> Iterator[tuple[str, bytes]]:
    for size in ((67, 93), (33, 17), (9, 100), (100, 9), (1, 40), (130, 200)):
        for subsampling in ("444", "422", "420", "440", "411", "Gray"):
            yield f"{size} {subsampling}", subsampled(photo(*size), subsampling)
        for subsampling in (0, 1, 2):
            for options in ({"progressive": True}, {"restart_marker_blocks": 3}, {"restart_marker_rows": 1}):
                yield f"{size} {subsampling} {options}", encoded(photo(*size), subsampling=subsampling, **options)


@needs_the_library
@pytest.mark.parametrize("scale", jpeg.SCALES)
def test_a_region_is_bit_by_bit_that_part_of_the_whole(scale: int) -> None:
    assert LIBRARY is not None
    generator = np.random.default_rng(scale)
    for name, data in images():
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        size = -(-height // scale), -(-width // scale)
        reduced = {} if scale == 1 else {"min_height": size[0], "min_width": size[1], "min_factor": scale}
        whole = simplejpeg.decode_jpeg(data, "RGB", **reduced)
        assert whole.shape[:2] == size
        boxes = [(0, 0, *size), (0, 0, 1, 1), (size[0] - 1, size[1] - 1, 1, 1)]
        for _ in range(15):
            top, left = (int(generator.integers(side)) for side in size)
            boxes.append(
                (top, left, *(int(generator.integers(1, n - o + 1)) for n, o in zip(size, (top, left), strict=True)))
            )
        for top, left, rows, columns in boxes:
            found = LIBRARY.decode_region(data, top, left, rows, columns, 3, scale)
            assert found is not None, name
            assert np.array_equal(found, whole[top : top + rows, left : left + columns]), (name, top, left)


@needs_the_library
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_library_changes_no_pixel(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, data in images():
        header = read_header(data)
        assert header is not None
        regions = [None, Box(0, 0, header.height, header.width), Box(header.height // 3, header.width // 2, 1, 1)]
        for region in regions:
            monkeypatch.setattr(turbojpeg, "find", lambda: LIBRARY)
            with_it = decode_region(data, header, channels, region)
            monkeypatch.setattr(turbojpeg, "find", lambda: None)
            without = decode_region(data, header, channels, region)
            assert with_it is not None
            assert without is not None
            assert np.array_equal(with_it, without), name


@needs_the_library
def test_s01_a_cut_file_is_refused_whatever_region_is_asked_for() -> None:
    data = encoded(photo(60, 60))
    header = read_header(data)
    assert header is not None
    for length in (len(data) // 2, len(data) - 30, len(data) - 2, len(data) - 1):
        with pytest.raises(BadImageError):
            decode_region(data[:length], header, 3, Box(0, 0, 4, 4))
    for intact in (data, data + b"more"):
        found = decode_region(intact, header, 3, Box(0, 0, 4, 4))
        assert found is not None
        assert np.array_equal(found, decode_pixels(data, 3)[:4, :4])


@needs_the_library
def test_what_the_library_cannot_read_is_left_to_others() -> None:
    assert LIBRARY is not None
    data = encoded(photo(16, 16))
    for bad in (b"", b"x", data[:100], b"\xff\xd8\xff" + bytes(100)):
        assert LIBRARY.decode_region(bad, 0, 0, 4, 4, 3) is None
    assert LIBRARY.decode_region(data, 10, 10, 20, 20, 3) is None
    assert LIBRARY.decode_region(data, 0, 0, 16, 16, 3) is not None


@needs_the_library
def test_threads_do_not_disturb_each_other() -> None:
    assert LIBRARY is not None
    library, wrong = LIBRARY, []
    files = [encoded(photo(40 + n, 90 - n)) for n in range(8)]
    wholes = [simplejpeg.decode_jpeg(data) for data in files]

    def decode_many(offset: int) -> None:
        for turn in range(100):
            n = (turn + offset) % len(files)
            found = library.decode_region(files[n], 3, 11, 30, 50, 3)
            if found is None or not np.array_equal(found, wholes[n][3:33, 11:61]):
                wrong.append(n)

    threads = [threading.Thread(target=decode_many, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
