"""Results over several seeds, for tables."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """Accuracies of one encoder with one amount of labels, one per seed."""

    encoder: str
    labels: str
    accuracies: tuple[float, ...]

    def __str__(self) -> str:
        mean = statistics.mean(self.accuracies)
        spread = statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0
        return f"{mean:.1%} ± {100 * spread:.1f}"


def table_of(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a table: one row per encoder, one column per amount of labels."""
    columns = list(dict.fromkeys(cell.labels for cell in cells))
    encoders = list(dict.fromkeys(cell.encoder for cell in cells))
    rows = [[encoder, *(str(cell) for cell in cells if cell.encoder == encoder)] for encoder in encoders]
    return ["encoder", *columns], rows
