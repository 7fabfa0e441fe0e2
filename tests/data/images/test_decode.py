import csv
import io
import pickle
import struct
import subprocess
import sys
import tarfile
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin

from data.jpegs import encoded as jpeg_of
from data.jpegs import photo
from mae.data.images.decode import FORMATS, decode, decode_pixels, is_gray, native_channels
from mae.errors import BadImageError

RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
RGB = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
RGBA = RNG.integers(0, 256, (5, 7, 4), dtype=np.uint8)


def encoded(pixels: np.ndarray | Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **options)
    return buffer.getvalue()


def npy(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


def pixels_of(data: bytes, channels: int) -> np.ndarray:
    """[height width channels]"""
    return decode(data, channels).permute(1, 2, 0).numpy()


def refused(data: bytes, message: str, channels: int = 3) -> None:
    with pytest.raises(BadImageError, match=message):
        decode(data, channels)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "BMP", "TIFF"])
def test_rgb_is_kept_by_every_lossless_format(file_format: str) -> None:
    image = decode(encoded(RGB, file_format, **({"lossless": True} if file_format == "WEBP" else {})), 3)
    assert (image.dtype, tuple(image.shape)) == (torch.uint8, (3, 5, 7))
    assert np.array_equal(image.permute(1, 2, 0).numpy(), RGB)


def test_jpeg_is_close_to_what_was_stored() -> None:
    smooth = np.linspace(0, 255, 16 * 16 * 3).reshape(16, 16, 3).astype(np.uint8)
    error = pixels_of(encoded(smooth, "JPEG", quality=100, subsampling=0), 3).astype(int) - smooth
    assert np.abs(error).max() <= 3


def test_s10_gray_stays_gray_or_becomes_three_equal_planes() -> None:
    assert np.array_equal(pixels_of(encoded(GRAY), 1)[:, :, 0], GRAY)
    assert np.array_equal(pixels_of(encoded(GRAY), 3), np.stack([GRAY] * 3, axis=2))


def test_s10_colour_becomes_luma() -> None:
    luma = RGB @ np.array([0.299, 0.587, 0.114])  # ITU-R 601-2
    assert np.abs(pixels_of(encoded(RGB), 1)[:, :, 0] - luma).max() <= 1


def test_s10_alpha_is_kept_by_four_channels_and_dropped_by_three() -> None:
    assert np.array_equal(pixels_of(encoded(RGBA), 4), RGBA)
    assert np.array_equal(pixels_of(encoded(RGBA), 3), RGBA[:, :, :3])
    assert np.array_equal(pixels_of(encoded(RGB), 4)[:, :, 3], np.full((5, 7), 255))


def test_s10_a_palette_becomes_its_colours() -> None:
    image = Image.fromarray((GRAY % 4).astype(np.uint8)).convert("P")
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 20, 30]], dtype=np.uint8)
    image.putpalette(colours.tobytes())
    for options in ({}, {"transparency": 1}, {"transparency": bytes([0, 100, 255, 3])}):
        assert np.array_equal(pixels_of(encoded(image, **options), 3), colours[GRAY % 4])


def test_s10_cmyk_becomes_rgb() -> None:
    ink = RGBA.astype(float)
    expected = (255 - ink[:, :, :3]) * (255 - ink[:, :, 3:]) / 255
    found = pixels_of(encoded(Image.frombytes("CMYK", RGBA.shape[1::-1], RGBA.tobytes()), "TIFF"), 3)
    assert np.abs(found - expected).max() <= 1


def test_s10_one_bit_becomes_black_and_white() -> None:
    bits = GRAY > 127
    assert np.array_equal(pixels_of(encoded(Image.fromarray(bits)), 1)[:, :, 0], bits * np.uint8(255))


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_s10_sixteen_bit_gray_keeps_its_upper_byte(file_format: str, channels: int) -> None:
    wide = RNG.integers(0, 65536, (5, 7), dtype=np.uint16)
    found = pixels_of(encoded(wide, file_format), channels)
    assert all(np.array_equal(found[:, :, plane], wide >> 8) for plane in range(channels))


def test_values_of_more_than_sixteen_bits_need_a_range() -> None:
    wide = np.array([[-5, 0, 255], [256, 65535, 70000]], dtype=np.int32)
    refused(encoded(wide, "TIFF"), "a TIFF of 32-bit integers, whose range is not known; set data.value_range")
    found = decode_pixels(encoded(wide, "TIFF"), 1, (0.0, 65536.0))
    assert found[:, :, 0].tolist() == [[0, 0, 0], [1, 255, 255]]
    refused(encoded(GRAY.astype(np.float32), "TIFF"), "a TIFF of floating-point numbers, whose range is not known")
    refused(npy(RGB.astype(np.uint16)), "a .npy array of uint16, whose range is not known; set data.value_range")


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF"])
def test_s10_images_are_turned_upright_by_their_exif_orientation(orientation: int, file_format: str) -> None:
    """Stored row 0 and column 0 lie as the EXIF standard (CIPA DC-008, tag 274) says."""
    exif = Image.Exif()
    exif[274] = orientation
    data = encoded(RGB, file_format, exif=exif, **({"lossless": True} if file_format == "WEBP" else {}))
    assert np.array_equal(pixels_of(data, 3), UPRIGHT[orientation](RGB))


def test_a_jpeg_is_turned_upright_too() -> None:
    half = np.zeros((8, 16, 3), dtype=np.uint8)
    half[:, :8] = 255
    exif = Image.Exif()
    exif[274] = 6
    found = pixels_of(encoded(half, "JPEG", exif=exif), 3)
    assert found.shape == (16, 8, 3)
    assert found[:7].min() > 200
    assert found[9:].max() < 50


def test_a_broken_exif_block_does_not_spoil_the_image() -> None:
    broken = b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12\0\x03\0\0"
    assert decode(encoded(RGB, "JPEG", exif=broken), 3).shape == (3, 5, 7)


@pytest.mark.parametrize("shape", [(1, 1), (1, 10_000), (10_000, 1)])
def test_s11_the_narrowest_images_decode(shape: tuple[int, int]) -> None:
    assert decode(encoded(np.zeros(shape, dtype=np.uint8)), 3).shape == (3, *shape)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_arrays_keep_every_channel(channels: int, order: str) -> None:
    array = np.asarray(RNG.integers(0, 256, (4, 6, channels), dtype=np.uint8), order=order)
    assert np.array_equal(pixels_of(npy(array), channels), array)


def test_a_flat_npy_array_is_one_plane() -> None:
    assert np.array_equal(pixels_of(npy(GRAY), 1)[:, :, 0], GRAY)


class Canary:
    """Unpickling one creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_x01_objects_in_an_npy_file_are_refused_and_not_unpickled(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    data = npy(np.array([[Canary(canary)]], dtype=object), allow_pickle=True)
    refused(data, r"it is not a valid \.npy array: Object arrays cannot be loaded")
    assert not canary.exists()
    np.load(io.BytesIO(data), allow_pickle=True)
    assert canary.exists()


def test_x01_what_python_could_unpickle_is_no_image(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    archive, legacy = io.BytesIO(), io.BytesIO()
    np.savez(archive, array=np.array([[Canary(canary)]], dtype=object))
    torch.save(Canary(canary), legacy)
    for data in (archive.getvalue(), pickle.dumps(Canary(canary)), legacy.getvalue()):
        for channels in (1, 3):
            refused(data, "it is not a valid image; allowed formats: JPEG, PNG", channels)
    assert not canary.exists()


def npy_claiming(shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return buffer.getvalue() + b"few"


@pytest.mark.parametrize(
    "data",
    [
        npy(RGB)[:-1],
        npy(RGB)[:20],
        b"\x93NUMPY",
        b"\x93NUMPY\x09\x00" + bytes(100),
        *(npy_claiming(shape) for shape in [(10**5, 10**5), (10**9, 10**9), (2**40, 2**40), (10**40, 1), (-1, 4)]),
    ],
    ids=["cut", "cut header", "magic only", "version 9", "1e5", "1e9", "2**40", "1e40", "negative"],
)
def test_damaged_npy_files_are_refused(data: bytes) -> None:
    refused(data, r"it is not a valid \.npy array")


@pytest.mark.parametrize(
    "array",
    [RGB.astype(complex), RGB.astype(bool), RGB[None], RGB[0, 0], RGB[:0], RGB[:, :, :0]],
    ids=["complex", "bool", "4-d", "1-d", "no rows", "no channels"],
)
def test_npy_arrays_of_another_type_or_shape_are_refused(array: np.ndarray) -> None:
    refused(npy(array), r"\.npy array is .*; allowed: integers or .* \[height width\] or \[height width channels\]")


@pytest.mark.parametrize(("data", "has"), [(npy(RGB), 3), (npy(GRAY), 1), (npy(np.zeros((2, 2, 5), np.uint8)), 5)])
def test_another_number_of_npy_channels_is_refused(data: bytes, has: int) -> None:
    refused(data, rf"it has {has} channels, but data\.channels is 4", channels=4)


@pytest.mark.parametrize("channels", [2, 5])
def test_picture_files_have_one_three_or_four_channels(channels: int) -> None:
    refused(encoded(RGB), rf"{channels} channels can only be read from \.npy files; allowed here: 1, 3, 4", channels)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "TIFF", "WEBP", "BMP"])
def test_s01_truncated_files_are_refused(file_format: str) -> None:
    data = encoded(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8), file_format)
    for length in (0, 1, 10, len(data) // 2, len(data) - 50):
        refused(data[:length], "it is not a valid image; allowed formats: JPEG, PNG|Error: |Premature end")


@pytest.mark.parametrize("data", [encoded(GRAY), npy(GRAY)], ids=["png", "npy"])
def test_every_cut_and_every_flip_either_decodes_or_is_a_bad_image(data: bytes) -> None:
    """No other exception escapes from what hostile bytes make of a decoder."""
    outcomes = set()
    for position in range(len(data)):
        for damaged in (data[:position], data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :]):
            try:
                outcomes.add(decode(damaged, native_channels(data)).ndim)
            except BadImageError:
                outcomes.add("bad")
    assert "bad" in outcomes


@pytest.mark.parametrize("bits", [b"\x00", b"\xff"])
def test_s10_sixteen_bit_colour_keeps_its_upper_byte(bits: bytes) -> None:
    """A PNG of 16-bit RGB, which Pillow cannot write."""
    rows = b"".join(b"\0" + b"".join(bytes([value]) + bits for value in row.ravel()) for row in RGB)
    header = struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0)
    assert np.array_equal(pixels_of(png_of(header, rows), 3), RGB)


def test_s10_gray_with_alpha_keeps_the_alpha_for_four_channels_only() -> None:
    data = encoded(Image.merge("LA", [Image.fromarray(GRAY), Image.fromarray(255 - GRAY)]))
    assert np.array_equal(pixels_of(data, 1)[:, :, 0], GRAY)
    assert np.array_equal(pixels_of(data, 3), np.stack([GRAY] * 3, axis=2))
    assert np.array_equal(pixels_of(data, 4), np.stack([GRAY, GRAY, GRAY, 255 - GRAY], axis=2))


def test_s10_a_transparent_colour_is_transparent_for_four_channels_only() -> None:
    data = encoded(GRAY, transparency=int(GRAY[2, 3]))
    assert np.array_equal(pixels_of(data, 3), np.stack([GRAY] * 3, axis=2))
    assert np.array_equal(pixels_of(data, 4)[:, :, 3], np.where(GRAY[2, 3] == GRAY, 0, 255))


@pytest.mark.parametrize("file_format", ["EPS", "GIF", "PDF", "PPM", "ICO", "TGA"])
def test_s13_formats_that_are_not_listed_are_refused_whatever_their_name(file_format: str) -> None:
    assert file_format not in FORMATS
    refused(encoded(RGB, file_format), "it is not a valid image; allowed formats: JPEG, PNG, WEBP, BMP, TIFF")


@pytest.mark.parametrize(
    "data", [b"", b"<html></html>", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", b"<svg/>"]
)
def test_s13_what_is_no_image_is_refused(data: bytes) -> None:
    refused(data, "it is not a valid image; allowed formats: JPEG, PNG, WEBP, BMP, TIFF")


def png_of(header: bytes, rows: bytes) -> bytes:
    """A PNG from the body of its header and its unpacked rows."""
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def png_claiming(width: int, height: int, rows: bytes = b"") -> bytes:
    """A valid PNG header and something else to fill it."""
    return png_of(struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), rows)


def jpeg_claiming(width: int, height: int) -> bytes:
    """A small JPEG whose header says it is large."""
    data = bytearray(jpeg_of(photo(8, 8)))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("claiming", [png_claiming, jpeg_claiming])
@pytest.mark.parametrize("side", [10_000, 20_000])
def test_s12_too_many_pixels_are_refused_by_the_header_alone(side: int, claiming: Callable[[int, int], bytes]) -> None:
    """Both above Pillow's limit and above twice the limit, where Pillow itself only warns below."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused(claiming(side, side), rf"{side}x{side} pixels; allowed: 89478485|exceeds limit of \d+ pixels")


def test_s12_the_limit_is_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64)
    for data in (encoded(photo(8, 8)), jpeg_of(photo(8, 8))):
        assert decode(data, 3).shape == (3, 8, 8)
    for data in (encoded(photo(8, 9)), jpeg_of(photo(8, 9))):
        refused(data, r"its header gives 9x8 pixels; allowed: 64 in total \(PIL\.Image\.MAX_IMAGE_PIXELS\)")


def text_bomb() -> bytes:
    """A PNG of one pixel with 320 MiB of compressed text."""
    info = PngImagePlugin.PngInfo()
    for number in range(5):
        info.add_text(f"text {number}", "a" * 2**26, zip=True)
    return encoded(np.zeros((1, 1), dtype=np.uint8), pnginfo=info)


BOMBS_CHILD = """
import resource, sys
from pathlib import Path
from mae.data.images.decode import decode
from mae.errors import BadImageError
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
for path in sys.argv[1:]:
    try:
        decode(Path(path).read_bytes(), 3)
        print("decoded")
    except BadImageError as error:
        print(error)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_x05_bombs_are_refused_with_little_memory(tmp_path: Path) -> None:
    """A process that may take no more than 256 MiB survives all of them and goes on."""
    bombs = {
        "pixels.png": png_claiming(20_000, 20_000),
        "pixels.jpg": jpeg_claiming(60_000, 60_000),
        "data.png": png_claiming(9000, 9000, bytes(10**6)),
        "text.png": text_bomb(),
        "claim.npy": npy_claiming((10**5, 10**5, 3)),
        "good.png": encoded(RGB),
    }
    for name, data in bombs.items():
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, "-c", BOMBS_CHILD, *(str(tmp_path / name) for name in bombs)]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
    lines = result.stdout.splitlines()
    assert (result.returncode, len(lines)) == (0, len(bombs)), result.stderr
    assert [line == "decoded" for line in lines] == [False] * (len(bombs) - 1) + [True], lines


def test_the_result_does_not_depend_on_how_python_treats_warnings() -> None:
    image = Image.fromarray(GRAY).convert("P")
    data = encoded(image, transparency=bytes(range(256)))  # Pillow warns about such a palette
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        lenient = decode(data, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(decode(data, 3), lenient)
    assert not heard


@pytest.mark.parametrize(
    ("data", "gray"),
    [
        (encoded(GRAY), True),
        (encoded(GRAY > 127), True),
        (encoded(GRAY.astype(np.uint16)), True),
        (encoded(GRAY, "JPEG"), True),
        (npy(GRAY), True),
        (npy(GRAY[:, :, None]), True),
        (encoded(RGB), False),
        (encoded(np.stack([GRAY] * 3, axis=2)), False),
        (encoded(RGBA), False),
        (encoded(Image.fromarray(GRAY).convert("P")), False),
        (encoded(Image.fromarray(GRAY).convert("LA")), False),
        (npy(RGB), False),
    ],
)  # fmt: skip
def test_is_gray_tells_whether_the_file_stores_one_plane(data: bytes, gray: bool) -> None:
    assert is_gray(data) is gray


@pytest.mark.parametrize(
    ("data", "channels"),
    [(encoded(GRAY), 3), (encoded(RGBA), 3), (npy(GRAY), 1), (npy(np.zeros((2, 2, 5), np.uint8)), 5)],
)
def test_native_channels_are_three_or_those_of_the_array(data: bytes, channels: int) -> None:
    assert native_channels(data) == channels
    assert len(decode(data, channels)) == channels


def test_threads_that_decode_at_once_hear_no_warning_and_change_no_filter() -> None:
    image = Image.fromarray(GRAY).convert("P")
    data = encoded(image, transparency=bytes(range(256)))
    expected, failures = decode(data, 3), []

    def decode_many() -> None:
        for _ in range(50):
            try:
                assert torch.equal(decode(data, 3), expected)
            except Exception as error:  # handed to the test's own thread
                failures.append(error)

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        before = len(warnings.filters)
        threads = [threading.Thread(target=decode_many) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(warnings.filters) <= before + 1  # Pillow's own are silenced by one filter, for good
    assert not failures
    assert not heard


# Of the machine this repository is developed on; nothing of it is needed for any other test.
EDGE_CASES = Path(__file__).parents[4] / "shared" / "data" / "image-edge-cases"
NOT_ALLOWED = ("GIF", "PPM", "AVIF")


@pytest.mark.skipif(not EDGE_CASES.is_dir(), reason="the folder ../shared/data is not there")
def test_every_edge_case_is_decoded_as_pillow_does_or_refused() -> None:
    manifest = list(csv.DictReader((EDGE_CASES / "MANIFEST.tsv").read_text().splitlines(), delimiter="\t"))
    with tarfile.open(EDGE_CASES / "image-edge-cases.tar.gz") as tar:
        files = {m.name.removeprefix("./"): tar.extractfile(m).read() for m in tar if m.isfile()}  # type: ignore[union-attr]
    assert len(manifest) == 126
    for entry in manifest:
        data = next(content for name, content in files.items() if name.endswith(entry["name"]))
        if entry["pillow_strict_decode"] != "ok" or entry["pil_format"] in NOT_ALLOWED:
            with pytest.raises(BadImageError):
                decode_pixels(data, 3)
            continue
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            assert np.array_equal(decode_pixels(data, 3), np.asarray(upright.convert("RGB"))), entry["name"]
