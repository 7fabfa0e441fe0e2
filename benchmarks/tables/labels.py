"""What an encoder is worth with few and with many labels: 1 to 50 of each class, a tenth of the set, and all of it.

A small ViT is pretrained on nine tenths of the training images; the last tenth follows it along the way. The settings
come from the table of recipes. Each row is one number of labels, or one way to train on them. The test images are
measured once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.tables.table import Figures, Row, Table, accuracy, evaluated, logged, markdown_table, percent

SHOTS = (1, 5, 10, 50)
SEEDS = (0, 1, 2)
WAYS = {"fine-tuned": "OUT/pretrained", "from scratch": "none"}
"""Ways to train on labels, and what each starts from."""
_TENTH, _ALL = "10 %", "all"
_RESNET = f"resnet, {_TENTH}"
# The shards with these labels, and how long is trained on them.
_LENGTHS = {
    _TENTH: ("0", "--epochs 30 --batch_size 50 --optim.warmup_epochs 3"),
    _ALL: ("[0-9]", "--epochs 5 --batch_size 128 --optim.warmup_epochs 0.5"),
}


@dataclass(frozen=True)
class LabelledSet:
    """A set of images in ten training shards, and how a small model is pretrained and fine-tuned on it."""

    name: str
    train: str
    """Shards of training images, with `{}` for which of the ten."""
    test: str
    images: str
    """Settings of how images are read."""
    shape: str
    """Settings of the encoder's shape."""
    pretraining: str
    """Other settings of pretraining."""
    seeds: tuple[int, ...] = SEEDS
    """Seeds of training on a tenth of the labels."""
    has_resnet: bool = True
    """Whether a ResNet-18 is trained too: of images of 64 pixels, for more than three hours of a core."""


def table(of: LabelledSet) -> Table:
    """Return the table of a set."""
    shards = of.train.format
    pretraining = (
        f"mae pretrain {of.images} {of.shape} {of.pretraining} --run_dir OUT/pretrained "
        f"--data.shards {shards('[0-8]')} "
        f"--evaluation.eval_shards {shards('9')} --evaluation.train_shards {shards('0')}"
    )
    rows = [Row("pretraining", (), _along)]
    rows += [_frozen(of, f"{shots} per class", "[01]", f"few_shot --shots {shots}") for shots in SHOTS]
    rows += [_frozen(of, _TENTH, "0", "knn linear"), _frozen(of, _ALL, "[0-9]", "knn linear")]
    rows += [_tuned(of, way, _TENTH, seed) for seed in of.seeds for way in WAYS]
    rows += [_tuned(of, way, _ALL, 0) for way in WAYS]
    rows += [_resnet(of)] if of.has_resnet else []
    return Table(f"labels_{of.name}", tuple(rows), markdown, prepare=(pretraining,))


def _frozen(of: LabelledSet, labels: str, which: str, protocols: str) -> Row:
    """Return the row that judges the frozen encoder, an untrained one and the pixels with some of the labels."""
    folder = f"frozen-{labels.replace(' ', '-').replace('%', 'percent')}"
    command = (
        f"mae evaluate OUT/pretrained --data.shards {of.train.format(which)} --eval_shards {of.test} --data.workers 0 "
        f"--out OUT/{folder} --protocols pixels untrained {protocols}"
    )
    return Row(labels, (command,), evaluated(folder))


def _tuned(of: LabelledSet, way: str, labels: str, seed: int) -> Row:
    """Return the row that trains the whole encoder on some of the labels, from one start."""
    folder = f"{way.replace(' ', '-')}-{labels.removesuffix(' %')}-{seed}"
    which, length = _LENGTHS[labels]
    command = (
        f"mae finetune --config configs/finetune/few_labels.yaml {of.images} {of.shape} --labels_per_class None "
        f"--init {WAYS[way]} {length} --seed {seed} --eval_every 1000000 --run_dir OUT/{folder} "
        f"--data.shards {of.train.format(which)} --eval_shards {of.test}"
    )
    return Row(f"{way}, {labels}, seed {seed}", (command,), lambda out: {"top1": accuracy(out / folder)})


def _resnet(of: LabelledSet) -> Row:
    """Return the row of a ResNet-18 that is trained from scratch on a tenth of the labels.

    On a CPU, its 5 epochs take about as long as 30 of the small ViT.
    """
    command = (
        f"mae evaluate OUT/pretrained --data.shards {of.train.format('0')} --eval_shards {of.test} --data.workers 0 "
        "--out OUT/resnet --protocols resnet --augment.crop_scale 0.6 1 --epochs 5 --batch_size 64"
    )
    return Row(_RESNET, (command,), evaluated("resnet"))


def _along(out: Path) -> Figures:
    """Return what was measured on the last training shard along the pretraining."""
    seen = ("epoch", "loss", "knn", "few_shot", "rank")
    return {"along": [{name: record[name] for name in seen} for record in logged(out / "pretrained", "evaluation")]}


def markdown(found: Mapping[str, Figures]) -> str:
    """Return the table: a column for each number of labels, a row for each way to use them."""
    columns = [*(f"{shots} per class" for shots in SHOTS), _TENTH, _ALL]
    cells: dict[str, dict[str, str]] = {}
    for labels in columns:
        for judged, about in _figures(found, labels).items():
            if judged == "pixels svm" and labels not in (_TENTH, _ALL):
                continue  # it is fitted on all samples, whatever `--shots` is
            cells.setdefault(_ROWS[judged], {})[labels] = percent(about["top1"])
    for way in WAYS:
        for labels in columns:
            runs = [_figures(found, f"{way}, {labels}, seed {seed}") for seed in SEEDS]
            if accuracies := [run["top1"] for run in runs if run]:
                cells.setdefault(way, {})[labels] = percent(accuracies)
    if resnet := _figures(found, _RESNET):
        cells["ResNet-18 from scratch"] = {_TENTH: percent(resnet["resnet18 resnet"]["top1"])}
    by_labels = markdown_table(
        ("top-1", *columns), [[name, *(row.get(labels, "") for labels in columns)] for name, row in cells.items()]
    )
    return f"{by_labels}\n{_curve(_figures(found, 'pretraining')['along'])}"


def _curve(along: list[dict[str, float]]) -> str:
    """Return the table of what was measured along the pretraining."""
    rows = [
        [
            f"{each['epoch']:.1f}",
            f"{each['loss']:.3f}",
            f"{100 * each['knn']:.1f}",
            f"{100 * each['few_shot']:.1f}",
            f"{each['rank']:.1f}",
        ]
        for each in along
    ]
    return markdown_table(("epoch", "held-out loss", "k-NN", "10 labels per class", "RankMe"), rows)


def _figures(found: Mapping[str, Figures], row: str) -> dict[str, Any]:
    return found[row]["figures"] if row in found else {}


_PROBED = {"": "frozen", "untrained ": "untrained", "pixels ": "pixels"}
_ROWS = {"pixels svm": "pixels, RBF SVM"} | {
    f"{whose}{protocol}": f"{shown}, {how}"
    for whose, shown in _PROBED.items()
    for protocol, how in (("few_shot", "logistic regression"), ("linear", "logistic regression"), ("knn", "k-NN"))
}
"""Row of the table for each encoder and protocol."""
_SHAPE = "--model.size tiny --model.width 128 --model.depth 4 --model.heads 4"
_READ = "--data.crop_pct 1.0 --data.keep_decoded True --data.workers 0"
_PRETRAINING = (
    "--model.decoder cross --model.decoder_width 96 --model.decoder_depth 1 --model.decoder_heads 3 "
    "--model.predict_ratio 0.3333 --optim.base_lr 2e-3 --optim.warmup_epochs 1 --batch_size 256 "
    "--checkpoint_every 500 --picture_every 1000000"
)
SETS = (
    LabelledSet(
        "fashion_mnist",
        "DATA/fashion-mnist/fashion-mnist-train-00000{}.tar.gz",
        "DATA/fashion-mnist/fashion-mnist-test-00000[01].tar.gz",
        f"{_READ} --data.image_size 28 --data.channels 1 --data.mean 0.2860 --data.std 0.3530",
        f"{_SHAPE} --model.patch_size 4",
        f"{_PRETRAINING} --augment.crop_scale 0.6 1.0 --epochs 20",
    ),
    LabelledSet(
        "cifar10",
        "DATA/cifar10-jpeg/cifar10-train-00000{}.tar.gz",
        "DATA/cifar10-jpeg/cifar10-test-00000[01].tar.gz",
        f"{_READ} --data.image_size 32",
        f"{_SHAPE} --model.patch_size 4",
        f"{_PRETRAINING} --augment.crop_scale 0.2 1.0 --epochs 40",
    ),
    LabelledSet(
        "tiny_imagenet",
        "DATA/tiny-imagenet-100/tiny-imagenet-100-train-00000{}.tar.gz",
        "DATA/tiny-imagenet-100/tiny-imagenet-100-val-00000[01].tar.gz",
        f"{_READ} --data.image_size 64",
        f"{_SHAPE} --model.patch_size 8",
        f"{_PRETRAINING} --augment.crop_scale 0.2 1.0 --epochs 30",
        seeds=(0,),
        has_resnet=False,
    ),
)
TABLES = tuple(map(table, SETS))
