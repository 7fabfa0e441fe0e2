"""How a model was trained, as rows of a table; what is not known is left out."""

from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from mae.export.facts import Facts
from mae.export.table import safe
from mae.models.description import ModelDescription
from mae.output import counted
from mae.run_files import is_number

_STAGES = {"masked autoencoder": "pretraining as a masked autoencoder", "classifier": "training as a classifier"}
_SCRATCH, _OFF = "none", (None, "none", "auto", False, 0, 0.0)
# Settings that are shown as they are, unless they are off.
_SHOWN = {
    "seed": "seed",
    "precision": "precision",
    "optim.name": "optimiser",
    "optim.base_lr": "learning rate per 256 images",
    "optim.weight_decay": "weight decay",
    "optim.layer_decay": "layer decay",
    "optim.warmup_epochs": "epochs of warm-up",
    "ema_decay": "decay of the average of weights",
    "augment.crop_scale": "area of random crops",
    "augment.flip": "random flips",
    "augment.rand_augment": "RandAugment",
    "augment.erase": "random erasing",
    "freeze": "not trained",
    "class_weights": "weights of classes",
    "labels_per_class": "labels per class",
    "regularization.drop_path": "drop path",
    "regularization.label_smoothing": "label smoothing",
    "regularization.mixup": "mixup",
    "regularization.cutmix": "cutmix",
}


def training_rows(described: ModelDescription, facts: Facts) -> Iterator[tuple[str, str]]:
    """Yield the stage, its length, its data, the masks and the decoder, and the settings that matter."""
    yield "stage", _STAGES[described.kind]
    yield from _length(facts)
    if facts.samples is not None:
        yield "training samples", f"{facts.samples:,}"
    if facts.fingerprint is not None:
        yield "fingerprint of the samples", f"`{safe(facts.fingerprint)}`"
    if "init" in facts.settings:
        yield "began with", _origin(facts.settings["init"])
    if (decoder := described.decoder) is not None:
        yield "hidden patches", f"{100 * decoder.mask_ratio:.4g} %, {decoder.mask} mask"
        kind = f"{decoder.kind}-attention" if decoder.kind in ("self", "cross") else safe(decoder.kind)
        yield (
            "decoder",
            f"{kind}: width {decoder.width}, {counted(decoder.depth, 'block')}, {counted(decoder.heads, 'head')}",
        )
        yield "target", "pixels, each patch normalised" if decoder.norm_pix_loss else "pixels"
    for name, title in _SHOWN.items():
        value = facts.settings.get(name)
        if (value not in _OFF and value != []) or (name == "seed" and value == 0):
            yield title, _shown(value)


def _length(facts: Facts) -> Iterator[tuple[str, str]]:
    planned = facts.settings.get("epochs")
    of_planned = f" of {planned:g}" if is_number(planned) else ""
    if facts.epoch is not None:
        yield "epochs", f"{facts.epoch:.4g}{of_planned}"
    if facts.step is not None:
        yield "steps", f"{facts.step:,}"
    if "batch_size" in facts.settings:
        yield "images per step", _shown(facts.settings["batch_size"])


def _origin(init: object) -> str:
    """Return where the first weights were from; of a path only its last name, which tells nothing of the machine."""
    if init == _SCRATCH:
        return "random weights"
    name = str(init)
    return f"the weights of {safe(name if name.startswith('hub:') else PurePath(name).name)}"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(map(_shown, value))
    if value is True:
        return "yes"
    return f"{value:g}" if isinstance(value, float) else safe(value)
