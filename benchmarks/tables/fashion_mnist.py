"""The presets for Fashion-MNIST: pretrained on all training images, judged frozen and tuned with 1 % of the labels."""

from collections.abc import Mapping

from benchmarks.tables.labels import SEEDS, WAYS
from benchmarks.tables.table import (
    FROZEN,
    Figures,
    Row,
    Table,
    accuracy,
    evaluated,
    frozen_table,
    markdown_table,
    percent,
    run_folder,
)

_TRAIN, _TEST = "DATA/fashion-mnist/fashion-mnist-train-*.tar.gz", "DATA/fashion-mnist/fashion-mnist-test-*.tar.gz"
_EVALUATE = f"mae evaluate OUT/pretrained --data.shards {_TRAIN} --eval_shards {_TEST} --data.workers 0"
_READ = {f"{whose}{each}": f"{whose}{FROZEN[each]}" for whose in ("", "untrained ") for each in ("knn", "linear")}


def _frozen() -> Row:
    """Return the row of the frozen encoder, an untrained one and the pixels."""
    command = f"{_EVALUATE} --out OUT/frozen --seeds 3 --protocols knn linear few_shot pixels untrained"
    return Row("frozen", (command,), evaluated("frozen"))


def _tokens(tokens: str, norm: str) -> Row:
    """Return the row of one kind of features."""
    name = f"{tokens}, {norm}"
    folder = run_folder(name)
    command = f"{_EVALUATE} --out {folder} --tokens {tokens} --norm {norm} --protocols knn linear untrained"
    return Row(name, (command,), evaluated(folder.removeprefix("OUT/")))


def _tuned(way: str, seed: int) -> Row:
    """Return the row that fine-tunes by the preset with one seed, from one start."""
    name = f"{way}, seed {seed}"
    run = run_folder(name)
    command = (
        f"mae finetune --config configs/finetune/fashion_mnist.yaml --data.shards {_TRAIN} --eval_shards {_TEST} "
        f"--init {WAYS[way]} --seed {seed} --eval_every 1000000 --run_dir {run}"
    )
    return Row(name, (command,), lambda out: {"top1": accuracy(out / run.removeprefix("OUT/"))})


TOKENS = tuple((tokens, norm) for tokens in ("cls", "avg", "cls+avg") for norm in ("raw", "normed"))
"""Kinds of features."""


def markdown(found: Mapping[str, Figures]) -> str:
    """Return three tables: frozen, fine-tuned, and which tokens are read."""

    tuned = []
    for way in WAYS:
        runs = [found[name]["figures"]["top1"] for seed in SEEDS if (name := f"{way}, seed {seed}") in found]
        if runs:
            tuned.append([way, ", ".join(f"{100 * run:.1f}" for run in runs), percent(runs)])
    measured = [kind for kind in TOKENS if ", ".join(kind) in found]
    kinds = [
        [*kind, *(percent(found[", ".join(kind)]["figures"][each]["top1"]) for each in _READ)] for kind in measured
    ]
    return "\n".join(
        (
            frozen_table("frozen, all labels", found["frozen"]["figures"]),
            markdown_table(("60 labels per class", "seeds", "mean"), tuned),
            markdown_table(("tokens", "norm", *_READ.values()), kinds),
        )
    )


TABLE = Table(
    "fashion_mnist",
    (_frozen(), *(_tuned(way, seed) for seed in SEEDS for way in WAYS), *(_tokens(*kind) for kind in TOKENS)),
    markdown,
    prepare=(
        f"mae pretrain --config configs/pretrain/fashion_mnist.yaml --data.shards {_TRAIN} --data.workers 0 "
        "--run_dir OUT/pretrained",
    ),
)
