"""How much RandAugment changes photos, and how fast it is: ours, under each name, beside timm's.

`python benchmarks/augment.py FOLDER [--photos 60] [--draws 20] [--names torchvision-9,rand-m9-mstd0.5-inc1]`

The photos are those of the tar shards in FOLDER, in order; each is resized and cropped from its centre to 224x224. Each
row of the table averages over `--draws` draws for each photo. An image's change is the mean absolute difference of its
values from before, in levels of 255; an image is unchanged if all its values are equal. Images per second of process
time, one thread. timm's image starts and ends as a Pillow image, ours as a tensor.
"""

import argparse
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image
from timm.data import rand_augment_transform

from mae import keyed
from mae.data.images.augment import eval_view
from mae.data.images.decode import decode
from mae.data.images.rand_augment import rand_augment_of
from mae.data.store.shards import expand
from mae.data.stream import read_samples
from mae.keyed import Purpose

SIZE = (224, 224)
MEAN = (0.485, 0.456, 0.406)
NAMES = "torchvision-9,rand-m9-mstd0.5-inc1"
# Makes the image of a number and a word; returns its values.
Make = Callable[[int, int], NDArray[np.uint8]]


class Row(NamedTuple):
    name: str
    levels: float
    changed_levels: float
    """Mean change of those that change."""
    unchanged: float
    per_second: float
    failed: int


def photos_of(folder: Path, most: int) -> list[torch.Tensor]:
    """Return the first photos, uint8 [3 224 224]."""
    found: list[torch.Tensor] = []
    for shard in expand((str(folder),)):
        for sample in read_samples(shard, Path("/nonexistent")):
            if len(found) < most:
                photo = eval_view(decode(sample.image, 3), SIZE, 1.0)
                # Channels last, as in a batch.
                found.append(photo.permute(1, 2, 0).contiguous().permute(2, 0, 1))
    return found


def measured(name: str, photos: Sequence[torch.Tensor], draws: int, make: Make) -> Row:
    words = keyed.bits(keyed.key(Purpose.AUGMENT), np.arange(len(photos)), draws).tolist()
    changes, seconds, failed = [], 0.0, 0
    for number, photo in enumerate(photos):
        before = photo.permute(1, 2, 0).numpy().astype(np.int16)
        for word in words[number]:
            start = time.process_time()
            try:
                after = make(number, word)
            except ValueError:  # timm, where Pillow 13 or later refuses to posterize to 0 bits
                failed += 1
                continue
            seconds += time.process_time() - start
            changes.append(np.abs(after - before).mean())
    levels = np.array(changes)
    changed = levels[levels > 0].mean()
    return Row(name, levels.mean(), changed, (levels == 0).mean(), len(levels) / seconds, failed)


def ours(name: str, photos: Sequence[torch.Tensor]) -> Make:
    change = rand_augment_of(name, 3, MEAN)
    assert change is not None
    return lambda number, word: change(photos[number], word).permute(1, 2, 0).numpy()


def timms(name: str, photos: Sequence[torch.Tensor]) -> Make:
    """Return timm's own, with the options of its transforms for training."""
    fill = tuple(round(255 * value) for value in MEAN)
    transform = rand_augment_transform(name, {"img_mean": fill, "interpolation": Image.Resampling.BICUBIC})
    images = [Image.fromarray(photo.permute(1, 2, 0).numpy()) for photo in photos]

    def make(number: int, word: int) -> NDArray[np.uint8]:
        random.seed(word)
        np.random.seed([word % 2**32, word // 2**32])
        return np.array(transform(images[number]))

    return make


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--photos", type=int, default=60)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--names", default=NAMES, help="names of augment.rand_augment, separated by commas")
    options = parser.parse_args()
    torch.set_num_threads(1)
    photos = photos_of(options.folder, options.photos)
    rows = []
    for name in options.names.split(","):
        rows.append(measured(f"ours, {name}", photos, options.draws, ours(name, photos)))
        if name.startswith("rand"):
            rows.append(measured(f"timm's own, {name}", photos, options.draws, timms(name, photos)))
    versions = f"timm {timm.__version__}, torchvision {torchvision.__version__}, Pillow {Image.__version__}"
    print(f"{len(photos)} photos of {options.folder.name}, {options.draws} draws each; {versions}\n")
    print("| RandAugment | mean change [levels] | of those that change | unchanged | images/s | failed |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.name} | {row.levels:.1f} | {row.changed_levels:.1f} | {row.unchanged:.1%} | {row.per_second:.0f} "
            f"| {row.failed} |"
        )


if __name__ == "__main__":
    main()
