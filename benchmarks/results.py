"""Repeat the tables of results in the docs from the image packs: measure, store the figures, write the tables.

`python benchmarks/results.py [TABLE ...] --data FOLDER [--out FOLDER] [--rows ROW ...] [--jobs N]`

Rows that are measured already are left as they are, and a run that was interrupted resumes; so start the same command
again until it ends. The figures go to docs/figures/TABLE.json, with the commands, the commit and the versions of each
row; the tables in the pages are made from these files. FOLDER of --data holds the image packs.
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.tables import (
    demo,
    fashion_mnist,
    labels,
    optimizers,
    presets,
    protocols,
    recipes,
    temperature,
    transfers,
)
from benchmarks.tables.table import ROOT

TABLES = {
    table.name: table
    for table in (
        demo.TABLE,
        temperature.TABLE,
        optimizers.TABLE,
        recipes.TABLE,
        presets.TABLE,
        fashion_mnist.TABLE,
        *labels.TABLES,
        protocols.TABLE,
        *transfers.TABLES,
    )
}
PAGES = tuple(dict.fromkeys(ROOT / table.page for table in TABLES.values()))


def with_tables(page: str) -> str:
    """Return a page in which the text between the two marks of each table is made anew from its figures."""
    return re.sub(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", _renewed, page, flags=re.DOTALL)


def _renewed(found: re.Match[str]) -> str:
    table = TABLES[found[2]]
    return f"{found[1]}{table.markdown(table.figures())}{found[3]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/results"))
    parser.add_argument("--rows", nargs="*", default=())
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    if unknown := set(options.tables) - TABLES.keys():
        parser.error(f"no table {', '.join(sorted(unknown))}; allowed: {', '.join(TABLES)}")
    tables = [TABLES[name] for name in options.tables or TABLES]
    if unknown := set(options.rows) - {row.name for table in tables for row in table.rows}:
        known = "; ".join(row.name for table in tables for row in table.rows)
        parser.error(f"no row {', '.join(sorted(unknown))}; allowed: {known}")
    for table in tables:
        try:
            table.measure(options.data.resolve(), options.out.resolve(), options.jobs, options.rows)
        finally:
            table.gather(options.out)
            page = ROOT / table.page
            page.write_text(with_tables(page.read_text()))


if __name__ == "__main__":
    main()
