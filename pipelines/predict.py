"""Predict the classes of images with a fine-tuned model.

mae predict runs/tuned photos --out predictions.csv
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mae.inference.applying import Application
from mae.inference.rows import PredictedRows
from mae.inference.settings import ApplySettings
from mae.settings import check, check_name, parse
from mae.training.processes.accelerator import start_accelerator
from mae.training.processes.first_error import errors_said_once


@dataclass(frozen=True)
class PredictSettings(ApplySettings):
    """Predict the classes of images with a fine-tuned model: one row per image, in the order given.

    An image that cannot be used has a row with the reason; the exit code is then 3. A run that was killed continues
    with the same command.
    """

    EXAMPLE: ClassVar = "mae predict runs/tuned photos --out predictions.csv"
    FIRST: ClassVar = ("out", "top")

    out: Path = Path("predictions.csv")
    """New file for the predictions; its name ends in .csv, .jsonl or .parquet."""
    top: int = 5
    """Number of most probable classes in each row."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.top >= 1, "top", self.top, "1 or more")
        check(self.out.suffix in (".csv", ".jsonl", ".parquet"), "out", self.out, "a name in .csv, .jsonl or .parquet")
        check_name("out", self.out)


def run(settings: PredictSettings) -> None:
    """Predict, and write the table."""
    application = Application.open(settings, start_accelerator("fp32"), needs_head=True)
    application.write(PredictedRows(application.images, application.model, settings.top), settings.out)


def main(argv: Sequence[str] | None = None) -> None:
    """Run `mae predict`."""
    with errors_said_once():
        run(parse(PredictSettings, sys.argv[1:] if argv is None else argv, prog="mae predict"))


if __name__ == "__main__":
    main()
