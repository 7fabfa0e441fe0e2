"""What each setting of pretraining is worth on CIFAR-10 (JPEG copies): short runs, one change at a time.

Every run sees 25,000 training images for 12 epochs and is judged on 5,000 others, which no run has seen: by nearest
neighbours and by logistic regression, both fitted on 10,000 labels. The test images are not used.
"""

from collections.abc import Mapping
from statistics import mean

from benchmarks.tables.table import Figures, Row, Table, evaluated, markdown_table, minutes, run_folder

_SHARDS = "DATA/cifar10-jpeg/cifar10-train-"
SETTINGS = {
    "--data.image_size": "32", "--data.crop_pct": "1.0", "--data.workers": "0", "--data.keep_decoded": "True",
    "--augment.crop_scale": "0.2 1.0", "--model.size": "tiny", "--model.width": "128", "--model.depth": "4",
    "--model.heads": "4", "--model.patch_size": "4", "--model.decoder": "cross", "--model.decoder_width": "96",
    "--model.decoder_depth": "1", "--model.decoder_heads": "3", "--model.predict_ratio": "0.3333",
    "--model.position_temperature": "10000", "--optim.base_lr": "1e-3", "--optim.warmup_epochs": "1",
    "--batch_size": "256", "--epochs": "12", "--seed": "0", "--checkpoint_every": "200",
    "--picture_every": "1000000",
}  # fmt: skip
"""Settings that every run has unless its row changes them."""

CHANGES = {
    "as it is": {},
    "seed 1": {"--seed": "1"},
    "seed 2": {"--seed": "2"},
    "base_lr 2e-3": {"--optim.base_lr": "2e-3"},
    "base_lr 4e-3": {"--optim.base_lr": "4e-3"},
    "base_lr 5e-4": {"--optim.base_lr": "5e-4"},
    "batch 128": {"--batch_size": "128"},
    "batch 128, base_lr 2e-3": {"--batch_size": "128", "--optim.base_lr": "2e-3"},
    "batch 1024": {"--batch_size": "1024"},
    "mask ratio 0.5": {"--model.mask_ratio": "0.5"},
    "mask ratio 0.65": {"--model.mask_ratio": "0.65"},
    "decoder depth 2": {"--model.decoder_depth": "2"},
    "decoder depth 4": {"--model.decoder_depth": "4"},
    "all hidden patches predicted": {"--model.predict_ratio": "1"},
    "decoder self, depth 2": {
        "--model.decoder": "self", "--model.decoder_depth": "2", "--model.predict_ratio": "1"
    },
    "decoder self, 64 wide": {
        "--model.decoder": "self", "--model.decoder_width": "64", "--model.decoder_heads": "2",
        "--model.predict_ratio": "1",
    },
    "base_lr 2e-3, decoder self, 64 wide": {
        "--optim.base_lr": "2e-3", "--model.decoder": "self", "--model.decoder_width": "64",
        "--model.decoder_heads": "2", "--model.predict_ratio": "1",
    },
    "mask green": {"--model.mask": "green"},
    "plain pixels as targets": {"--model.norm_pix_loss": "False"},
    "temperature 10": {"--model.position_temperature": "10"},
    "temperature 100": {"--model.position_temperature": "100"},
    "Muon": {"--optim.name": "muon"},
    "Muon, base_lr 3e-3": {"--optim.name": "muon", "--optim.base_lr": "3e-3"},
    "two views": {"--data.views_per_image": "2"},
    "four views": {"--data.views_per_image": "4"},
    "crop from 0.08": {"--augment.crop_scale": "0.08 1.0"},
    "crop from 0.5": {"--augment.crop_scale": "0.5 1.0"},
    "weight decay 0.15": {"--optim.weight_decay": "0.15"},
}  # fmt: skip
"""What each row changes."""


def row(name: str) -> Row:
    """Return the row with this name in `CHANGES`."""
    run = run_folder(name)
    flags = " ".join(f"{flag} {value}" for flag, value in (SETTINGS | CHANGES[name]).items())
    return Row(
        name,
        (
            f"mae pretrain {flags} --data.shards {_SHARDS}00000[0-4].tar.gz --run_dir {run}",
            f"mae evaluate {run} --data.shards {_SHARDS}00000[01].tar.gz --eval_shards {_SHARDS}000009.tar.gz "
            "--protocols knn linear --data.workers 0",
        ),
        evaluated(f"{run.removeprefix('OUT/')}/evaluation"),
    )


def markdown(found: Mapping[str, Figures]) -> str:
    """Return the table, with the difference of each row to the mean of the seeds without a change."""
    base = [found[name]["figures"] for name in ("as it is", "seed 1", "seed 2") if name in found]
    means = {what: mean(100 * each[what]["top1"][0] for each in base) for what in ("knn", "linear")}
    rows = []
    for name in CHANGES:
        if name in found:
            top1 = {what: 100 * found[name]["figures"][what]["top1"][0] for what in means}
            cells = [f"{top1[what]:.1f} ({top1[what] - means[what]:+.1f})" for what in means]
            rows.append([name, *cells, minutes(found[name])])
    return markdown_table(("change", "k-NN", "linear probe", "CPU minutes"), rows)


TABLE = Table("recipes", tuple(map(row, CHANGES)), markdown)
