"""All protocols of `mae evaluate` on the encoder of the demo: scanned digits, judged frozen and trained further."""

from collections.abc import Mapping, Sequence

from benchmarks.tables.table import Figures, Row, Table, evaluated, frozen_table, markdown_table, percent

_EVALUATE = (
    "mae evaluate OUT/pretrained --data.shards 'OUT/shards/train-*.tar' --eval_shards 'OUT/shards/test-*.tar' "
    "--data.workers 0 --seeds 3"
)
_LENGTH = (
    "--augment.crop_scale 0.6 1 --augment.flip False --augment.rand_augment none --augment.erase 0 "
    "--regularization.mixup 0 --regularization.cutmix 0 --epochs 30 --batch_size 64"
)
_FROZEN = "frozen"
_SHOWN = {
    "attentive": "attentive probe",
    "linear_paper": "published linear probe (LARS)",
    "partial 0": "head only (`partial 0`)",
    "partial 1/2": "half a block (`partial 1/2`)",
    "partial 1": "1 block",
    "partial 2": "2 blocks",
    "finetune": "whole encoder",
    "untrained scratch": "the same from scratch",
    "resnet18 resnet": "ResNet-18 from scratch",
}
"""What is trained, by encoder and protocol."""


def _frozen() -> Row:
    command = f"{_EVALUATE} --out OUT/frozen --protocols knn linear few_shot pixels untrained"
    return Row(_FROZEN, (command,), evaluated("frozen"))


def _trained(protocol: str) -> Row:
    command = f"{_EVALUATE} {_LENGTH} --out OUT/{protocol} --protocols {protocol}"
    return Row(protocol, (command,), evaluated(protocol))


def markdown(found: Mapping[str, Figures]) -> str:
    """Return two tables: the frozen encoder, and what is trained with the rates that were chosen."""
    figures = {name: each for row, about in found.items() if row != _FROZEN for name, each in about["figures"].items()}
    trained = [
        [shown, percent(figures[name]["top1"]), _rates(figures[name]["chosen"])]
        for name, shown in _SHOWN.items()
        if name in figures
    ]
    return "\n".join(
        (
            frozen_table("frozen", found[_FROZEN]["figures"]),
            markdown_table(("trained, 515 steps", "top-1", "learning rate chosen"), trained),
        )
    )


def _rates(chosen: Sequence[Mapping[str, float]]) -> str:
    """Return the learning rates that were chosen over the seeds."""
    return ", ".join(f"{rate:g}" for rate in sorted({each["lr"] for each in chosen}))


TABLE = Table(
    "protocols",
    (_frozen(), *map(_trained, ("attentive", "linear_paper", "partial", "finetune", "scratch", "resnet"))),
    markdown,
    prepare=(
        "mae pack digits --out OUT/shards",
        "mae pretrain --config configs/pretrain/digits.yaml --data.shards 'OUT/shards/train-*.tar' "
        "--run_dir OUT/pretrained",
    ),
)
