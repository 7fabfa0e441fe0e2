"""The preset for Fashion-MNIST beside candidates, judged on training images that no run has seen."""

from collections.abc import Mapping

from benchmarks.tables.table import Figures, Row, Table, evaluated, markdown_table, minutes, percent, run_folder

_SHARDS = "DATA/fashion-mnist/fashion-mnist-train-00000"
_SELF = "--model.decoder self --model.decoder_width 64 --model.decoder_heads 2 --model.predict_ratio 1"
_CROSS = "--model.decoder cross --model.decoder_width 96 --model.decoder_heads 3 --model.predict_ratio 0.3333"
CHANGES = {
    "self, base_lr 1e-3": f"--optim.base_lr 1e-3 {_SELF}",
    "self, base_lr 2e-3": f"--optim.base_lr 2e-3 {_SELF}",
    "cross, base_lr 1e-3": f"--optim.base_lr 1e-3 {_CROSS}",
    "cross, base_lr 2e-3": f"--optim.base_lr 2e-3 {_CROSS}",
}
"""What each row sets, beyond the preset."""
_PROTOCOLS = {"knn": "k-NN", "linear": "linear probe", "few_shot": "10 labels per class"}


def row(name: str) -> Row:
    """Return the row with this name in `CHANGES`."""
    run = run_folder(name)
    return Row(
        name,
        (
            f"mae pretrain --config configs/pretrain/fashion_mnist.yaml {CHANGES[name]} --data.workers 0 "
            f"--data.shards {_SHARDS}[0-8].tar.gz --run_dir {run}",
            f"mae evaluate {run} --data.shards {_SHARDS}[01].tar.gz --eval_shards {_SHARDS}9.tar.gz --data.workers 0 "
            f"--protocols {' '.join(_PROTOCOLS)}",
        ),
        evaluated(f"{run.removeprefix('OUT/')}/evaluation"),
    )


def markdown(found: Mapping[str, Figures]) -> str:
    """Return the table."""
    rows = [
        [
            name,
            *(percent(about["figures"][protocol]["top1"]) for protocol in _PROTOCOLS),
            minutes(about),
        ]
        for name, about in found.items()
    ]
    return markdown_table(("Fashion-MNIST, 20 epochs", *_PROTOCOLS.values(), "CPU minutes"), rows)


TABLE = Table("presets", tuple(map(row, CHANGES)), markdown)
