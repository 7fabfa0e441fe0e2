"""Export the encoder of a run for other libraries.

mae export runs/pretrain --to timm --out encoders/mine
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from tyro.conf import Positional

from mae.errors import one_line_errors
from mae.export.timm import export_timm
from mae.models.description import find_best_model, read_description
from mae.models.weights import read_weights
from mae.output import say
from mae.settings import check_name, parse
from mae.training.foreign_file import refuse_foreign_file


@dataclass(frozen=True)
class ExportSettings:
    """Write the encoder of a pretraining or fine-tuning run into a folder for another library."""

    EXAMPLE: ClassVar = "mae export runs/first --out encoders/first"

    source: Positional[Path]
    """Folder of a finished run, a checkpoint folder, or a model file; of a fine-tuning run that measured its accuracy,
    the best model is taken."""
    to: Literal["timm"] = "timm"
    """Library that is to load the encoder."""
    out: Path | None = None
    """New folder to write to; None: export-timm beside the model."""


def run(settings: ExportSettings) -> Path:
    """Export, load back and compare; return the new folder."""
    check_name("source", settings.source)
    model = find_best_model(settings.source)
    refuse_foreign_file(model)
    out = settings.out or model.parent / f"export-{settings.to}"
    check_name("out", out)
    difference = export_timm(read_weights(model), read_description(model), out, model)
    say(f"exported {model} to {out}; loaded back, features differ by at most {difference:.1e}")
    say(f'  timm.create_model("local-dir:{out}", pretrained=True)  # timm 1.0.26 or newer')
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """Run `mae export`."""
    with one_line_errors():
        run(parse(ExportSettings, sys.argv[1:] if argv is None else argv, prog="mae export"))


if __name__ == "__main__":
    main()
