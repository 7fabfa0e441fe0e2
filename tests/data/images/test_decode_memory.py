"""Decoding and measuring an image takes at most a stated number of bytes per pixel, whatever its format."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import in_own_process
from PIL import Image

from mae.data.images import decode as module
from mae.data.images.decode import decode, native_channels
from mae.data.statistics import PixelSums, SetPixels
from mae.errors import BadImageError
from mae.training.memory import forget_peak_memory, give_back, memory_in_use, peak_memory

BYTES_PER_PIXEL = 24
HEIGHT, WIDTH = 1000, 4000


def image(mode: str) -> Image.Image:
    return Image.new(mode, (WIDTH, HEIGHT), 1)


def wide(dtype: Any) -> Image.Image:
    return Image.fromarray(np.full((HEIGHT, WIDTH), 777, dtype))


FORMATS: dict[str, Callable[[io.BytesIO], None]] = {
    "rgb png": lambda file: image("RGB").save(file, "PNG"),
    "rgba png": lambda file: image("RGBA").save(file, "PNG"),
    "gray and alpha png": lambda file: image("LA").save(file, "PNG"),
    "palette png": lambda file: image("P").save(file, "PNG"),
    "16-bit png": lambda file: wide(np.uint16).save(file, "PNG"),
    "32-bit tiff": lambda file: wide(np.int32).save(file, "TIFF", compression="tiff_lzw"),
    "float npy": lambda file: np.save(file, np.ones((HEIGHT, WIDTH, 3), np.float32)),
    "cmyk tiff": lambda file: image("CMYK").save(file, "TIFF", compression="tiff_lzw"),
    "jpeg": lambda file: image("RGB").save(file, "JPEG"),
    "webp": lambda file: image("RGB").save(file, "WEBP", method=0),
    "npy": lambda file: np.save(file, np.ones((HEIGHT, WIDTH, 3), np.uint8)),
}
"""How to write an image of each kind that takes its own path through the decoders."""


def bytes_per_pixel() -> dict[str, float]:
    """Memory that `mae index --check` and `mae pack` need for one image of each format."""
    found, cpu = {}, torch.device("cpu")
    for name, write in FORMATS.items():
        file = io.BytesIO()
        write(file)
        data = file.getvalue()
        give_back(cpu)
        forget_peak_memory(cpu)
        before = memory_in_use(cpu)
        SetPixels().add_native(data)
        decode(data, native_channels(data), (0.0, 4096.0))
        found[name] = (peak_memory(cpu) - before) / (HEIGHT * WIDTH)
    return found


def test_a_large_image_of_any_format_takes_a_bounded_number_of_bytes_per_pixel() -> None:
    found = in_own_process(bytes_per_pixel)
    assert found.keys() == FORMATS.keys()
    assert max(found.values()) < BYTES_PER_PIXEL, found
    assert min(found.values()) > 1, found


def test_sums_are_those_of_wide_integers_for_any_shape() -> None:
    for shape in ((3, 2, 300_000), (1, 300_000, 2), (13, 400, 500), (3, 1, 1), (2, 0, 5)):
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
        sums = PixelSums(shape[0])
        sums.add(pixels)
        exact = pixels.flatten(1).to(torch.int64)
        assert (sums.pixels, sums.total.tolist()) == (exact.shape[1], exact.sum(1).tolist())
        assert sums.squares.tolist() == (exact * exact).sum(1).tolist()


def test_an_array_of_more_bytes_than_any_image_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.Image, "MAX_IMAGE_PIXELS", 100)
    file = io.BytesIO()
    np.save(file, np.ones((1, 1, 401), np.uint8))
    with pytest.raises(BadImageError, match=r"its \.npy array has 529 bytes; allowed: 4 times PIL"):
        decode(file.getvalue(), 401)
