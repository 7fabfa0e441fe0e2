import io
import struct
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from data.jpegs import encoded, photo, subsampled
from mae.data.images import jpeg, turbojpeg
from mae.data.images.decode import decode_pixels
from mae.data.images.jpeg import Box, Header, decode_region, read_header, turned
from mae.errors import BadImageError

SUBSAMPLINGS = ("444", "422", "420", "440", "411", "Gray")


@pytest.fixture(autouse=True)
def _without_turbojpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turbojpeg, "find", lambda: None)


def pillows(data: bytes, channels: int) -> np.ndarray:
    """What Pillow makes of it: [height width channels]."""
    with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image)
        pixels = np.asarray(upright.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels]))
        return pixels.reshape(*pixels.shape[:2], channels)


def variants() -> Iterator[tuple[str, bytes]]:
    for size in ((67, 93), (64, 96), (1, 40), (40, 1), (1, 1), (16, 16)):
        for subsampling in SUBSAMPLINGS:
            yield f"{size} {subsampling}", subsampled(photo(*size), subsampling)
        for subsampling in (0, 1, 2):
            for options in ({"progressive": True}, {"restart_marker_rows": 1}, {"optimize": True, "quality": 30}):
                yield f"{size} {subsampling} {options}", encoded(photo(*size), subsampling=subsampling, **options)
        yield f"{size} rgb", encoded(photo(*size), keep_rgb=True)
        yield f"{size} cmyk", encoded_cmyk(photo(*size))


def encoded_cmyk(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert("CMYK").save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_s10_every_kind_of_jpeg_has_the_pixels_that_pillow_gives_it(channels: int) -> None:
    for name, data in variants():
        assert np.array_equal(decode_pixels(data, channels), pillows(data, channels)), name


def test_plain_gray_and_colour_jpegs_take_the_fast_way_and_cmyk_does_not() -> None:
    assert read_header(subsampled(photo(20, 30), "420")) == Header(20, 30, False, 1)
    assert read_header(subsampled(photo(20, 30), "Gray")) == Header(20, 30, True, 1)
    assert read_header(encoded_cmyk(photo(20, 30))) is None
    assert read_header(b"") is None
    assert read_header(b"\x89PNG") is None


def with_segment(data: bytes, body: bytes) -> bytes:
    """An APP1 segment behind the start of the image."""
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]


def tiff(entries: list[tuple[int, int, int, int]], order: str = ">") -> bytes:
    head = (b"MM\0*" if order == ">" else b"II*\0") + struct.pack(f"{order}IH", 8, len(entries))
    return head + b"".join(struct.pack(f"{order}HHIHH", *entry, 0) for entry in entries) + bytes(4)


PLAIN = encoded(photo(9, 14), subsampling=0)
XMP = b"http://ns.adobe.com/xap/1.0/\0"


@pytest.mark.parametrize("order", [">", "<"])
@pytest.mark.parametrize("orientation", range(10))
def test_s10_exif_orientations_are_read_as_pillow_reads_them(orientation: int, order: str) -> None:
    others = [(271, 2, 1, 65), (272, 2, 1, 65)]
    exif = tiff([others[0], (274, 3, 1, orientation), others[1]], order)
    data = with_segment(PLAIN, b"Exif\0\0" + exif)
    header = read_header(data)
    assert header is not None
    assert header.orientation == (orientation if 1 <= orientation <= 8 else 1)
    assert header.upright == pillows(data, 3).shape[:2]
    assert np.array_equal(decode_pixels(data, 3), pillows(data, 3))


@pytest.mark.parametrize(
    "body",
    [
        XMP + b'<x tiff:Orientation="6"/>',
        XMP + b"<tiff:Orientation>3</tiff:Orientation>",
        XMP + b'<x tiff:Orientation="9"/>',
        XMP + b"<x/>",
        b'other tiff:Orientation="6"',
        b"Exif\0\0" + tiff([(271, 2, 1, 65)]),
        b"Exif\0\0" + tiff([(274, 3, 1, 6), (274, 3, 1, 8)]),
        b"Exif\0\0" + tiff([(274, 4, 1, 6)]),
        b"Exif\0\0" + tiff([(274, 3, 2, 6)]),
        b"Exif\0\0" + tiff([(274, 3, 1, 6)])[:-8],
        b"Exif\0\0" + tiff([(274, 3, 1, 6)])[:6],
        b"Exif\0\0MM\0*\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
        b"Exif\0\0",
        b"Exif\0\0nothing of the kind",
        b"",
    ],
)
def test_s10_whatever_stands_in_its_metadata_an_image_is_turned_as_pillow_turns_it(body: bytes) -> None:
    data = with_segment(PLAIN, body)
    assert np.array_equal(decode_pixels(data, 3), pillows(data, 3))
    twice = with_segment(data, b"Exif\0\0" + tiff([(274, 3, 1, 8)]))
    assert np.array_equal(decode_pixels(twice, 3), pillows(twice, 3))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.sampled_from([b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12", XMP, b""]))
def test_hostile_metadata_neither_crashes_nor_spoils_the_image(body: bytes, start: bytes) -> None:
    data = with_segment(PLAIN, start + body)
    try:
        expected = pillows(data, 3)
    except Exception:
        expected = None
    header = read_header(data)
    if expected is None:
        assert header is None
    else:
        assert np.array_equal(decode_pixels(data, 3), expected)


@settings(max_examples=200, deadline=None)
@given(st.integers(2, len(PLAIN) - 1), st.integers(0, 255))
def test_any_byte_may_be_changed_and_nothing_but_a_bad_image_comes_of_it(place: int, value: int) -> None:
    data = PLAIN[:place] + bytes([value]) + PLAIN[place + 1 :]
    try:
        assert decode_pixels(data, 3).shape[2] == 3
    except BadImageError as error:
        assert str(error)  # noqa: PT017 (either is right)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_s01_a_file_cut_anywhere_is_refused_never_half_gray(options: dict[str, object]) -> None:
    data = encoded(photo(40, 60), **options)
    for length in (*range(0, len(data), 97), *range(len(data) - 40, len(data))):
        with pytest.raises(BadImageError):
            decode_pixels(data[:length], 3)


def test_s01_a_damaged_scan_is_refused() -> None:
    """Bytes that are no code of the file's tables: Pillow would give a shifted image without a word."""
    data = bytearray(encoded(photo(128, 64), restart_marker_rows=1))
    markers = [i for i in range(len(data) - 1) if data[i] == 0xFF and data[i + 1] in range(0xD0, 0xD8)]
    data[markers[3] + 1] = 0xD0 + (data[markers[3] + 1] - 0xD0 + 3) % 8
    assert pillows(bytes(data), 3).shape == (128, 64, 3)
    with pytest.raises(BadImageError, match=r"found marker 0xd\d instead of RST3"):
        decode_pixels(bytes(data), 3)


SCAN = PLAIN.index(b"\xff\xda") + 14


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (PLAIN[:-9], "Premature end of JPEG file"),
        (PLAIN[: SCAN + 40] + b"\xff\xd9" + PLAIN[SCAN + 42 :], "premature end of data segment"),
        (PLAIN[:SCAN] + b"\xff\0" * 40 + b"\xff\xd9", "bad Huffman code"),
        (PLAIN[:SCAN].replace(b"\xff\xc0", b"\xff\xc9") + b"\xff\0" * 40 + b"\xff\xd9", "bad arithmetic code"),
    ],
)
def test_s01_each_damage_is_known_by_the_words_of_libjpeg(data: bytes, words: str) -> None:
    with pytest.raises(BadImageError, match=words):
        decode_pixels(data, 3)


def test_bytes_between_the_markers_do_no_harm() -> None:
    """As in many a photo of the web; libjpeg-turbo complains, Pillow knows better."""
    data = PLAIN[:-2] + b"\0\1\2" + PLAIN[-2:]
    assert np.array_equal(decode_pixels(data, 3), pillows(data, 3))
    assert np.array_equal(decode_pixels(PLAIN + b"more", 3), pillows(PLAIN, 3))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("channels", [1, 3])
def test_a_region_is_a_part_of_the_upright_image(orientation: int, channels: int) -> None:
    data = with_segment(encoded(photo(50, 70)), b"Exif\0\0" + tiff([(274, 3, 1, orientation)]))
    header = read_header(data)
    assert header is not None
    whole = decode_region(data, header, channels)
    assert whole is not None
    assert np.array_equal(whole, pillows(data, channels))
    part = decode_region(data, header, channels, Box(5, 7, 20, 30))
    assert part is not None
    assert np.array_equal(part, whole[5:25, 7:37])


@pytest.mark.parametrize("scale", jpeg.SCALES)
@pytest.mark.parametrize("size", [(64, 96), (67, 93), (8, 8), (9, 100)])
def test_a_reduced_image_is_close_to_the_mean_of_its_pixels(scale: int, size: tuple[int, int]) -> None:
    smooth = np.asarray(Image.fromarray(photo(4, 4)).resize(size[::-1], Image.Resampling.BICUBIC))
    data = encoded(smooth, quality=100, subsampling=0)
    header = read_header(data)
    assert header is not None
    reduced = decode_region(data, header, 3, scale=scale)
    assert reduced is not None
    assert reduced.shape == (-(-size[0] // scale), -(-size[1] // scale), 3)
    inner = tuple(side // scale for side in size)
    means = smooth[: inner[0] * scale, : inner[1] * scale].reshape(inner[0], scale, inner[1], scale, 3).mean((1, 3))
    assert np.abs(reduced[: inner[0], : inner[1]] - means).mean() < 3


def test_turning_is_a_view() -> None:
    pixels = photo(5, 7)
    for orientation in range(1, 9):
        assert np.shares_memory(turned(pixels, orientation), pixels)
