"""Page of the demo: description, table of accuracies, pictures, plots and times."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mae.evaluation.seeds import Cell, table_of
from mae.progress import duration
from mae.report import page
from mae.report.findings import findings
from mae.report.reading import read_run
from mae.report.run import findings_list, run_sections
from mae.run_files import SETTINGS_FILE
from mae.settings import flatten
from mae.training.run_folder.folder import RunFolder
from mae.yaml_files import load_yaml


def demo_page(
    images: Mapping[str, int],
    eval_split: str,
    pretrained: RunFolder,
    finetuned: RunFolder,
    cells: Sequence[Cell],
    seconds: Mapping[str, float],
    features: Sequence[int],
) -> str:
    """Return the page.

    Args:
        images: Number of images of each split.
        finetuned: Fine-tuning run whose settings are shown.
        seconds: Time of each stage.
        features: Shape of the features of one image, from the exported encoder.
    """
    header, rows = table_of(cells)
    seeds, run = len(cells[0].accuracies), read_run(pretrained.path, is_running=False)
    every = [(cell.labels, cell.encoder, *(f"{accuracy:.1%}" for accuracy in cell.accuracies)) for cell in cells]
    sections = [
        (
            "What was done",
            page.paragraph(
                f"{images['train']:,} scanned digits of 8x8 pixels were packed into shards; a masked autoencoder "
                "was pretrained on them without labels; its encoder was fine-tuned with an MLP head on its cls "
                "token and compared with the same model from scratch, with the same settings; the encoder was exported "
                f"and loaded back by timm, where an image gives features of shape {list(features)}."
            ),
        ),
        (
            "Accuracy",
            page.paragraph(
                f"On {images[eval_split]} digits of the {eval_split} split, mean ± standard deviation of {seeds} "
                "seeds; a seed chooses the labels and the weights. The last row has the same labels and no encoder: a "
                "support vector machine with an RBF kernel (C = 10) on the pixels. Such small images need none."
            )
            + page.table(header, rows)
            + page.table(("labels", "encoder", *(f"seed {number}" for number in range(seeds))), every),
        ),
        ("What the page sees of the pretraining", findings_list(findings(run))),
        *run_sections(run),
        ("Time", page.table(("stage", "time"), [(stage, duration(passed)) for stage, passed in seconds.items()])),
        ("Pretraining settings", page.settings_table(_settings_of(pretrained.path))),
        ("Fine-tuning settings, first run", page.settings_table(_settings_of(finetuned.path))),
        ("Environment", page.environment_table(torch.device("cpu"))),
    ]
    return page.page("mae demo: scanned digits", sections)


def _settings_of(run_dir: Path) -> dict[str, Any]:
    return flatten(load_yaml(run_dir / SETTINGS_FILE))
