"""Sentences about a proposal: what is given up, what is missing, and what looks wrong."""

import math
from collections.abc import Iterator

from mae.proposal.choice import in_words
from mae.proposal.facts import Facts
from mae.proposal.pace import Pace
from mae.proposal.shapes import Shape

_FEW = 1000


def remarks_of(facts: Facts, shape: Shape, pace: Pace, epochs: int, best: tuple[Shape, float]) -> tuple[str, ...]:
    """Return the sentences; `best` is the shape without a limit of time, and its seconds with the paper's epochs."""
    return (
        *_given_up(facts, shape, epochs, best),
        *_about_time(facts, pace),
        *_about_images(facts),
        *_about_labels(facts),
    )


def _given_up(facts: Facts, shape: Shape, epochs: int, best: tuple[Shape, float]) -> Iterator[str]:
    wanted, seconds = best
    lost = []
    if shape.short < wanted.short:
        lost.append(f"images of {shape.short} pixels instead of {wanted.short}")
    if shape.rung is not wanted.rung:
        lost.append(f"an encoder {shape.rung.text} (width/blocks/heads) instead of {wanted.rung.text}")
    if epochs < 800:
        lost.append(f"{epochs} epochs instead of 800")
    if lost:
        device = "" if facts.machine.gpu else ", or use a GPU"
        yield (
            f"To end in time, this is less than the best: {', '.join(lost)}. Without a limit of time the run would "
            f"take about {in_words(seconds)} here; --hours {math.ceil(seconds / 3600)} allows that{device}."
        )
    if epochs < 20:
        yield (
            f"{facts.train.images:,} images are seen only {_times(epochs)}, which teaches little: use a GPU, more "
            "--hours, or fewer images."
        )


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def _about_time(facts: Facts, pace: Pace) -> Iterator[str]:
    machine = facts.machine
    if machine.load > machine.cores:
        yield (
            f"Other programs use the cores now (load {machine.load:.1f} on {machine.cores} cores); the times here are "
            "for a machine without them."
        )
    if pace.waits:
        where = "Each GPU waits for the" if machine.gpu else "Most of the time goes into the"
        smaller = "" if facts.images.arrays else ", or pack smaller images (mae pack --short_side)"
        yield f"{where} decoding of images: use more cores{smaller}."


def _about_images(facts: Facts) -> Iterator[str]:
    images, train = facts.images, facts.train
    if train.images < _FEW:
        yield (
            f"{train.images:,} images are few: a network learns little from them alone; `mae evaluate` shows whether "
            "it is better than plain pixels."
        )
    if images.bad:
        what = "and would stop a run" if train.shards else "(mae pack --skip_bad True leaves them out)"
        yield f"{len(images.bad)} of {images.sampled} sampled images cannot be read {what}; the first: {images.bad[0]}"
    sides = sorted(min(size) for size in images.sizes)
    if sides[-1] >= 8 * sides[0]:
        yield f"Short sides go from {sides[0]} to {sides[-1]} pixels: small images are enlarged, large ones reduced."


def _about_labels(facts: Facts) -> Iterator[str]:
    train, held_out = facts.train, facts.held_out
    if not train.per_class:
        yield "The images have no labels, so nothing is fine-tuned: mae embed gives features for searches and maps."
        return
    if not train.labelled:
        labelled = sum(train.per_class.values())
        yield f"Only {labelled:,} of {train.images:,} images have labels; fine-tuning needs a label for each image."
        return
    if facts.classes < 2:
        yield "All images are of one class, so there is nothing to tell apart: no fine-tuning is proposed."
        return
    if held_out is None:
        how = "move a tenth of each class into a folder val beside a folder train, and start again"
        if "--label_file" in facts.pack_flags:
            how = "divide the table in two, pack each (the second with --split val), and start again with the shards"
        yield f"No split is held out, so no accuracy is measured: {how}."
    elif held_out.name == "test":
        yield "Only test is held out, and the best model is chosen on it: its accuracy there is a little too good."
    elif not held_out.labelled:
        yield f"The images of {held_out.name} have no labels, so no accuracy is measured."
    least, most = min(train.per_class.values()), max(train.per_class.values())
    if most > 5 * least:
        yield f"Classes have from {least:,} to {most:,} images: look at the accuracy of each class, not at the mean."
