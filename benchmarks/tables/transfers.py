"""Tables of docs/guides/transfers.md: segmentation and defects with an encoder pretrained on the images of each."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.tables.table import Figures, Row, Table, markdown_table, percent

_PAGE = "docs/guides/transfers.md"
_SHAPE = (
    "--model.size tiny --model.width 128 --model.depth 4 --model.heads 4 --model.patch_size 8 "
    "--model.decoder_width 64 --model.decoder_depth 1 --model.decoder_heads 4"
)
_READ = "--data.keep_decoded True --data.workers 0 --batch_size 32"


def _table(
    name: str, pretraining: str, rows: tuple[Row, ...], markdown: Callable[[Mapping[str, Figures]], str]
) -> Table:
    """Return a table: pretrain, export, and measure each row with a script of examples/."""
    prepare = (
        f"mae pretrain {_READ} {_SHAPE} {pretraining} --run_dir OUT/run",
        "mae export OUT/run --to timm --out OUT/encoder",
    )
    return Table(name, rows, markdown, prepare, _PAGE)


def _row(name: str, script: str, file: str) -> Row:
    """Return a row: what a script of examples/ found, its settings and a list of figures, one per seed, by its rows."""

    def read(out: Path) -> Figures:
        found = json.loads((out / file).read_text())
        return {"settings": found["settings"], "rows": found["rows"]}

    return Row(name, (f"python examples/{script} --encoder OUT/encoder --out OUT/{file}",), read)


def _segmented(found: Mapping[str, Figures]) -> str:
    """Return the mean IoU of each way to train and the rate that was chosen, in a column per number of masks."""

    def cell(trials: list[Figures]) -> str:
        tested = [trial for trial in trials if trial["images"] == "test"]
        return f"{percent([trial['miou'] for trial in tested])} ({tested[0]['rate']:g})"

    columns = [each["figures"]["rows"] for each in found.values()]
    lines = [[way, *(cell(column[way]) for column in columns)] for way in columns[0]]
    return markdown_table(("mIoU, test images (learning rate)", *found), lines)


def _detected(found: Mapping[str, Figures]) -> str:
    """Return AUROCs of images and patches for each way of scoring."""
    columns = ("image, max", "image, top 1 %", "patch", "patch, defective images")
    (about,) = found.values()
    rows = about["figures"]["rows"].items()
    lines = [[way, *(percent([trial[column] for trial in trials]) for column in columns)] for way, trials in rows]
    return markdown_table(("AUROC, %", *columns), lines)


_CAMVID = "DATA/camvid-half/camvid-half"
_SEGMENT = (
    f"segmentation.py --train {_CAMVID}-train-000000.tar.gz --val {_CAMVID}-val-000000.tar.gz "
    f"--test {_CAMVID}-test-000000.tar.gz --size 176 240 --seeds 0 1 2"
)
_PCB = "DATA/deeppcb-subset/deeppcb"
_FIND = (
    f"anomaly.py --train {_PCB}-train-good-000000.tar --test {_PCB}-test-000000.tar --run OUT/run --bank 5000 "
    "--masks 32 --seeds 0 1 2"
)
TABLES = (
    _table(
        "camvid",
        f"--data.shards {_CAMVID}-train-000000.tar.gz --epochs 300 --data.image_size 176 240 "
        "--augment.crop_scale 0.2 1.0 --optim.base_lr 5e-3 --optim.warmup_epochs 15",
        (
            _row("37 masks", f"{_SEGMENT} --masks 37 --epochs 30 --head_epochs 30", "37-masks.json"),
            _row("367 masks", f"{_SEGMENT} --epochs 15 --head_epochs 15", "367-masks.json"),
        ),
        _segmented,
    ),
    _table(
        "deeppcb",
        f"--data.shards {_PCB}-train-good-000000.tar --epochs 1000 --data.image_size 160 160 --data.channels 1 "
        "--augment.crop_scale 0.2 0.3 --augment.crop_ratio 0.9 1.1 --model.norm_pix_loss False "
        "--optim.base_lr 5e-3 --optim.warmup_epochs 50",
        (_row("deeppcb", _FIND, "figures.json"),),
        _detected,
    ),
)
