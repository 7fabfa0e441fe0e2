"""JPEGs of every kind, made on the fly."""

import io

import numpy as np
import simplejpeg
from PIL import Image


def photo(height: int, width: int) -> np.ndarray:
    """Something between noise and a smooth picture: [height width 3]."""
    generator = np.random.default_rng(height * 1000 + width)
    coarse = generator.integers(0, 256, (height // 4 + 2, width // 4 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return (smooth + generator.integers(-20, 21, smooth.shape)).clip(0, 255).astype(np.uint8)


def encoded(pixels: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", **({"quality": 90} | options))
    return buffer.getvalue()


def subsampled(pixels: np.ndarray, subsampling: str) -> bytes:
    """A JPEG with a subsampling that Pillow cannot write."""
    gray = subsampling == "Gray"
    planes = np.ascontiguousarray(pixels[:, :, :1] if gray else pixels)
    data: bytes = simplejpeg.encode_jpeg(planes, 90, "GRAY" if gray else "RGB", subsampling)
    return data
