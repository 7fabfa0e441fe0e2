"""Model folder of Hugging Face transformers: the files beside its weights, and how it is loaded back."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mae.errors import UserError, first_of
from mae.export.target import Difference, Target, compare
from mae.export.trained_model import TrainedModel
from mae.files import write_atomically
from mae.models.description import ModelDescription
from mae.models.weights import write_weights

# Without this header, older versions do not read the weights.
_METADATA = {"format": "pt"}
_BICUBIC = 3  # by Pillow's number
_RGB = 3  # channels


class TransformersTarget(Target):
    """Folder of transformers, in the versions that are known to load it."""

    hub_library = "transformers"
    tolerance = 1e-5
    requires = ("transformers>=5",)
    extra = "transformers"


def vit_config(description: ModelDescription) -> dict[str, Any]:
    """Return the settings of an encoder by the names that all ViTs of transformers have.

    Sides are written as one number where they are equal, as some methods of transformers need it.
    """
    return {
        "hidden_size": description.width,
        "num_hidden_layers": description.depth,
        "num_attention_heads": description.heads,
        "intermediate_size": 4 * description.width,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "image_size": _sides(description.image_size),
        "patch_size": _sides(description.patch_size),
        "num_channels": description.channels,
    }


def labels(classes: Sequence[str]) -> dict[str, Any]:
    """Return the names of the classes in a config."""
    return {
        "id2label": {str(label): name for label, name in enumerate(classes)},
        "label2id": {name: label for label, name in enumerate(classes)},
    }


def write_folder(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: dict[str, Any],
    description: ModelDescription,
    metadata: Mapping[str, str] = _METADATA,
) -> None:
    """Write weights with the metadata of their header, config and image processor."""
    write_weights(folder / "model.safetensors", weights, metadata)
    _write_json(folder / "config.json", config)
    _write_image_processor(folder, description)


def _write_image_processor(folder: Path, description: ModelDescription) -> None:
    """Write `preprocessor_config.json`, which prepares an image as our evaluation does.

    transformers makes the short side of an image as long as one number says, which fits square models only. A folder
    of another model resizes nothing: an image that has another size is refused by the model.
    """
    height, width = description.image_size
    resize = {
        "do_resize": True,
        "size": {"shortest_edge": math.floor(height / description.crop_pct)},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
    }
    normalise = {
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(description.mean),
        "image_std": list(description.std),
    }
    without = {"do_resize": False, "do_center_crop": False}
    is_square = height == width
    # Processor of any model: in version 4, that of ViT squeezes images into a square.
    kind = {"image_processor_type": "BitImageProcessor", "do_convert_rgb": description.channels == _RGB}
    _write_json(folder / "preprocessor_config.json", kind | (resize if is_square else without) | normalise)


def range_refusal(description: ModelDescription) -> str | None:
    """Return why images of more than 8 bits cannot be prepared by transformers; None for a model of other images."""
    if description.value_range is None:
        return None
    return (
        "its images have a value_range, which transformers' image processor cannot apply; export it to timm, whose "
        "config.json names the range"
    )


def load(auto_class: Any, folder: Path, **arguments: Any) -> Any:
    """Load a folder by a class of transformers, without a network.

    Raises:
        UserError: if its tensors are not exactly those of the model that transformers builds.
    """
    with _without_progress():
        model, report = auto_class.from_pretrained(folder, local_files_only=True, output_loading_info=True, **arguments)
    if problems := [f"{kind}: {names}" for kind, names in report.items() if names]:
        raise UserError(f"transformers does not load what was exported: {first_of(problems)}; nothing was exported")
    return model.eval()


@contextmanager
def _without_progress() -> Iterator[None]:
    """Hide the progress bars of transformers for a while."""
    from transformers.utils import logging  # noqa: PLC0415 (an extra, and slow to import)

    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            logging.enable_progress_bar()


def compare_prepared(model: TrainedModel, folder: Path) -> Difference:
    """Compare an image of one colour as the folder's image processor and as our evaluation prepare it."""
    from transformers import AutoImageProcessor  # noqa: PLC0415 (an extra, and slow to import)

    description = model.description
    height, width = description.image_size
    colour = torch.arange(description.channels) * 7 % 196 + 60
    image = colour[:, None, None].expand(-1, height, width)
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    theirs = processor(np.asarray(image, dtype=np.uint8), input_data_format="channels_first", return_tensors="pt")
    ours = (image / 255 - _per_channel(description.mean)) / _per_channel(description.std)
    return compare("prepared image", ours[None], theirs["pixel_values"])


def _per_channel(values: Sequence[float]) -> Tensor:
    return torch.tensor(values)[:, None, None]


def _sides(size: tuple[int, int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=2).encode() + b"\n")
