"""Images of more than 8 bits: 256 levels between two values, and a range that is proposed from what they hold."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mae.data.images.augment import AugmentSettings, TrainViews, eval_view, pixels_to_keep
from mae.data.images.decode import decode, decode_pixels, is_wide_colour, wide_values
from mae.data.images.levels import SIXTEEN_BITS, WideValues, check_value_range
from mae.errors import BadImageError, UserError

RNG = np.random.default_rng(0)
TWELVE_BITS = (0.0, 4096.0)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def saved(array: np.ndarray, file_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, file_format, **options)
    return file.getvalue()


def colour_png(array: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of 16 bits with 2 (gray and alpha), 3 or 4 planes, which Pillow cannot write."""
    height, width, planes = array.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[planes], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )


def levels(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """The formula, value by value, in exact rational numbers."""
    from fractions import Fraction

    def level(value: float) -> int:
        return min(255, max(0, (Fraction(value) - Fraction(low)) * 256 // (Fraction(high) - Fraction(low))))

    return np.array([level(value) for value in values.ravel().tolist()], np.uint8).reshape(values.shape)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "npy"])
def test_twelve_bits_in_sixteen_keep_all_levels(file_format: str) -> None:
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    data = npy(values) if file_format == "npy" else saved(values, file_format)
    found = decode_pixels(data, 1, TWELVE_BITS)[:, :, 0]
    assert np.array_equal(found, values >> 4)
    assert np.array_equal(found, levels(values, 0, 4096))
    assert np.array_equal(wide_values(data)[:, :, 0], values)
    if file_format != "npy":  # without a range, the upper eight bits: 16 levels
        assert np.array_equal(decode_pixels(data, 1)[:, :, 0], values >> 8)
        assert np.array_equal(decode_pixels(data, 1, SIXTEEN_BITS)[:, :, 0], values >> 8)
        assert np.array_equal(decode_pixels(data, 3, TWELVE_BITS), np.stack([values >> 4] * 3, axis=2))
        assert (decode_pixels(data, 4, TWELVE_BITS)[:, :, 3] == 255).all()


@pytest.mark.parametrize(
    "dtype", [np.uint16, np.int16, np.int32, np.uint32, np.int64, np.float16, np.float32, np.float64]
)
def test_arrays_of_every_type(dtype: str) -> None:
    values = RNG.integers(0, 30_000, (5, 7, 2)).astype(dtype)
    if np.dtype(dtype).kind != "u":
        values[0, 0, 0] = -20
    found = decode_pixels(npy(values), 2, (-10.0, 20_000.5))
    assert np.array_equal(found, levels(values.astype(np.float64), -10, 20_000.5))


def test_each_channel_may_have_its_range() -> None:
    values = RNG.uniform(-1, 5, (5, 7, 3))
    found = decode_pixels(npy(values), 3, (0.0, 1.0, -1.0, 5.0, 2.0, 3.0))
    for channel, (low, high) in enumerate([(0, 1), (-1, 5), (2, 3)]):
        assert np.array_equal(found[:, :, channel], levels(values[:, :, channel], low, high))
    plane = RNG.integers(0, 4096, (5, 7)).astype(np.uint16)
    found = decode_pixels(saved(plane, "PNG"), 3, (0.0, 4096.0, 0.0, 1024.0, 1000.0, 2000.0))
    for channel, (low, high) in enumerate([(0, 4096), (0, 1024), (1000, 2000)]):
        assert np.array_equal(found[:, :, channel], levels(plane, low, high))
    with pytest.raises(BadImageError, match=r"it has 2 channels, but .* is for 3"):
        decode_pixels(npy(values[:, :, :2].copy()), 2, (0.0, 1.0) * 3)


def test_levels_of_whole_numbers_are_exact() -> None:
    values = np.arange(5, 1_000_003, 7, dtype=np.int32).reshape(1, -1)
    expected = (values.astype(object) - 5) * 256 // (1_000_003 - 5)
    assert np.array_equal(decode_pixels(npy(values), 1, (5.0, 1_000_003.0))[:, :, 0], expected.astype(np.uint8))


def test_tiffs_of_unsigned_integers_beyond_two_billions() -> None:
    values = np.array([[0, 2**31, 2**32 - 1]], np.uint32)
    signed = saved(values.view(np.int32), "TIFF")
    entry = struct.pack("<HHIHH", 339, 3, 1, 2, 0)  # the format of samples: signed
    assert signed.count(entry) == 1
    signed = signed.replace(entry, struct.pack("<HHIHH", 339, 3, 1, 1, 0))
    assert decode_pixels(signed, 1, (0.0, float(2**32)))[:, :, 0].tolist() == [[0, 128, 255]]


def test_tiffs_of_wide_integers_and_of_floating_point_numbers() -> None:
    whole, real = RNG.integers(-50_000, 100_000, (6, 5)).astype(np.int32), RNG.random((6, 5)).astype(np.float32)
    assert np.array_equal(decode_pixels(saved(whole, "TIFF"), 1, (-5e4, 1e5))[:, :, 0], levels(whole, -5e4, 1e5))
    assert np.array_equal(decode_pixels(saved(real, "TIFF"), 1, (0.0, 1.0))[:, :, 0], levels(real, 0, 1))


@pytest.mark.parametrize("planes", [2, 3, 4])
def test_colour_of_sixteen_bits_cannot_be_divided_by_a_range(planes: int) -> None:
    values = RNG.integers(0, 65536, (5, 7, planes)).astype(np.uint16)
    data = colour_png(values)
    assert is_wide_colour(data)
    assert wide_values(data) is None
    assert np.array_equal(decode_pixels(data, 4), decode_pixels(data, 4, SIXTEEN_BITS))
    assert np.array_equal(decode_pixels(data, 4)[:, :, 0], values[:, :, 0] >> 8)
    with pytest.raises(BadImageError, match=r"colour image of 16 bits, .* convert it to \.npy"):
        decode_pixels(data, 3, TWELVE_BITS)
    plain = RNG.integers(0, 256, (5, 7, 3)).astype(np.uint8)
    for other in (saved(plain, "PNG"), saved(plain, "TIFF"), saved(values[:, :, 0], "PNG"), npy(values)):
        assert not is_wide_colour(other)


def test_values_that_are_not_numbers_are_bad_and_infinite_ones_are_extremes() -> None:
    values = np.array([[0.5, np.nan]], np.float32)
    for data in (npy(values), saved(values, "TIFF")):
        with pytest.raises(BadImageError, match=r"not numbers \(NaN\)"):
            decode_pixels(data, 1, (0.0, 1.0))
    extremes = np.array([[-np.inf, 0.5, np.inf]])
    assert decode_pixels(npy(extremes), 1, (0.0, 1.0)).ravel().tolist() == [0, 128, 255]
    found = WideValues()
    found.add(extremes[:, :, None], has_default=False)
    assert (found.least, found.greatest) == (0.5, 0.5)
    with pytest.raises(BadImageError, match="not numbers"):
        found.add(np.array([[[np.nan]]]), has_default=False)


def test_images_of_eight_bits_stay_as_they_are() -> None:
    pixels = RNG.integers(0, 256, (5, 7, 3)).astype(np.uint8)
    for data in (npy(pixels), saved(pixels, "PNG"), saved(pixels, "TIFF"), saved(pixels, "BMP")):
        assert np.array_equal(decode_pixels(data, 3, TWELVE_BITS), pixels)
        assert wide_values(data) is None
    assert wide_values(saved(pixels, "JPEG")) is None


def test_training_and_evaluation_see_the_same_levels() -> None:
    values = RNG.integers(0, 4096, (24, 24)).astype(np.uint16)
    data = saved(values, "PNG")
    import torch

    out = torch.zeros(2, 1, 24, 24, dtype=torch.uint8)
    whole = AugmentSettings(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=False)
    views = TrainViews(out, np.full((2, 23), 0.7), whole, value_range=TWELVE_BITS)
    views.add(data, [0])
    kept = pixels_to_keep(data, 1, (24, 24), TWELVE_BITS)
    assert kept is not None
    views.add(kept, [1])
    views.finish()
    expected = eval_view(decode(data, 1, TWELVE_BITS), (24, 24), 1.0)
    assert torch.equal(out[0], expected)
    assert torch.equal(out[1], expected)
    assert np.array_equal(expected[0], values >> 4)


@pytest.mark.parametrize(
    ("values", "proposal"),
    [
        (np.array([[0, 4095]], np.uint16), "0 4096"),
        (np.array([[7, 4096]], np.uint16), "0 8192"),
        (np.array([[0, 65535]], np.uint16), "0 65536"),
        (np.array([[-1000, 3071]], np.int16), "-1000 4096"),
        (np.array([[0.0, 1.0]]), "0 1.00000012"),
        (np.array([[0.0, 0.999]]), "0 1"),
        (np.array([[-2.5, 7.0]]), "-2.5 7.00000048"),
    ],
)
def test_the_proposed_range_holds_all_values(values: np.ndarray, proposal: str) -> None:
    found = WideValues()
    found.add(values[:, :, None], has_default=False)
    assert found.proposal == proposal
    low, high = map(float, proposal.split())
    assert low <= values.min() <= values.max() < high


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ((0.0,), "2 numbers, or 2 for each of 3 channels"),
        ((0.0, 1.0, 0.0, 1.0), "2 numbers, or 2 for each of 3 channels"),
        ((1.0, 1.0), "LOW < HIGH"),
        ((0.0, float("inf")), "both finite"),
    ],
)
def test_a_wrong_range_is_refused(value: tuple[float, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_value_range("data.value_range", value, 3)
