import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import png
from PIL import Image

from data.packing.packs import contents, pack
from mae.data.images import decode as decoding
from mae.data.images.decode import CHANNELS, decode_pixels
from mae.data.packing import convert as module
from mae.data.packing.convert import missing_reader, to_png
from mae.data.packing.not_packed import NotPacked
from mae.errors import BadImageError, UserError

ORIENTATION = 0x112


def encoded(format: str, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png(0, (20, 30), mode))).save(buffer, format=format, **options)
    return buffer.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def is_same_for_the_decoder(data: bytes, format: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the PNG has the pixels that the decoder would see if it read the format itself."""
    found = [decode_pixels(to_png(data, format.lower()), channels) for channels in CHANNELS]
    monkeypatch.setattr(decoding, "FORMATS", (format,))
    return all(np.array_equal(png, decode_pixels(data, n)) for png, n in zip(found, CHANNELS, strict=True))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("format", ["GIF", "AVIF"])
def test_a_converted_image_has_the_same_pixels(format: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_same_for_the_decoder(encoded(format, mode), format, monkeypatch)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_converted_image_is_upright(orientation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded("AVIF", exif=turned(orientation))
    assert decode_pixels(to_png(data, "avif"), 3).shape == ((20, 30, 3) if orientation < 5 else (30, 20, 3))
    assert is_same_for_the_decoder(data, "AVIF", monkeypatch)


def test_the_first_frame_is_converted() -> None:
    second = Image.open(io.BytesIO(png(1, (20, 30))))
    animated = encoded("GIF", "L", save_all=True, append_images=[second])
    assert to_png(animated, "gif") == to_png(encoded("GIF", "L"), "gif")


def test_the_colour_profile_is_kept() -> None:
    image = Image.open(io.BytesIO(to_png(encoded("AVIF", icc_profile=b"profile"), "avif")))
    assert image.info["icc_profile"] == b"profile"


@pytest.mark.parametrize("extension", ["gif", "avif"])
@pytest.mark.parametrize("data", [b"", b"<html>", png(0), encoded("GIF")[:40], encoded("AVIF")[:400]])
def test_x03_other_formats_and_damaged_files_are_bad_images(extension: str, data: bytes) -> None:
    with pytest.raises(BadImageError):
        to_png(data, extension)


@pytest.mark.parametrize("format", ["GIF", "AVIF"])
def test_images_of_too_many_pixels_are_bad(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(format)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(BadImageError, match="exceeds limit of 500 pixels"):
        to_png(data, format.lower())


def test_a_format_without_its_reader_is_left_out_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    missing_reader.cache_clear()
    try:
        left_out = NotPacked()
        for name in ("a.HEIC", "b.heic", "c.txt"):
            left_out.add(name)
        assert str(left_out).endswith("2 .heic, 1 c.txt; pip install 'mae-pretraining[heic]' to pack .heic")
        with pytest.raises(UserError, match=r"pip install 'mae-pretraining\[heic\]' to pack \.heic on each machine"):
            to_png(b"", "heic")
    finally:
        missing_reader.cache_clear()


def test_heic_is_converted_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pillow_heif").register_heif_opener()
    data = encoded("HEIF")
    found = decode_pixels(to_png(data, "heic"), 3)
    monkeypatch.setattr(decoding, "FORMATS", ("HEIF",))
    assert np.array_equal(found, decode_pixels(data, 3))


def test_conversions_are_counted_and_other_bytes_stay(flat: Path, tmp_path: Path) -> None:
    for name, data in {"x.gif": encoded("GIF"), "y.gif": encoded("GIF"), "z.avif": encoded("AVIF")}.items():
        (flat / name).write_bytes(data)
    packed = pack(flat, tmp_path / "out")
    assert packed.converted == {"gif": 2, "avif": 1}
    files = contents(tmp_path / "out" / "train-000001.tar")
    assert files["000000005.png"] == png(5)
    assert contents(tmp_path / "out" / "train-000002.tar")["000000011.png"] == to_png(encoded("AVIF"), "avif")


def test_a_damaged_gif_is_a_bad_image(flat: Path, tmp_path: Path) -> None:
    (flat / "x.gif").write_bytes(b"GIF89a")
    packed = pack(flat, tmp_path / "out", skip_bad=True)
    assert (packed.samples, packed.converted) == (9, {})
    assert packed.bad[0].startswith("x.gif (")
