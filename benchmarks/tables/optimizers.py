"""Muon and AdamW on scanned digits: pretraining x fine-tuning, each with rates chosen on the validation images."""

import json
from collections.abc import Mapping
from pathlib import Path

from benchmarks.tables.table import Figures, Row, Table, markdown_table, percent

_SHOWN = {"adamw": "AdamW", "muon": "Muon"}


def read(out: Path) -> Figures:
    """Return the rates that were chosen, and an accuracy per seed for each pair of optimisers."""
    found: Figures = json.loads((out / "runs" / "results.json").read_text())
    return found


def markdown(found: Mapping[str, Figures]) -> str:
    """Return the table: a row per optimiser of the pretraining, a column per optimiser of the fine-tuning."""
    figures = found["optimizers"]["figures"]
    header = [f"fine-tuned with {_SHOWN[name]}, rate {rate:g}" for name, rate in figures["fine-tuning"].values()]
    rows = [
        [f"{_SHOWN[name]}, rate {rate:g}", *map(percent, figures["accuracies"][name].values())]
        for name, rate in figures["pretraining"].values()
    ]
    return markdown_table(("pretrained with", *header), rows)


TABLE = Table("optimizers", (Row("optimizers", ("python benchmarks/optimizers.py --out OUT/runs",), read),), markdown)
