"""JPEG decoders for a crop of each photo: their speed, whether their pixels are the same, and which damage they refuse.

`python benchmarks/jpeg.py FOLDER [--photos 200] [--rounds 5]`

The photos are those of the tar shards in FOLDER, in order. Times are CPU times of one thread, medians over rounds in
which the decoders run one after another. Damage: a scan that is cut, one that is cut and ends with an end-of-image
marker, and one with three wrong bytes; only files count that simplejpeg refuses. nvImageCodec is measured where
nvidia-nvimgcodec-cu13 is installed, TurboJPEG where the machine has version 3.
"""

import argparse
import contextlib
import io
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from mae.data.images import turbojpeg
from mae.data.images.augment import NUMBERS_PER_SAMPLE, AugmentSettings, crop_box
from mae.data.images.jpeg import Box, cut
from mae.data.store.shards import expand
from mae.data.stream import read_samples
from mae.keyed import Purpose, key, uniform

Pixels = NDArray[np.uint8]
# Pixels of a box of a photo; None if the decoder refuses the file.
Decoder = Callable[[bytes, Box], Pixels | None]
SCALE = (0.2, 1.0)
END_OF_IMAGE = b"\xff\xd9"
CPU_ONLY = -99999
"""Device number by which nvImageCodec uses no GPU."""


def by_pillow(data: bytes, box: Box) -> Pixels | None:
    try:
        whole = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except (OSError, UnidentifiedImageError):
        return None
    return cut(whole, box)


def by_simplejpeg(data: bytes, box: Box) -> Pixels | None:
    try:
        whole: Pixels = simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        return None
    return cut(whole, box)


def turbojpeg_decoder() -> Decoder | None:
    library = turbojpeg.find()
    return None if library is None else lambda data, box: library.decode_region(data, *box, channels=3)


def nvimgcodec_decoder() -> Decoder | None:
    with silence():
        try:
            nvimgcodec = import_module("nvidia.nvimgcodec")
        except ImportError:
            return None
        backends = [nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)]
        decoder = nvimgcodec.Decoder(CPU_ONLY, 1, backends, ":fancy_upsampling=1")
    parameters = nvimgcodec.DecodeParams(apply_exif_orientation=False, color_spec=nvimgcodec.ColorSpec.SRGB)

    def decode(data: bytes, box: Box) -> Pixels | None:
        region = nvimgcodec.Region(box.top, box.left, box.top + box.height, box.left + box.width)
        found = decoder.decode(nvimgcodec.CodeStream(data).get_sub_code_stream(0, region), params=parameters)
        return None if found is None else np.asarray(found.cpu())

    return decode


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Send what libraries in C write to the terminal nowhere."""
    kept = {number: os.dup(number) for number in (1, 2)}
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in kept:
        os.dup2(nowhere, number)
    try:
        yield
    finally:
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)
        os.close(nowhere)


def photos_of(folder: Path, most: int) -> list[bytes]:
    found = [sample.image for shard in expand((str(folder),)) for sample in read_samples(shard, Path("/nonexistent"))]
    return [data for data in found if data.startswith(b"\xff\xd8")][:most]


def boxes_of(photos: Sequence[bytes]) -> list[Box]:
    """Return a random crop of each photo, as training takes them."""
    numbers = uniform(key(Purpose.CROP, 0, 0), np.arange(len(photos)), NUMBERS_PER_SAMPLE)
    augmentation = AugmentSettings(crop_scale=SCALE)
    sizes = [simplejpeg.decode_jpeg_header(data)[:2] for data in photos]
    return [Box(*crop_box(*size, row, augmentation)) for size, row in zip(sizes, numbers.tolist(), strict=True)]


def damaged(photos: Sequence[bytes]) -> dict[str, list[bytes]]:
    """Return damaged copies of the photos, of each kind, without those that simplejpeg decodes."""
    random = np.random.default_rng(0)
    cut = [data[: int(len(data) * random.uniform(0.5, 0.95))] for data in photos]
    wrong = []
    for data in photos:
        copy = bytearray(data)
        for place in random.uniform(0.6, 0.95, 3):
            copy[int(len(copy) * place)] ^= 0xFF
        wrong.append(bytes(copy))
    kinds = {"cut": cut, "cut, with an end": [data + END_OF_IMAGE for data in cut], "three wrong bytes": wrong}
    whole = Box(0, 0, 1 << 16, 1 << 16)
    return {name: [data for data in files if by_simplejpeg(data, whole) is None] for name, files in kinds.items()}


def refused(decode: Decoder, files: Sequence[bytes]) -> str:
    """Return how many of the files a decoder refuses when it decodes all of the image."""
    count = 0
    with silence():
        for data in files:
            height, width = simplejpeg.decode_jpeg_header(data)[:2]
            count += decode(data, Box(0, 0, height, width)) is None
    return f"{count}/{len(files)}"


def milliseconds(decode: Decoder, photos: Sequence[bytes], boxes: Sequence[Box]) -> float:
    began = time.process_time()
    for data, box in zip(photos, boxes, strict=True):
        decode(data, box)
    return 1000 * (time.process_time() - began) / len(photos)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--photos", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    photos = photos_of(arguments.folder, arguments.photos)
    boxes, bad = boxes_of(photos), damaged(photos)
    candidates = {
        "Pillow": by_pillow,
        "simplejpeg (ours)": by_simplejpeg,
        "TurboJPEG 3, only the crop": turbojpeg_decoder(),
        "nvImageCodec, only the crop": nvimgcodec_decoder(),
    }
    decoders = {name: decode for name, decode in candidates.items() if decode is not None}
    times = {name: list[float]() for name in decoders}
    for _ in range(arguments.rounds):
        for name, decode in decoders.items():
            times[name].append(milliseconds(decode, photos, boxes))
    print(f"{len(photos)} photos; {', '.join(map(named_version, ('pillow', 'simplejpeg', 'nvidia-nvimgcodec-cu13')))}")
    print(f"| decoder | CPU ms per crop | same pixels | {' | '.join(f'refused: {name}' for name in bad)} |")
    print(f"|{'---|' * (3 + len(bad))}")
    for name, decode in decoders.items():
        same = sum(is_same(decode, *each) for each in zip(photos, boxes, strict=True))
        counts = " | ".join(refused(decode, files) for files in bad.values())
        print(f"| {name} | {statistics.median(times[name]):.2f} | {same}/{len(photos)} | {counts} |")


def is_same(decode: Decoder, data: bytes, box: Box) -> bool:
    return np.array_equal(by_pillow(data, box), decode(data, box))


def named_version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


if __name__ == "__main__":
    main()
