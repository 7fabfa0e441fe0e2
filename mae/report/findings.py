"""What a run's figures mean, in sentences: a pure function of the figures, with thresholds that are explained here."""

import math
from collections.abc import Callable, Iterator

from mae.report.evaluation_findings import evaluation_findings
from mae.report.finding import Finding, Level, NearestNeighbours, epoch_in_words, loss_in_words
from mae.report.newest import LINES, data_wait, is_warming_up, newest_loss
from mae.report.reading import MODEL_ONLY, PRETRAINING, RunFiles

NOTHING_LEARNED = 0.98
"""Share of a baseline's loss: above it the model is no better. That mean of crops is known to about 1 %."""
WAITING = 0.10
"""Share of the time spent waiting for data from which more workers pay: below it, a run gains at most a ninth."""
DIVERGING = 1.25
"""Training loss, as a multiple of its least: lines of the log differ by a few percent by chance."""
FEW_STEPS = 0.01
"""Share of all steps that may be skipped without a warning: one loss that is not finite is no reason to worry."""
ERRORS_OF_PIXELS = 1.0
"""Difference between features and pixels that is named, times 1/sqrt(samples): about two standard errors at 80 %."""


def findings(run: RunFiles, neighbours: NearestNeighbours | None = None) -> list[Finding]:
    """Return sentences about a run, problems first; a single calm one if nothing stands out."""
    if run.kind == MODEL_ONLY:
        text = "This folder holds a model, but neither settings nor a log of its training: there are no curves."
        return [Finding("note", text), *(Finding("warning", f"{each}.") for each in run.unreadable)]
    broken = [*_not_finite(run), *_divergence(run)]
    # Where training has broken down, it does not matter how far it had come.
    is_broken = any(finding.level == "problem" for finding in broken)
    checks: list[Callable[[RunFiles], Iterator[Finding]]] = [_ending, evaluation_findings, _waiting, _data]
    checks += [] if is_broken else [_learning, _warm_up]
    found = [*broken, *(finding for check in checks for finding in check(run))]
    found += [] if neighbours is None else _pixels(neighbours)
    found += [Finding("warning", f"Something could not be read: {text}.") for text in run.unreadable]
    if all(finding.level in ("good", "note") for finding in found):
        found.append(Finding("good", "Nothing stands out: loss, speed and data look as they should."))
    order: list[Level] = ["problem", "warning", "good", "note"]
    return sorted(found, key=lambda finding: order.index(finding.level))


def _ending(run: RunFiles) -> Iterator[Finding]:
    reason, message = run.ending.get("reason"), run.ending.get("message", "").removeprefix("error: ")
    where = _where(run)
    if reason == "error":
        yield Finding("problem", f"The run ended with an error{where}: {message}.")
    elif reason == "preempted":
        yield Finding("warning", f"The run is not finished; it was interrupted ({message}).")
    elif reason == "finished" and "ended early" in message:
        yield Finding("note", f"The run is finished: {message}.")
    elif not reason and run.is_running:
        yield Finding("note", f"The run is going on{where}. This page shows it as it was then.")
    elif not reason:
        begins = "goes on from its newest checkpoint" if run.checkpoints else "begins anew, as no checkpoint is there"
        text = f"The run is not finished, and no end is recorded: it was killed{where}. The same command {begins}."
        yield Finding("warning", text)
    if reason == "finished" and run.model is None:
        yield Finding("warning", "The run is finished, but its model is not in the folder: it was moved or removed.")


def _not_finite(run: RunFiles) -> Iterator[Finding]:
    if run.train and run.train[-1]["loss"] is None:
        yield Finding(
            "problem",
            "The newest losses are not finite: training has broken down. Lower optim.base_lr, set optim.clip_grad, or "
            "look at the samples in skipped-steps.jsonl.",
        )
    elif run.skipped:
        steps = run.train[-1]["step"] if run.train else run.skipped[-1] + 1
        is_much = run.rollback is not None or len(run.skipped) > FEW_STEPS * steps
        named = ", ".join(f"{step:,}" for step in run.skipped[:5]) + (" and others" if len(run.skipped) > 5 else "")
        advice = ". Lower optim.base_lr or set optim.clip_grad" if is_much else "; a few of them do no harm"
        plural = "s were" if len(run.skipped) > 1 else " was"
        yield Finding(
            "warning" if is_much else "note",
            f"{len(run.skipped):,} step{plural} skipped, as loss or gradient was not finite (step {named}){advice}.",
        )
    if run.rollback is not None:
        yield Finding("warning", f"The run went back to the weights of step {run.rollback:,}, and on with other data.")


def _divergence(run: RunFiles) -> Iterator[Finding]:
    known = [record for record in run.train if record["loss"] is not None]
    now = newest_loss(run)
    if len(known) <= LINES or now is None:
        return
    least = min(known, key=lambda record: float(record["loss"]))
    # A small loss of a classifier may double by chance: only one that is again as at the start tells something.
    is_high = run.kind == PRETRAINING or now > NOTHING_LEARNED * known[0]["loss"]
    if now > DIVERGING * least["loss"] and is_high:
        yield Finding(
            "problem",
            f"The loss rose from {loss_in_words(least['loss'])} at epoch {epoch_in_words(least['epoch'])} to "
            f"{loss_in_words(now)}: training diverges. Lower optim.base_lr, lengthen optim.warmup_epochs, or set "
            "optim.clip_grad.",
        )


def _learning(run: RunFiles) -> Iterator[Finding]:
    loss, found = newest_loss(run), run.baselines
    if loss is None or found is None or run.kind != PRETRAINING:
        return
    normed = run.settings.get("model.norm_pix_loss", True)
    mean = "predicting each patch's mean" if normed else "predicting the mean of all pixels"
    if loss > NOTHING_LEARNED * found.patch_mean:
        is_early = is_warming_up(run)
        advice = "" if is_early else " Try another optim.base_lr, and look whether the pictures are as they should be."
        yield Finding(
            "note" if is_early else "problem",
            f"The loss ({loss_in_words(loss)}) is still above {mean} ({found.patch_mean:.3f}): "
            f"nothing has been learned yet.{advice}",
        )
    elif loss > NOTHING_LEARNED * found.place_mean:
        yield Finding(
            "warning",
            f"The loss ({loss:.3f}) is below {mean} ({found.patch_mean:.3f}), but not below the mean target of each "
            f"place ({found.place_mean:.3f}): the model knows where a patch is, and not yet what is around it.",
        )
    else:
        less = 1 - loss / found.place_mean
        yield Finding(
            "good",
            f"The loss is {loss:.3f}, {100 * less:.0f} % below what needs no learning: {mean} gives "
            f"{found.patch_mean:.3f}, and the mean target of each place {found.place_mean:.3f}.",
        )


def _waiting(run: RunFiles) -> Iterator[Finding]:
    wait = data_wait(run)
    if wait is not None and wait > WAITING:
        workers = run.settings.get("data.workers")
        now = f" (now {workers})" if type(workers) is int else ""
        kept = "" if run.settings.get("data.keep_decoded") else ", or data.keep_decoded if all fit into memory"
        yield Finding(
            "warning",
            f"The device waited for data {100 * wait:.0f} % of the time: raise data.workers{now}, up to the number of "
            f"processors. If that is not enough: smaller images (mae pack --short_side){kept}.",
        )


def _warm_up(run: RunFiles) -> Iterator[Finding]:
    if is_warming_up(run):
        last, until = run.train[-1], run.number("optim.warmup_epochs") or 0.0
        yield Finding(
            "note",
            f"The learning rate is still warming up: it rises until epoch {epoch_in_words(until)}, and this is epoch "
            f"{epoch_in_words(last['epoch'])}. Judge the loss after that.",
        )


def _data(run: RunFiles) -> Iterator[Finding]:
    if run.bad_samples:
        allowed = run.number("data.max_bad_samples")
        limit = "" if allowed is None else f", {allowed:,.0f} are allowed"
        number = len(run.bad_samples)
        many = f"{number:,} bad images were" if number > 1 else "1 bad image was"
        yield Finding("note", f"{many} replaced by others{limit}; their names are under “Data”.")
    if not run.train:
        yield Finding("warning", "The log of the training is lost, or training has not begun: there are no curves.")


def _pixels(found: NearestNeighbours) -> list[Finding]:
    figures = f"{100 * found.features:.1f} %", f"{100 * found.pixels:.1f} %"
    about = f"{found.source}, {found.samples:,} validation images"
    enough = ERRORS_OF_PIXELS / math.sqrt(found.samples)
    if found.features < found.pixels - enough:
        text = f"k-NN by the features ({figures[0]}) is below k-NN by plain pixels ({figures[1]}; {about})"
        return [Finding("warning", f"{text}: so far, plain pixels tell classes apart better.")]
    if found.features > found.pixels + enough:
        return [Finding("good", f"k-NN by the features ({figures[0]}) beats plain pixels ({figures[1]}; {about}).")]
    text = f"k-NN by the features ({figures[0]}) is as good as by plain pixels ({figures[1]}; {about})"
    return [Finding("note", f"{text}: the difference is within the error.")]


def _where(run: RunFiles) -> str:
    if not run.train:
        return ""
    step, total = run.train[-1]["step"], run.total
    return f" after step {step:,}" + (f" of {total:,}" if total is not None else "")
