"""Cost of each decoder and what its encoder learns: short runs with equal settings, side by side.

`python benchmarks/decoders.py --train 'cifar10-train-*.tar' --test 'cifar10-test-*.tar' --out FOLDER [--epochs N]`

Every run has the same small encoder (128 channels, 4 blocks), data order, masks, learning rate and length, and one
thread; only the decoder differs. After each epoch, the encoder of the checkpoint is evaluated without any training, by
the accuracy of the 20 nearest neighbours (cosine) of its cls token: 10,000 training images classify 5,000 test images.
Plain pixels and an untrained encoder are evaluated in the same way. The losses are comparable: predicting a random
share of the hidden patches has the same expected loss as predicting all. Start the same command again to resume an
interrupted run; the table and the curves are then made from all results.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from mae.data.eval_batches import EvalBatches
from mae.data.loader import normalize
from mae.data.prepare import open_shards
from mae.data.settings import DataSettings
from mae.data.statistics import PixelStatistics
from mae.inference.model import load
from mae.models.description import ModelDescription, read_description
from mae.models.encoder import build_encoder

SETTINGS = """
--batch_size 128 --log_every 39 --picture_every 1000000 --data.image_size 32 --data.crop_pct 1.0 --data.workers 0
--augment.crop_scale 0.2 1.0 --model.width 128 --model.depth 4 --model.heads 4 --model.patch_size 4
--optim.base_lr 2e-3 --optim.warmup_epochs 0.5
"""
DECODERS = {
    "self 128/2": "--model.decoder self --model.decoder_width 128 --model.decoder_depth 2 --model.decoder_heads 4",
    "cross 128/3": "--model.decoder cross --model.decoder_width 128 --model.decoder_depth 3 --model.decoder_heads 4",
    "cross 128/3, a quarter predicted": "--model.decoder cross --model.decoder_width 128 --model.decoder_depth 3 "
    "--model.decoder_heads 4 --model.predict_ratio 0.25",
    "self 64/1": "--model.decoder self --model.decoder_width 64 --model.decoder_depth 1 --model.decoder_heads 2",
    "self 128/4": "--model.decoder self --model.decoder_width 128 --model.decoder_depth 4 --model.decoder_heads 4",
    "self 256/4": "--model.decoder self --model.decoder_width 256 --model.decoder_depth 4 --model.decoder_heads 8",
}
TRAIN_IMAGES, TEST_IMAGES, NEIGHBOURS = 10_000, 5_000, 20


class Result(NamedTuple):
    """Losses, accuracies and time of one run."""

    losses: list[tuple[float, float]]
    """Epoch and mean loss, for each tenth of an epoch."""
    accuracies: list[float]
    """Accuracy after each epoch."""
    seconds: float
    """CPU time of the whole training."""


def train(flags: Sequence[str], shards: str, folder: Path, epochs: int, steps_per_epoch: int) -> float:
    """Run `mae pretrain` in a separate process, and return its CPU seconds; they are stored beside the run."""
    kept = folder.with_suffix(".seconds")
    if kept.exists():
        return float(kept.read_text())
    every = ["--checkpoint_every", str(steps_per_epoch), "--keep_every", str(steps_per_epoch)]
    command = [sys.executable, "-m", "mae", "pretrain", *SETTINGS.split(), *flags, *every]
    before = os.times()
    subprocess.run(  # noqa: S603 - our own command
        [*command, "--data.shards", shards, "--run_dir", str(folder), "--epochs", str(epochs)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        check=True,
    )
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    kept.write_text(str(seconds))
    return seconds


Features = Callable[[Tensor], Tensor]


def voted(features: Features, description: ModelDescription, train_shards: str, test_shards: str) -> float:
    """Return the accuracy of the nearest neighbours."""
    statistics = PixelStatistics(description.mean, description.std)

    def collect(shards: str, most: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return features and labels of `most` images, spread evenly over the shards."""
        data = DataSettings(shards=(shards,), image_size=description.image_size, crop_pct=1.0, workers=0)
        index = open_shards(data.shards, data, print)
        ids = np.linspace(0, len(index) - 1, most).astype(np.int64)
        batches = EvalBatches(index, 250, data, ids=ids)
        found = [batches[number] for number in range(len(batches))]
        with torch.no_grad():
            tokens = torch.cat([features(normalize(batch.images, statistics)) for batch in found])
        return tokens.numpy(), torch.cat([batch.labels for batch in found]).numpy()

    classifier = KNeighborsClassifier(NEIGHBOURS, weights="distance", metric="cosine")
    return float(classifier.fit(*collect(train_shards, TRAIN_IMAGES)).score(*collect(test_shards, TEST_IMAGES)))


def baselines(path: Path, train_shards: str, test_shards: str) -> dict[str, float]:
    """Return the accuracy without learning: of the pixels, and of an untrained encoder like the one in `path`."""
    description = read_description(path)
    torch.manual_seed(0)
    encoder = build_encoder(description.encoder(), description.image_size, description.channels).eval()
    untrained: dict[str, Features] = {"plain pixels": lambda images: images.flatten(1), "untrained encoder": encoder}
    return {name: voted(each, description, train_shards, test_shards) for name, each in untrained.items()}


def nearest_neighbours(path: Path, train_shards: str, test_shards: str) -> float:
    """Return the accuracy of the encoder of a checkpoint; it is stored in the run folder."""
    kept = path.parent.parent.parent / f"{path.parent.name}.knn"
    if kept.exists():
        return float(kept.read_text())
    model = load(path, "cpu")
    accuracy = voted(model.encoder, model.description, train_shards, test_shards)
    kept.write_text(str(accuracy))
    return accuracy


def measure(folder: Path, seconds: float, train_shards: str, test_shards: str, steps_per_epoch: int) -> Result:
    """Return the losses in the log, and the accuracies of the checkpoints at the ends of epochs."""
    records: list[dict[str, Any]] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [(r["step"] / steps_per_epoch, r["loss"]) for r in records if r["kind"] == "train"]
    checkpoints = sorted((folder / "checkpoints").glob("step-*/model.safetensors"))
    whole = [path for path in checkpoints if int(path.parent.name.removeprefix("step-")) % steps_per_epoch == 0]
    return Result(losses, [nearest_neighbours(path, train_shards, test_shards) for path in whole], seconds)


def draw(results: dict[str, Result], path: Path) -> None:
    """Draw loss and accuracy over the epochs."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for name, result in results.items():
        # The first losses are of an almost untrained model; the last one is a mean of few steps.
        loss.plot(*zip(*result.losses[2:-1], strict=True), label=name)
        accuracy.plot(range(1, len(result.accuracies) + 1), [100 * a for a in result.accuracies], marker="o")
    loss.set(xlabel="epoch", ylabel="loss")
    accuracy.set(xlabel="epoch", ylabel="20 nearest neighbours, accuracy [%]")
    accuracy.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=list(DECODERS), default=list(DECODERS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    # Without the last incomplete batch, so that a multiple of it is never far behind the end of an epoch.
    steps_per_epoch = len(open_shards((options.train,), DataSettings(workers=0), print)) // 128
    results = {}
    for name in options.only:
        folder = options.out / "".join(c if c.isalnum() else "-" for c in name)
        seconds = train(DECODERS[name].split(), options.train, folder, options.epochs, steps_per_epoch)
        results[name] = measure(folder, seconds, options.train, options.test, steps_per_epoch)
        draw(results, options.out / "curves.png")
    print("| decoder | CPU minutes | loss after each epoch | nearest neighbours after each epoch, % |")
    print("|---|---|---|---|")
    for name, result in results.items():
        losses = " ".join(f"{value:.3f}" for epoch, value in result.losses if epoch == int(epoch))
        accuracies = " ".join(f"{100 * value:.1f}" for value in result.accuracies)
        print(f"| {name} | {result.seconds / 60:.1f} | {losses} | {accuracies} |")
    for name, accuracy in baselines(folder / "model.safetensors", options.train, options.test).items():
        print(f"| {name} | | | {100 * accuracy:.1f} |")


if __name__ == "__main__":
    main()
