"""Toy images for the rehearsal of the stage learn: JPEGs whose class is their colour."""

import io
import tarfile
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from .results import Figures

_CLASSES, _IMAGES = 4, 32


def write(folder: str, name: str, test_split: str, side: int) -> Figures:
    """Write two shards for training and two for tests, named as the real ones."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for split, shard in product(("train", test_split), range(2)):
        path = Path(folder) / f"{name}-{split}-{shard:06}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(shard * _IMAGES, (shard + 1) * _IMAGES):
                label = number % _CLASSES
                pixels = random.integers(0, 128, (side, side, 3)) + 32 * label
                buffer = io.BytesIO()
                Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG", quality=90)
                for ending, content in (("jpg", buffer.getvalue()), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{number:06}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return {"images": 4 * _IMAGES}
