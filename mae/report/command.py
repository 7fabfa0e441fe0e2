"""`mae report`: one page about a run, or about several side by side, to open, to keep or to send.

mae report runs/first runs/second --out report.html
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from tyro.conf import Positional

from mae.errors import one_line_errors
from mae.files import write_atomically
from mae.output import say
from mae.report.run import read_runs, report
from mae.settings import check, check_name, parse


@dataclass(frozen=True)
class ReportSettings:
    """Write a page about one run, or about several side by side: a single file that needs no network."""

    EXAMPLE: ClassVar = "mae report runs/first runs/second --out report.html"

    runs: Positional[tuple[Path, ...]]
    """Folders of runs, finished or not. Of several, the curves are drawn over each other."""
    out: Path = Path("report.html")
    """File to write; one that exists is replaced."""

    def __post_init__(self) -> None:
        check(len(self.runs) > 0, "runs", "none given", "at least one folder of a run")
        check(self.out.suffix in (".html", ".htm"), "out", self.out, "a name that ends in .html")
        check_name("out", self.out)


def run(settings: ReportSettings) -> Path:
    """Write the page, and return its path."""
    began = time.perf_counter()
    text = report(read_runs(settings.runs), torch.device("cpu")).encode()
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(settings.out, text)
    say(f"report {settings.out}: {len(text) / 1e6:.2f} MB, made in {time.perf_counter() - began:.1f} s")
    return settings.out


def main(argv: Sequence[str] | None = None) -> None:
    """Run `mae report`."""
    with one_line_errors():
        run(parse(ReportSettings, sys.argv[1:] if argv is None else argv, prog="mae report"))
