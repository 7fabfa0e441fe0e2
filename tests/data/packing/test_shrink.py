import io

import numpy as np
import pytest
from PIL import Image

from mae.data.packing.shrink import Outcome, shrink
from mae.errors import BadImageError


def image(mode: str = "RGB", size: tuple[int, int] = (60, 40)) -> Image.Image:
    """Smooth waves, so that JPEG does them little harm."""
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 3, width), np.linspace(0, 3, height))
    planes = np.stack([128 + 100 * np.sin(x * k + y) for k in (1, 2, 3)], axis=-1)
    return Image.fromarray(planes.astype(np.uint8)).convert(mode)


def encoded(picture: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=file_format, **options)
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    found = Image.open(io.BytesIO(data))
    found.load()
    return found


@pytest.mark.parametrize(
    ("size", "expected"), [((60, 40), (24, 16)), ((40, 60), (16, 24)), ((17, 500), (16, 471)), ((50, 50), (16, 16))]
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_short_side_becomes_what_was_asked_for(mode: str, size: tuple[int, int], expected: tuple[int, int]) -> None:
    data, outcome = shrink(encoded(image(mode, size)), 16, 90)
    found = opened(data)
    assert (outcome, found.format, found.mode, found.size) == (Outcome.SHRUNK, "JPEG", mode, expected)


def test_pixels_are_those_of_an_antialiased_reduction() -> None:
    picture = image(size=(300, 200))
    data, _ = shrink(encoded(picture), 100, 90)
    expected = np.asarray(picture.resize((150, 100), Image.Resampling.LANCZOS)).astype(float)
    error = np.asarray(opened(data)).astype(float) - expected
    assert 10 * np.log10(255**2 / np.square(error).mean()) > 38


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "BMP", "TIFF"])
def test_small_images_stay_byte_for_byte(file_format: str) -> None:
    data = encoded(image(size=(60, 16)), file_format)
    assert shrink(data, 16, 90) == (data, Outcome.SMALL)


def test_a_small_jpeg_is_written_anew_where_that_saves_bytes() -> None:
    fine, coarse = (encoded(image(size=(60, 16)), "JPEG", quality=quality) for quality in (99, 30))
    smaller, outcome = shrink(fine, 16, 90)
    assert outcome is Outcome.SHRUNK
    assert len(smaller) < len(fine)
    assert opened(smaller).size == (60, 16)
    assert shrink(coarse, 16, 90) == (coarse, Outcome.SMALL)


def test_chroma_is_halved_and_quality_counts() -> None:
    data = encoded(image(size=(300, 200)))
    sizes = [len(shrink(data, 100, quality)[0]) for quality in (50, 90, 100)]
    assert sizes == sorted(set(sizes))
    assert [layer[1:3] for layer in opened(shrink(data, 100, 90)[0]).layer] == [(2, 2), (1, 1), (1, 1)]  # type: ignore[attr-defined]


def test_orientation_is_applied_and_forgotten() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data, _ = shrink(encoded(image(), "JPEG", exif=exif), 16, 90)
    found = opened(data)
    assert found.size == (16, 24)
    assert 0x0112 not in found.getexif()


def test_a_colour_profile_is_kept_and_comments_are_not() -> None:
    data, _ = shrink(encoded(image(), "JPEG", icc_profile=b"a profile", comment=b"words"), 16, 90)
    assert opened(data).info.get("icc_profile") == b"a profile"
    assert "comment" not in opened(data).info


@pytest.mark.parametrize(
    ("picture", "options"),
    [
        (image("RGBA"), {}),
        (image("LA"), {}),
        (image("P"), {}),
        (image("1"), {}),
        (Image.fromarray(np.full((40, 60), 40_000, np.uint16)), {}),
        (image("RGB"), {"transparency": (0, 0, 0)}),
        (image("CMYK"), {"file_format": "JPEG"}),
        (image("RGB"), {"file_format": "WEBP", "save_all": True, "append_images": [image("L").convert("RGB")]}),
    ],
    ids=["RGBA", "LA", "palette", "1 bit", "16 bit", "transparent colour", "CMYK", "frames"],
)
def test_other_kinds_are_left_as_they_are(picture: Image.Image, options: dict[str, object]) -> None:
    data = encoded(picture, **options)  # type: ignore[arg-type]
    assert shrink(data, 16, 90) == (data, Outcome.UNSUITED)


def test_arrays_and_what_is_no_image_are_left_to_the_decoder() -> None:
    for data in (b"\x93NUMPY...", b"<html>", b"", encoded(image())[:20]):
        assert shrink(data, 16, 90) == (data, Outcome.SMALL)


def test_s01_a_large_image_that_is_cut_is_bad() -> None:
    data = encoded(image(size=(600, 400)), "JPEG")
    with pytest.raises(BadImageError):
        shrink(data[: len(data) // 2], 16, 90)
