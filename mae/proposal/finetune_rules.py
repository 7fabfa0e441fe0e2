"""Rules for the settings of fine-tuning."""

from collections.abc import Iterator
from typing import NamedTuple

from mae.models.flops import classifier_flops
from mae.proposal.choice import Choice, checkpoints_of, in_words, power_of_two, rounded_down
from mae.proposal.facts import Facts
from mae.proposal.pace import Pace
from mae.proposal.shapes import FEW_IMAGES, MANY_IMAGES, Shape

_WANTED_STEPS = 4000
_PEAK = 2e-3


class Finetuning(NamedTuple):
    """Settings of fine-tuning, and the seconds that it takes."""

    choices: tuple[Choice, ...] = ()
    seconds: float = 0.0


def finetuning_of(facts: Facts, shape: Shape, pace: Pace, channels: int, limit: float | None) -> Finetuning:
    """Return settings for the labelled images; none if there are no labels, or one class.

    Fine-tuning may take the time of pretraining, `limit` seconds, once more.
    """
    if facts.classes < 2:
        return Finetuning()
    images, each = facts.train.images, _seconds_of_image(facts, shape, pace, channels)
    epochs, why = _epochs(images, each, limit)
    seconds = epochs * images * each
    choices = (
        Choice("run_dir", facts.tuned_dir, "the same command resumes the run in this folder"),
        Choice("epochs", epochs, f"{why}: about {in_words(seconds)}"),
        *_schedule(facts, epochs),
        checkpoints_of(max(1, round(epochs * images / _batch_of(images))), seconds),
        Choice("data.shards", list(facts.shards_of(facts.train)), f"{facts.classes} classes"),
        Choice("data.workers", pace.workers, "as for pretraining"),
        *([Choice("data.keep_decoded", True, "all decoded images fit into memory")] if pace.kept else []),
        *_augmentation(facts, shape, channels),
        *_optim(facts, shape, epochs),
    )
    return Finetuning(choices, seconds)


def _seconds_of_image(facts: Facts, shape: Shape, pace: Pace, channels: int) -> float:
    size = (shape.height, shape.width)
    flops = classifier_flops(shape.settings, size, channels, facts.classes, "mlp").training
    compute = flops / facts.machine.flops_of(shape.settings, size)
    data = facts.images.view_seconds + (0 if pace.kept else facts.images.decode_seconds)
    if facts.machine.gpu:
        return max(compute, data / max(1, pace.workers)) / max(1, facts.machine.gpus)
    return compute + data / facts.machine.cores


def _epochs(images: int, each: float, limit: float | None) -> tuple[int, str]:
    """Return the number of epochs, and why, where each image takes so many seconds."""
    wanted = 100 if images >= FEW_IMAGES else max(20, min(200, round(_WANTED_STEPS * _batch_of(images) / images)))
    epochs = wanted if limit is None else min(wanted, rounded_down(limit / (images * each)))
    return epochs, "as published" if epochs == 100 else (
        "what the time allows" if epochs < wanted else "few images need many"
    )


def _schedule(facts: Facts, epochs: int) -> Iterator[Choice]:
    batch = _batch_of(facts.train.images)
    yield Choice(
        "batch_size", batch, "a smaller set has smaller batches, and so more steps" if batch < 1024 else "as published"
    )
    if facts.machine.gpu:
        yield Choice("micro_batch_size", "auto", "found at the start: the most images that fit on the GPU")
    if facts.held_out is not None and facts.held_out.labelled:
        yield Choice("eval_shards", list(facts.shards_of(facts.held_out)), f"{facts.held_out.images:,} images")
        yield Choice("eval_every", float(max(1, epochs // 20)), "epochs between measurements; the best model is kept")
    least, most = min(facts.train.per_class.values()), max(facts.train.per_class.values())
    if most > 5 * least:
        yield Choice("class_weights", "balanced", f"classes have from {least:,} to {most:,} images")


def _batch_of(images: int) -> int:
    return 1024 if images >= MANY_IMAGES else power_of_two(min(max(images / 32, 16.0), float(images)), 1, 256)


def _augmentation(facts: Facts, shape: Shape, channels: int) -> Iterator[Choice]:
    images = facts.train.images
    if images >= MANY_IMAGES and shape.short >= 128 and channels == 3:
        yield Choice("augment.crop_scale", [0.08, 1.0], "as published")
        yield Choice("augment.rand_augment", "rand-m9-mstd0.5-inc1", "as published")
        yield Choice("augment.erase", 0.25, "as published")
    elif images >= FEW_IMAGES and channels == 3 and shape.short >= 32:
        yield Choice("augment.crop_scale", [0.3, 1.0], "smaller crops lose what a small image shows")
        yield Choice("augment.rand_augment", "torchvision-9", "weaker than for ImageNet")
        yield Choice("augment.erase", 0.0, "small images would lose too much")
    else:
        yield Choice("augment.crop_scale", [0.6, 1.0], "measured with few labels (configs/finetune/few_labels.yaml)")
        yield Choice("augment.rand_augment", "none", "for few or gray images, and other channels")
        yield Choice("augment.erase", 0.0, "few labels need each image whole")
    mixes = images >= FEW_IMAGES and channels == 3 and shape.short >= 32
    why = "as published" if mixes else "images are not mixed: with few labels this was better"
    yield Choice("regularization.mixup", 0.8 if mixes else 0.0, why)
    yield Choice("regularization.cutmix", 1.0 if mixes else 0.0, why)


def _optim(facts: Facts, shape: Shape, epochs: int) -> Iterator[Choice]:
    batch, depth = _batch_of(facts.train.images), shape.settings.shape.depth
    yield Choice("optim.base_lr", _PEAK * 256 / batch, f"per 256 images: the peak is {_PEAK:g}, as published")
    decay = 0.65 if shape.rung.encoder == "base" else 0.75 if depth >= 12 else 0.85
    yield Choice("optim.warmup_epochs", epochs / 20, "a twentieth of the epochs, as published")
    yield Choice("optim.layer_decay", decay, f"for {depth} blocks: fewer blocks, weaker decay")
