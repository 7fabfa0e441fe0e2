"""Tables of docs/guides/transfers.md: segmentation and defects with an encoder pretrained on the images of each."""

import json
from collections.abc import Mapping
from pathlib import Path

from benchmarks.tables.table import Figures, Row, Table, markdown_table, percent

_PAGE = "docs/guides/transfers.md"
_SHAPE = (
    "--model.size tiny --model.width 128 --model.depth 4 --model.heads 4 --model.patch_size 8 "
    "--model.decoder_width 64 --model.decoder_depth 1 --model.decoder_heads 4"
)
_READ = "--data.keep_decoded True --data.workers 0 --batch_size 32"


def _table(name: str, pretraining: str, script: str, read: str, columns: Mapping[str, str]) -> Table:
    """Return a table: pretrain, export, and measure with a script of examples/; `columns` are its figures."""
    commands = (
        f"mae pretrain {_READ} {_SHAPE} {pretraining} --run_dir OUT/run",
        "mae export OUT/run --to timm --out OUT/encoder",
        f"python examples/{script} --encoder OUT/encoder --out OUT/figures.json",
    )

    def markdown(found: Mapping[str, Figures]) -> str:
        rows = found[name]["figures"]["rows"]
        lines = [[row, *(percent([trial[key] for trial in rows[row]]) for key in columns.values())] for row in rows]
        return markdown_table((read, *columns), lines)

    return Table(name, (Row(name, commands, _read),), markdown, page=_PAGE)


def _read(out: Path) -> Figures:
    """Return what the script of examples/ wrote: its settings, and a list of figures, one per seed, for each row."""
    found = json.loads((out / "figures.json").read_text())
    return {"settings": found["settings"], "rows": found["rows"]}


_CAMVID = "DATA/camvid-half/camvid-half"
_PCB = "DATA/deeppcb-subset/deeppcb"
TABLES = (
    _table(
        "camvid",
        f"--data.shards {_CAMVID}-train-000000.tar.gz --epochs 300 --data.image_size 176 240 "
        "--augment.crop_scale 0.2 1.0 --optim.base_lr 5e-3 --optim.warmup_epochs 15",
        f"segmentation.py --train {_CAMVID}-train-000000.tar.gz --test {_CAMVID}-test-000000.tar.gz --size 176 240 "
        "--epochs 30 --head_epochs 30 --seeds 0 1 2",
        "mIoU, test images",
        {"all masks": "miou"},
    ),
    _table(
        "deeppcb",
        f"--data.shards {_PCB}-train-good-000000.tar --epochs 1000 --data.image_size 160 160 --data.channels 1 "
        "--augment.crop_scale 0.2 0.3 --augment.crop_ratio 0.9 1.1 --model.norm_pix_loss False "
        "--optim.base_lr 5e-3 --optim.warmup_epochs 50",
        f"anomaly.py --train {_PCB}-train-good-000000.tar --test {_PCB}-test-000000.tar --run OUT/run --bank 5000 "
        "--masks 32 --seeds 0 1 2",
        "AUROC, %",
        {name: name for name in ("image, max", "image, top 1 %", "patch", "patch, defective images")},
    ),
)
