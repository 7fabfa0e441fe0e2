"""Export a trained model for other libraries.

mae export runs/pretrain --to timm onnx --out exports/mine
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from tyro.conf import Positional

from mae.errors import is_rank_zero, one_line_errors
from mae.export.exporting import Exported, export_model
from mae.export.trained_model import read_trained_model
from mae.inference.settings import UnsaidSettings
from mae.output import say
from mae.settings import check_name, parse


@dataclass(frozen=True)
class ExportSettings(UnsaidSettings):
    """Write a model into folders for other libraries, load them back with these, and compare the outputs."""

    EXAMPLE: ClassVar = "mae export runs/first --to timm onnx --out exports/first"

    source: Positional[Path]
    """Folder of a finished run, a checkpoint folder, or a model file, also of timm, transformers, torchvision or the
    original MAE code; of a fine-tuning run that measured its accuracy, the best model is taken."""
    to: tuple[str, ...] = ("timm",)
    """Libraries or formats: timm, transformers, transformers_code (any classifier), vit_mae (with the decoder),
    torchvision, onnx (of normalised images), onnx_uint8 (of pixels), torch_export, safetensors, mae (the published
    layout); all: those that can hold the model."""
    out: Path | None = None
    """New folder to write to; with several targets, of one folder for each. None: export-TARGET beside the
    model, of a checkpoint export-TARGET-STEP in the run folder, and here of a model of the hub."""


def run(settings: ExportSettings) -> list[Exported]:
    """Export, load back and compare; under a launcher, the first process does it all."""
    if not is_rank_zero():
        return []
    check_name("source", settings.source)
    if settings.out is not None:
        check_name("out", settings.out)
    model = read_trained_model(settings.source, settings.normalization, settings.heads)
    if model.stored is not None and not model.stored.is_ours:
        say(f"model {model.path}{model.stored.summary}")
    return export_model(model, settings.to, settings.out, partial(say, is_result=True))


def main(argv: Sequence[str] | None = None) -> None:
    """Run `mae export`."""
    with one_line_errors():
        run(parse(ExportSettings, sys.argv[1:] if argv is None else argv, prog="mae export"))


if __name__ == "__main__":
    main()
