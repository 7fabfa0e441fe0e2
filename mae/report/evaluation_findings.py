"""What the evaluations of a run mean: losses and accuracies that get no better, and a classifier that guesses."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from mae.report.charts import percent
from mae.report.finding import Finding, epoch_in_words, loss_in_words
from mae.report.newest import is_warming_up, newest_loss
from mae.report.reading import FINETUNING, PRETRAINING, RunFiles

RISING = 1.02
"""Held-out loss, as a multiple of its least: two evaluations of 2,000 images differ by less than 2 % by chance."""
NEAR_ZERO = 0.05
"""Training loss of a classifier above the least that is possible: it gives the right classes 95 % on average."""
GUESSING = 3.0
"""Standard errors above the accuracy of guessing up to which an accuracy may be chance, also the best of many."""
FALLING = 1.0
"""Fall of an accuracy that is named, times 1/sqrt(samples): two standard errors or more, on the same images."""
STANDING = 1 / 3
"""Newest share of the evaluations without a better accuracy from which it is said to stand still."""
_LEAST_EVALUATIONS = 4


def evaluation_findings(run: RunFiles) -> Iterator[Finding]:
    """Yield what the evaluations while training tell."""
    rising = list(_rising_loss(run))
    yield from rising
    if run.kind == PRETRAINING:
        yield from _falling_neighbours(run.online)
    elif run.kind == FINETUNING and run.accuracies:
        guessing = list(_guessing(run))
        yield from guessing
        if not guessing:
            yield from _accuracy(run, is_rising=bool(rising))


def _rising_loss(run: RunFiles) -> Iterator[Finding]:
    known = [record for record in run.evaluations if record["loss"] is not None]
    if len(known) < 3:
        return
    least, last = min(known, key=lambda record: float(record["loss"])), known[-1]
    if least["step"] < known[-2]["step"] and last["loss"] > RISING * least["loss"]:
        advice = (
            "The best model is kept; fewer epochs, or patience, save the time after it"
            if run.kind == FINETUNING
            else "More images or fewer epochs help"
        )
        yield Finding(
            "warning",
            f"The validation loss rises: from {loss_in_words(least['loss'])} at epoch "
            f"{epoch_in_words(least['epoch'])} to {loss_in_words(last['loss'])} at epoch "
            f"{epoch_in_words(last['epoch'])}. The model learns its training images by heart. {advice}.",
        )


def _falling_neighbours(online: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    known = [record for record in online if isinstance(record.get("knn"), float)]
    if len(known) < 3 or known[-1]["samples"] < 1:
        return
    best, last = max(known, key=lambda record: float(record["knn"])), known[-1]
    if best["step"] < known[-2]["step"] and best["knn"] - last["knn"] > FALLING / math.sqrt(last["samples"]):
        yield Finding(
            "warning",
            f"k-NN accuracy falls: from {percent(best['knn'])} at epoch {epoch_in_words(best['epoch'])} to "
            f"{percent(last['knn'])} at epoch {epoch_in_words(last['epoch'])}, whatever the loss does. The features "
            "tell classes apart less well than before: train for fewer epochs, or on more images.",
        )


def _guessing(run: RunFiles) -> Iterator[Finding]:
    """Yield a sentence if the best accuracy is that of guessing, or all images seem to get the same class."""
    accuracies, samples = [record["accuracy"] for record in run.accuracies], run.accuracies[-1]["samples"]
    best, many = max(accuracies), run.classes
    if many is not None and many > 1 and samples > 0:
        chance = 1 / many
        if best <= chance + GUESSING * math.sqrt(chance * (1 - chance) / samples):
            yield Finding(
                "note" if is_warming_up(run) else "problem",
                f"The accuracy ({percent(best)}) is that of guessing one of {many:,} classes ({percent(chance)}): "
                "nothing has been learned yet. If it stays so, lower optim.base_lr, and look under “Data” whether the "
                "labels belong to the images.",
            )
            return
    if len(accuracies) >= _LEAST_EVALUATIONS and len(set(accuracies)) == 1 and not _is_known_by_heart(run):
        yield Finding(
            "problem",
            f"The accuracy is exactly {percent(best)} in each of {len(accuracies)} evaluations: the classifier seems "
            "to give all images the same class. Lower optim.base_lr; if one class is much larger than the others, set "
            "class_weights to balanced.",
        )


def _accuracy(run: RunFiles, is_rising: bool) -> Iterator[Finding]:
    records, samples = run.accuracies, run.accuracies[-1]["samples"]
    best = max(records, key=lambda record: float(record["accuracy"]))  # the first of equal ones
    since = sum(record["step"] > best["step"] for record in records)
    of_many = f"; guessing one of {run.classes:,} classes gives {percent(1 / run.classes)}" if run.classes else ""
    yield Finding(
        "good",
        f"The best accuracy is {percent(best['accuracy'])} at epoch {epoch_in_words(best['epoch'])}, on {samples:,} "
        f"validation images{of_many}.",
    )
    stands = len(records) >= _LEAST_EVALUATIONS and since >= max(2.0, STANDING * len(records))
    if not stands or is_rising:
        return
    until = f"epoch {epoch_in_words(best['epoch'])} of {epoch_in_words(records[-1]['epoch'])}"
    if best["accuracy"] >= 1:
        yield Finding(
            "note",
            f"All validation images are classified correctly since {until}: these images cannot show whether further "
            "epochs help.",
        )
    elif _is_known_by_heart(run):
        yield Finding(
            "warning",
            f"The classifier knows its training images by heart (training loss {newest_loss(run):.3f}), and its "
            f"accuracy on others has not risen since {until}. Further epochs change nothing: use fewer, or patience; "
            "more labels or stronger augmentation may help.",
        )
    else:
        yield Finding("note", f"The accuracy has not risen since {until}. With patience, such a run ends early.")


def _is_known_by_heart(run: RunFiles) -> bool:
    """Return whether the training loss is about the least that label smoothing leaves."""
    loss, smoothing = newest_loss(run), run.number("regularization.label_smoothing") or 0.0
    if loss is None or (smoothing and run.classes is None):
        return False
    return loss < _least_loss(smoothing, run.classes or 1) + NEAR_ZERO


def _least_loss(smoothing: float, classes: int) -> float:
    """Return the entropy of labels of which a share is spread evenly over all classes: no loss is below it."""
    other, own = smoothing / classes, 1 - smoothing + smoothing / classes
    return -sum(times * share * math.log(share) for times, share in ((1, own), (classes - 1, other)) if share > 0)
