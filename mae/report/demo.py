"""Page of the demo: description, table of accuracies, pictures, plots and times."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mae.evaluation.few_labels import FROZEN, PROBED_PIXELS, SEPARATED_PIXELS, UNTRAINED
from mae.evaluation.seeds import Cell, table_of
from mae.progress import duration
from mae.report import page
from mae.report.findings import findings
from mae.report.inspection import inspect
from mae.report.reading import read_run
from mae.report.run import findings_list, run_sections
from mae.run_files import SETTINGS_FILE
from mae.settings import flatten
from mae.training.run_folder.folder import RunFolder
from mae.yaml_files import load_yaml

ROWS: Mapping[str, str] = {
    "fine-tuned: pretrained": "the pretrained encoder and a head, all of it trained with the labels",
    "fine-tuned: from scratch": "the same model, trained in the same way, but from random weights",
    FROZEN: "the pretrained encoder as it is; logistic regression tells the classes apart by its features",
    UNTRAINED: "the same with the features of an encoder with random weights: what its shape alone gives",
    PROBED_PIXELS: "the same with the pixels in place of features: no encoder at all",
    SEPARATED_PIXELS: "the pixels again, with a stronger classifier: a support vector machine (RBF kernel, C = 10)",
}
"""What each row of the table of accuracies is."""


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
    seeds, cpu = len(cells[0].accuracies), torch.device("cpu")
    run, tuned = (read_run(folder.path, is_running=False) for folder in (pretrained, finetuned))
    inspection, classes = inspect(run, cpu), dict(inspect(tuned, cpu).sections).get("Classes", "")
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
                "seeds; a seed chooses the labels and the random weights. All rows of a column have the same labels."
            )
            + page.table(header, rows)
            + page.table(("row", "what it is"), tuple(ROWS.items()))
            + page.paragraph("Such small images need no encoder: judge pretraining by the rows that have one.")
            + page.table(("labels", "encoder", *(f"seed {number}" for number in range(seeds))), every),
        ),
        ("What this page sees of the pretraining", findings_list(findings(run, inspection.neighbours))),
        *run_sections(run),
        *inspection.sections,
        (f"Classes, fine-tuned with {cells[0].labels}", classes),
        ("Time", page.table(("stage", "time"), [(stage, duration(passed)) for stage, passed in seconds.items()])),
        ("Pretraining settings", page.settings_table(_settings_of(pretrained.path))),
        ("Fine-tuning settings, first run", page.settings_table(_settings_of(finetuned.path))),
        ("Environment", page.environment_table(cpu)),
    ]
    return page.page("mae demo: scanned digits", sections)


def _settings_of(run_dir: Path) -> dict[str, Any]:
    return flatten(load_yaml(run_dir / SETTINGS_FILE))
