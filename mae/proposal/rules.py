"""Rules from facts to settings: `propose` is a pure function, whose table is in docs/data.md."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from mae.errors import UserError
from mae.models.flops import Flops, autoencoder_flops
from mae.models.sizes import SIZES, TEMPERATURE
from mae.proposal.choice import Choice, Proposal, checkpoints_of, in_words, power_of_two, rounded_down
from mae.proposal.facts import Facts, ImageFacts
from mae.proposal.finetune_rules import finetuning_of
from mae.proposal.pace import Pace, pace_of
from mae.proposal.pixel_rules import channels_of, value_range_of
from mae.proposal.remarks import remarks_of
from mae.proposal.shapes import MANY_IMAGES, Shape, common_aspect, shapes, short_side

WANTED_EPOCHS = 800
"""Epochs of the paper's recipe."""
_LEAST_EPOCHS, _LEAST_SAMPLES = 20, 300_000
_CPU_HOURS = 1.0
_PAPERS_BATCH, _SMALL_BATCH = 4096, 256
# In docs/results.md, batches of 256 and 1,200 steps were as good as smaller ones; 1,024 and 300 steps were far worse.
_WANTED_STEPS = 1000


class Candidate(NamedTuple):
    """Shape that comes into question, with its cost."""

    shape: Shape
    flops: Flops
    pace: Pace


def propose(facts: Facts) -> Proposal:
    """Choose the best shape of which enough can be trained in the time, and all settings that go with it.

    Raises:
        UserError: if no model can be trained on these images.
    """
    if not facts.images.sizes:
        first = facts.images.bad[0] if facts.images.bad else "none was found"
        raise UserError(f"none of {facts.images.sampled} images in {facts.source} can be decoded; the first: {first}")
    if facts.train.images < 2:
        raise UserError(f"{facts.source} contains 1 image; a model needs many to learn from, at least 2")
    (channels, of_channels), of_range = channels_of(facts), value_range_of(facts.images)
    candidates, limit = shapes(facts), seconds_allowed(facts)
    shape, flops, pace = _chosen(facts, candidates, channels, limit)
    epochs = _epochs(facts, pace, limit)
    seconds = epochs * facts.train.images * pace.seconds
    best = _candidate(facts, candidates[0], channels)
    choices = [
        Choice("run_dir", facts.run_dir, "the same command resumes the run in this folder"),
        *_schedule(facts, shape, flops, pace, epochs),
        *_data(facts, shape, pace, Choice("data.channels", channels, of_channels), of_range),
        *_augment(facts.images, shape),
        *_model(facts, shape, shape != best.shape),
        *_optim(facts, shape, epochs),
        *_evaluation(facts),
    ]
    finetuning = finetuning_of(facts, shape, pace, channels, limit)
    given_up = (best.shape, WANTED_EPOCHS * facts.train.images * best.pace.seconds)
    return Proposal(
        model=shape.settings,
        image_size=(shape.height, shape.width),
        channels=channels,
        seconds=seconds,
        pretrain=tuple(choices),
        finetune=finetuning.choices,
        finetune_seconds=finetuning.seconds,
        pack=_pack(facts, pace),
        remarks=remarks_of(facts, shape, pace, epochs, given_up),
    )


def seconds_allowed(facts: Facts) -> float | None:
    """Return the time that pretraining may take; None: any."""
    if facts.hours is None and facts.machine.gpu:
        return None
    return 3600 * (facts.hours or _CPU_HOURS)


def batch_of(images: int, epochs: int) -> int:
    """Return the global batch: small for small sets, which then take more steps; the paper's for large ones.

    Where epochs are so few that there would be less than 1,000 steps, it is halved until there are, down to 256.
    """
    if images < 100_000:
        return power_of_two(min(max(images / 16, 32.0), float(images)), 1, _SMALL_BATCH)
    batch = _PAPERS_BATCH if images >= MANY_IMAGES else 1024
    while batch > _SMALL_BATCH and epochs * images < _WANTED_STEPS * batch:
        batch //= 2
    return batch


def _chosen(facts: Facts, candidates: Sequence[Shape], channels: int, limit: float | None) -> Candidate:
    """Return the first candidate of which enough can be trained in the time, or the last."""
    for shape in candidates:
        found = _candidate(facts, shape, channels)
        if limit is None or _least(facts) * found.pace.seconds <= limit:
            break
    return found


def _candidate(facts: Facts, shape: Shape, channels: int) -> Candidate:
    flops = _flops(shape.settings, (shape.height, shape.width), channels)
    return Candidate(shape, flops, pace_of(facts, shape, flops, channels))


_flops = lru_cache(64)(autoencoder_flops)


def _least(facts: Facts) -> float:
    """Return the number of images that a model has to see until it is worth its size."""
    images = facts.train.images
    return float(images) * min(WANTED_EPOCHS, max(_LEAST_EPOCHS, _LEAST_SAMPLES / images))


def _epochs(facts: Facts, pace: Pace, limit: float | None) -> int:
    if limit is None:
        return WANTED_EPOCHS
    return min(WANTED_EPOCHS, rounded_down(limit / (facts.train.images * pace.seconds)))


def _schedule(facts: Facts, shape: Shape, flops: Flops, pace: Pace, epochs: int) -> list[Choice]:
    images, machine = facts.train.images, facts.machine
    batch = batch_of(images, epochs)
    steps = max(1, round(epochs * images / batch))
    seconds = epochs * images * pace.seconds
    why = "the paper's schedule" if epochs == WANTED_EPOCHS else "what the time allows"
    precision = "bf16 on this GPU" if machine.has_bf16 else "fp32: bf16 needs a GPU that has it"
    found = [
        Choice(
            "epochs",
            epochs,
            f"{why}: {steps:,} steps, about {in_words(seconds)} ({flops.training / 1e9:.2g} GFLOP per image)",
        ),
        Choice("batch_size", batch, _batch_reason(batch)),
    ]
    if machine.gpu:
        found += [Choice("micro_batch_size", "auto", "found at the start: the most images that fit on the GPU")]
    return [
        *found,
        Choice("precision", "auto", precision),
        checkpoints_of(steps, seconds),
        Choice("picture_every", max(1, steps // 10), "steps: ten pictures of the same images"),
        Choice("log_every", max(1, min(50, steps // 200)), "steps between lines of the log"),
    ]


def _batch_reason(batch: int) -> str:
    if batch == _PAPERS_BATCH:
        return "the paper's"
    return "for a large set" if batch == 1024 else "smaller than the paper's, for more steps"


def _data(facts: Facts, shape: Shape, pace: Pace, channels: Choice, value_range: list[Choice]) -> list[Choice]:
    images, machine = facts.images, facts.machine
    side = [shape.height] if shape.height == shape.width else [shape.height, shape.width]
    of_side = f"half of the sampled images have a short side of {short_side(images)} pixels or more"
    if machine.gpu:
        of_workers = f"processes that decode, of {machine.cores} cores"
    else:
        of_workers = "processes that decode; on a CPU, training needs the other cores"
    found = [
        Choice("data.shards", list(facts.shards_of(facts.train)), f"{facts.train.images:,} images"),
        Choice("data.image_size", side, of_side),
        channels,
        *value_range,
        Choice("data.workers", pace.workers, of_workers),
    ]
    if pace.kept:
        found += [Choice("data.keep_decoded", True, "all decoded images fit into memory")]
    if shape.short <= 96:
        found += [Choice("data.crop_pct", 1.0, "small images are measured whole")]
    bad = len(images.bad) / images.sampled
    if bad and facts.train.shards:
        allowed = max(1, round(2 * bad * facts.train.images))
        found += [Choice("data.max_bad_samples", allowed, f"{len(images.bad)} of {images.sampled} sampled are bad")]
    return found


def _augment(images: ImageFacts, shape: Shape) -> list[Choice]:
    scale = [0.6, 1.0] if shape.short < 32 else [0.2, 1.0]
    why = "tiny images lose their content in small crops" if shape.short < 32 else "the paper's crops"
    found = [Choice("augment.crop_scale", scale, why)]
    if (aspect := common_aspect(images)) != 1:
        ratio = [round(aspect * 3 / 4, 3), round(aspect * 4 / 3, 3)]
        found += [Choice("augment.crop_ratio", ratio, f"nearly all images are {aspect:.2f} times as wide as high")]
    return [*found, Choice("augment.flip", True, "set it to false if left and right have a meaning, as in text")]


def _model(facts: Facts, shape: Shape, is_smaller: bool) -> list[Choice]:
    settings = shape.settings
    rows, columns = settings.grid((shape.height, shape.width))
    machine = facts.machine.gpu or f"{facts.machine.cores} CPU cores"
    why = f"for {facts.train.images:,} images" + (f" in the time on {machine}" if is_smaller else "")
    found = [Choice("model.size", shape.rung.encoder, f"width/blocks/heads {shape.rung.text}, {why}")]
    if shape.rung.shape is not None:
        width, depth, heads = shape.rung.shape
        found += [
            Choice("model.width", width, f"tiny has {SIZES['tiny'].width}"),
            Choice("model.depth", depth, f"tiny has {SIZES['tiny'].depth} blocks"),
            Choice("model.heads", heads, f"heads of {width // heads} channels"),
        ]
    ratio = "the paper's" if settings.mask_ratio == 0.75 else f"only {rows * columns} patches: hide half"
    found += [Choice("model.patch_size", shape.patch, f"{rows}x{columns} patches")]
    if (temperature := settings.position_temperature) != TEMPERATURE:
        found += [Choice("model.position_temperature", temperature, "short waves tell the places of few patches apart")]
    return [
        *found,
        Choice("model.mask_ratio", settings.mask_ratio, ratio),
        Choice("model.decoder_width", shape.rung.decoder.width, "a decoder that suits the encoder's size"),
        Choice("model.decoder_depth", shape.rung.decoder.depth, "blocks of the decoder"),
        Choice("model.decoder_heads", shape.rung.decoder.heads, "heads of the decoder"),
    ]


def _optim(facts: Facts, shape: Shape, epochs: int) -> list[Choice]:
    batch, width = batch_of(facts.train.images, epochs), shape.settings.shape.width
    if batch == _PAPERS_BATCH and shape.rung.shape is None:
        base, why = 1.5e-4, "the paper's"
    else:
        peak = 1e-3 if width <= 128 else 5e-4
        base, why = peak * 256 / batch, f"per 256 images: the peak is {peak:g}, as in recipes for small sets"
    warmup = epochs / 20
    return [
        Choice("optim.base_lr", base, why),
        Choice("optim.warmup_epochs", warmup, "a twentieth of the epochs, as in the paper"),
        Choice("optim.weight_decay", 0.05, "the paper's"),
    ]


def _evaluation(facts: Facts) -> list[Choice]:
    if facts.held_out is None:
        return []
    held_out, train = list(facts.shards_of(facts.held_out)), list(facts.shards_of(facts.train))
    found = [Choice("evaluation.eval_shards", held_out, "held-out loss, while training")]
    if facts.held_out.labelled and facts.classes > 1:
        found += [Choice("evaluation.train_shards", train, "k-NN and few-shot accuracy, while training")]
    return found


def _pack(facts: Facts, pace: Pace) -> tuple[str, ...]:
    if facts.train.shards:
        return ()
    bad = ("--skip_bad", "True") if facts.images.bad else ()
    side = () if pace.pack_side is None else ("--short_side", str(pace.pack_side))
    return (*facts.pack_flags, *bad, *side)
