"""Features of the samples of shards, computed once and kept in the cache.

The cache has a folder for each extraction: what is computed of which images, by which model, and how the images are
prepared. All of that is in the name of the folder, as a hash, so features are never used for anything else.
"""

import hashlib
import io
import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from mae.data.index import ShardIndex
from mae.data.settings import DataSettings
from mae.errors import UserError, first_of
from mae.files import read_bounded, write_atomically
from mae.inference.image_set import ShardImages
from mae.inference.model import Model
from mae.inference.parts import Part, compute_parts, compute_share, lacking_parts, part_ranges
from mae.models.description import ModelDescription
from mae.models.encoder import build_encoder
from mae.models.sizes import TEMPERATURE
from mae.output import counted

FEATURES_VERSION = 1
"""Version of what is computed; raise it when the same model and image give other values."""
LARGEST_PIXELS = 32
"""Largest side [pixels] of the images of which the pixels themselves are judged."""
_ABOUT = "about.json"
_MOST_BYTES_OF_ABOUT = 1 << 16


@dataclass(frozen=True)
class Extraction:
    """Something that is computed of each image: features, logits or pixels."""

    identity: Mapping[str, Any]
    """All that decides the values, except for the images and their preparation."""
    description: ModelDescription
    """Model that decides how the images are prepared."""
    build: Callable[[], Callable[[Tensor], Tensor]]
    """Return a function of a batch of views, uint8 [batch channels height width], which gives one row per image."""

    @property
    def facts(self) -> dict[str, Any]:
        """All that decides the values, except for the images: what is computed, and how they are prepared."""
        description = self.description
        return {
            "version": FEATURES_VERSION,
            **self.identity,
            "image_size": description.image_size,
            "channels": description.channels,
            "crop_pct": description.crop_pct,
            "value_range": description.value_range,
        }

    def about(self, index: ShardIndex) -> dict[str, Any]:
        """Return all that decides the values, as a JSON mapping."""
        return self.facts | {"images": index.fingerprint}

    def folder(self, index: ShardIndex, cache: Path) -> Path:
        """Return the folder of the cache for these values."""
        text = json.dumps(self.about(index), sort_keys=True)
        return cache / "features" / hashlib.sha256(text.encode()).hexdigest()[:20]


def encoder_features(model: Model) -> Extraction:
    """Return the extraction of the features of a trained encoder."""
    return Extraction({"features_of": model.sha256}, model.description, lambda: model.features_of)


def head_logits(model: Model) -> Extraction:
    """Return the extraction of the logits of a fine-tuned model."""
    return Extraction({"logits_of": model.sha256}, model.description, lambda: model.logits_of)


def untrained_features(description: ModelDescription, seed: int, device: torch.device) -> Extraction:
    """Return the extraction of the features of an encoder of the same shape with random weights."""

    def build() -> Callable[[Tensor], Tensor]:
        torch.manual_seed(seed)
        encoder = build_encoder(description.encoder(), description.image_size, description.channels)
        return Model(Path("untrained"), description, None, encoder.eval().to(device), device).features_of

    shape = {"width": description.width, "depth": description.depth, "heads": description.heads}
    # Left out at its default, so that features in the caches of earlier versions are found.
    temperature = description.position_temperature
    positions = {} if temperature == TEMPERATURE else {"position_temperature": temperature}
    statistics = {"patch_size": description.patch_size, "mean": description.mean, "std": description.std}
    return Extraction({"untrained": seed, **shape, **statistics, **positions}, description, build)


def pixels(description: ModelDescription) -> Extraction:
    """Return the extraction of the pixels of a model's views, reduced to at most 32 pixels on each side."""
    height, width = description.image_size
    scale = max(1.0, max(height, width) / LARGEST_PIXELS)
    size = max(1, round(height / scale)), max(1, round(width / scale))

    def reduced(views: Tensor) -> Tensor:
        return functional.interpolate(views.float(), size, mode="area").round().to(torch.uint8).flatten(1)

    return Extraction({"pixels": size}, description, lambda: reduced)


def compute(
    extraction: Extraction,
    index: ShardIndex,
    data: DataSettings,
    accelerator: Accelerator,
    title: str,
) -> None:
    """Compute what the cache lacks, with a progress bar. Collective: the processes share the work.

    Raises:
        UserError: on every process, if images cannot be used.
    """
    images, parts = ShardImages(index, data), part_ranges(len(index))
    folder = extraction.folder(index, data.cache)
    lacking = lacking_parts(accelerator, lambda: [n for n in range(len(parts)) if _read_part(folder, n) is None])

    def computed(share: Sequence[range]) -> Iterator[Part]:
        return compute_parts(images, share, extraction.description, extraction.build(), data.workers)

    began, bad = time.monotonic(), list[str]()
    for number, part in compute_share(lacking, parts, computed, accelerator, title):
        bad += [f"{images.name(image)} ({reason})" for image, reason in part.reasons.items()]
        if not part.reasons:
            _write_part(folder, number, part.results.numpy())
    names: list[str] = gather_object(bad)
    if names:
        raise UserError(f"{counted(len(names), 'bad image')}: {first_of(names)}; pack the shards again without them")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and lacking:
        count = sum(len(parts[n]) for n in lacking)
        speed = {"images_per_second": count / (time.monotonic() - began), "processes": accelerator.num_processes}
        about = extraction.about(index) | speed | {"device": str(accelerator.device)}
        write_atomically(folder / _ABOUT, json.dumps(about, indent=1).encode(), shared=True)


def read(extraction: Extraction, index: ShardIndex, cache: Path) -> NDArray[Any]:
    """Return what `compute` has put into the cache: one row per sample.

    Raises:
        UserError: if a part has been removed or damaged meanwhile.
    """
    folder = extraction.folder(index, cache)
    found = [_read_part(folder, number) for number in range(len(part_ranges(len(index))))]
    intact = [part for part in found if part is not None]
    if len(intact) < len(found):
        raise UserError(f"features in {folder} have been removed or damaged; run the same command again")
    return np.concatenate(intact)


def speed(extraction: Extraction, index: ShardIndex, cache: Path) -> dict[str, Any] | None:
    """Return images per second, processes and device of the last `compute` that computed something.

    None if that is not known: an evaluation was ended before it wrote this down, or the file is damaged.
    """
    try:
        about = json.loads(read_bounded(extraction.folder(index, cache) / _ABOUT, _MOST_BYTES_OF_ABOUT))
        each = float(about["images_per_second"])
        return {"images_per_second": each, "processes": about["processes"], "device": about["device"]}
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return None


def _read_part(folder: Path, number: int) -> NDArray[Any] | None:
    """Return a part, or None if it is missing or damaged. Its name has the crc32 of its bytes."""
    for path in sorted(folder.glob(f"part-{number:06d}-*.npy")):
        with suppress(FileNotFoundError):  # another evaluation may have removed it, because it is damaged
            data = path.read_bytes()
            if path.stem.endswith(f"-{zlib.crc32(data):08x}"):
                array: NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
                return array
            path.unlink()
    return None


def _write_part(folder: Path, number: int, values: NDArray[Any]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    folder.mkdir(parents=True, exist_ok=True)
    data = buffer.getvalue()
    write_atomically(folder / f"part-{number:06d}-{zlib.crc32(data):08x}.npy", data, shared=True)
