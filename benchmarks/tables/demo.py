"""The table of `make demo`: digits with few labels, over three seeds."""

import json
from collections.abc import Mapping
from pathlib import Path

from benchmarks.tables.table import Figures, Row, Table, markdown_table
from mae.evaluation.seeds import Cell, table_of


def read(out: Path) -> Figures:
    """Return the cells of the demo: encoder, labels, and an accuracy per seed."""
    return {"cells": json.loads((out / "demo" / "results.json").read_text())["cells"]}


def markdown(found: Mapping[str, Figures]) -> str:
    """Return the table: a row per encoder, a column per number of labels."""
    cells = [Cell(**cell | {"accuracies": tuple(cell["accuracies"])}) for cell in found["demo"]["figures"]["cells"]]
    header, rows = table_of(cells)
    return markdown_table(header, [[cell.replace("%", " %") for cell in row] for row in rows])


TABLE = Table("demo", (Row("demo", ("mae demo --out OUT/demo",), read),), markdown)
