"""Settings that a fine-tuning run takes from the model it starts with, where they are not given."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mae.errors import UserError
from mae.formats.opening import open_model
from mae.run_files import SETTINGS_FILE
from mae.settings import as_flags, flatten
from mae.training.settings import SCRATCH
from mae.yaml_files import load_yaml

_SIZE = "model.size"
_SHAPE = ("model.width", "model.depth", "model.heads", "model.patch_size")
_POSITIONS = "model.position_temperature"
_IMAGES = ("data.image_size", "data.channels", "data.crop_pct")
_LARGEST_CROPPED = 224


def shape_of_init(given: Mapping[str, str]) -> list[str]:
    """Return flags for the shape of the encoder and the size of the images, as the model that `init` names has them.

    Without `run_dir`, the run is beside the run that `init` names, with `-finetuned` added to its name.

    A run that has been started already keeps its own. Settings that are given stay as they are; with `model.size`, the
    shape is left to the settings. Images larger than 224 pixels are not cropped in evaluation unless
    `data.crop_pct` is given or the model was trained on them, as in the published evaluation (timm's crop_pct 1).

    Raises:
        UserError: if there is no such model, or it cannot be read.
    """
    run_dir = given.get("run_dir") or _beside(Path(given.get("init", SCRATCH)))
    known = (_settings_of_run(Path(run_dir)) if run_dir else {}) or _settings_of_new_run(given)
    if run_dir:
        known["run_dir"] = run_dir
    wanted = ("run_dir", *(() if _SIZE in given else (_SIZE, *_SHAPE)), _POSITIONS, *_IMAGES)
    return as_flags({name: known[name] for name in wanted if name in known and name not in given})


def _beside(init: Path) -> str | None:
    """Return a folder for the fine-tuning of a run; None if `init` is a checkpoint, a file or no run."""
    is_run = init.name != "" and (init / SETTINGS_FILE).is_file()
    return f"{init}-finetuned" if is_run else None


def _settings_of_run(run_dir: Path) -> dict[str, Any]:
    """Return the settings that the run folder holds; none for a new run."""
    path = run_dir / SETTINGS_FILE
    if not path.is_file():
        return {}
    try:
        return flatten(load_yaml(path))
    except UserError:  # the run is refused later, where that can be recorded in its folder
        return {}


def _settings_of_new_run(given: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings that a run takes from the model that `init` names, and the crop of large images."""
    init, known = given.get("init", SCRATCH), dict[str, Any]()
    if init != SCRATCH:
        known = _settings_of_model(init, _number(given.get("model.heads", "")))
    size = _size(given.get("data.image_size", ""))
    if size and max(size) > _LARGEST_CROPPED and size != known.get("data.image_size"):
        known["data.crop_pct"] = 1.0
    return known


def _settings_of_model(init: str, heads: int | None) -> dict[str, Any]:
    model = open_model(init, heads=heads).description
    values: tuple[Any, ...] = (model.width, model.depth, model.heads, model.patch_size)
    images: tuple[Any, ...] = (model.image_size, model.channels, model.crop_pct)
    names = (*_SHAPE, _POSITIONS, *_IMAGES)
    return dict(zip(names, (*values, model.position_temperature, *images), strict=True))


def _number(text: str) -> int | None:
    return int(text[:9]) if text.isascii() and text.isdecimal() else None


def _size(text: str) -> tuple[int, int] | None:
    """Return height and width that a setting gives, one number or two; None for anything else."""
    numbers = text.split()
    if len(numbers) not in (1, 2) or not all(number.isascii() and number.isdecimal() for number in numbers):
        return None
    return int(numbers[0][:9]), int(numbers[-1][:9])
