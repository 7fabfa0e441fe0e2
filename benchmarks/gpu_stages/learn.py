"""Stage learn: pretrain on small images for as many epochs as fit, and judge the encoder.

A run that the time of a call cuts off saves a checkpoint, and the next call resumes it. Each call ends with an
evaluation of what has been learned so far; that of the finished run has a linear probe and random weights too.
"""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from . import runs
from .commands import mae, run_until
from .measurement import Measurement
from .place import ROOT, Place
from .results import FailedError, Figures, SkippedError, UnfinishedError, last_lines, write_atomically
from .worker import Worker

_SECONDS_TO_SAVE, _SECONDS_TO_JUDGE, _LEAST_SECONDS = 30.0, 90.0, 150.0
_MOST_WORKERS = 12
_TOY = (
    "--epochs", 2, "--batch_size", 16, "--optim.warmup_epochs", 1, "--log_every", 2, "--model.depth", 2,
    "--model.width", 96, "--model.heads", 3,
)  # fmt: skip


@dataclass(frozen=True)
class Set:
    """A set of images, whose shards are named `FILES-train-*` and `FILES-SPLIT-*`."""

    name: str
    files: str
    title: str
    config: str
    test_split: str = "test"
    side: int = 32

    def shards(self, place: Place, split: str) -> list[str]:
        """Return the shards of a split.

        Raises:
            SkippedError: if there are none.
        """
        folder = Place(place.out, place.work / "toy", True, 0.0) if place.rehearse else place
        found = folder.found(f"**/{self.files}-{split}-*.tar") or folder.found(f"**/{self.files}-{split}-*.tar.gz")
        if not found:
            raise SkippedError(f"no {self.files}-{split}-*.tar or .tar.gz in the folder that --shards names")
        return found


SETS = (
    Set("cifar10", "cifar10", "CIFAR-10, ViT-Ti/4", "cifar10.yaml"),
    Set("tiny-imagenet", "tiny-imagenet*", "Tiny-ImageNet, ViT-S/8", "tiny_imagenet.yaml", "val", 64),
)


def measurements(place: Place, worker: Worker) -> Iterator[Measurement]:
    """Return the measurements of this stage: for each set, pretraining and evaluation."""
    for images in SETS:
        if place.rehearse:
            run = partial(worker.ask, "toy_shards.write", str(place.work / "toy"), images.name, images.test_split)
            yield Measurement(f"{images.title}: toy images", partial(run, images.side))
        yield Measurement(f"{images.title}: pretrain", partial(pretrain, place, images), _LEAST_SECONDS)
        yield Measurement(f"{images.title}: evaluate", partial(evaluate, place, images))


def folder_of(place: Place, images: Set) -> Path:
    return place.work / "learn" / images.name


def pretrain(place: Place, images: Set) -> Figures:
    """Pretrain, or go on with it, until the run is finished or the time of this call is nearly over."""
    run = folder_of(place, images)
    if place.rehearse and images is SETS[0]:
        with suppress(UnfinishedError):  # as if the time of a call were over after the first checkpoint
            pretrain_until(place, images, lambda: bool(runs.checkpoints(run)))
    reserve = 0.0 if place.rehearse else _SECONDS_TO_JUDGE + _SECONDS_TO_SAVE
    return pretrain_until(place, images, lambda: place.seconds_left() < reserve)


def pretrain_until(place: Place, images: Set, is_over: Callable[[], bool]) -> Figures:
    """Start or resume the run; raise an `UnfinishedError` with its progress if the time was over first."""
    run = folder_of(place, images)
    words = ["-m", "mae", "pretrain", *settings(place, images)]
    ended = run_until(place, words, is_over, signal.SIGTERM, _SECONDS_TO_SAVE)
    bring_back(place, images)
    if not ended.was_stopped and ended.code:
        said = last_lines(ended.output, 1)
        raise FailedError(f"pretraining ended with exit code {ended.code}: {said}", ended.output)
    if ended.was_stopped:
        if not runs.checkpoints(run):
            raise UnfinishedError("the time was up before the first checkpoint; give more --minutes")
        raise UnfinishedError("the next call goes on", progress(run))
    return progress(run)


def settings(place: Place, images: Set) -> list[object]:
    """Return the settings of `mae pretrain`; those after `--` on the command line are the last."""
    train, test = images.shards(place, "train"), images.shards(place, images.test_split)
    workers, every = (1, 2) if place.rehearse else (max(1, min(_MOST_WORKERS, place.cpus - 2)), 1000)
    return [
        "--config", ROOT / "configs" / "pretrain" / images.config, "--run_dir", folder_of(place, images),
        "--data.shards", *train, "--evaluation.train_shards", *train, "--evaluation.eval_shards", *test,
        "--data.keep_decoded", "True", "--data.workers", workers, "--checkpoint_every", every, "--keep_checkpoints", 1,
        *(_TOY if place.rehearse else ("--epochs", place.epochs)), *place.flags,
    ]  # fmt: skip


def progress(run: Path) -> Figures:
    """Return how far a run is, how fast, and what its own evaluations say along the way."""
    trained, along = runs.records(run), runs.records(run, "evaluation")
    if not trained:
        return {}
    last = trained[-1]
    names = ("step", "epoch", "loss", "knn", "few_shot", "rank")
    found = [{name: record[name] for name in names if name in record} for record in along]
    return {"epoch": last["epoch"], "step": last["step"], "loss": last["loss"], **runs.speed(run), "along": found}


def bring_back(place: Place, images: Set) -> None:
    """Copy the curve and the newest picture of a run to where they come back from."""
    run = folder_of(place, images)
    kept = [*runs.records(run), *runs.records(run, "evaluation")]
    write_atomically(place.out / f"learn-{images.name}.jsonl", "".join(f"{json.dumps(record)}\n" for record in kept))
    pictures = sorted(run.glob("pictures/*.png"))
    if pictures:
        shutil.copyfile(pictures[-1], place.out / f"learn-{images.name}.png")


def evaluate(place: Place, images: Set) -> Figures:
    """Judge the finished model, or the newest checkpoint."""
    run, out = folder_of(place, images), place.work / "learn" / f"{images.name}-evaluation"
    train, test = images.shards(place, "train"), images.shards(place, images.test_split)
    is_finished = (run / "model.safetensors").exists()
    found = runs.checkpoints(run)
    if not found:
        raise UnfinishedError("there is no checkpoint to judge yet")
    more = ("linear", "untrained") if is_finished else ()
    mae(
        place, "evaluate", run if is_finished else found[-1], "--data.shards", *train, "--eval_shards", *test,
        "--protocols", "knn", "few_shot", *more, "--out", out, limit=300.0,
    )  # fmt: skip
    shutil.copyfile(out / "results.md", place.out / f"learn-{images.name}-evaluation.md")
    figures = {"step": int(found[-1].name.partition("-")[2]), **runs.accuracies(out)}
    if not is_finished:
        raise UnfinishedError("of the newest checkpoint; the run is not finished", figures)
    return figures
