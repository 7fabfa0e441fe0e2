"""Write the features of images, with thumbnails, for maps, searches and other programs.

mae embed runs/pre photos --out features.parquet
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mae.inference.applying import Application
from mae.inference.rows import EmbeddedRows
from mae.inference.settings import ApplySettings
from mae.models.readout import NormKind
from mae.models.vit import TokenKind
from mae.settings import check, check_name, parse
from mae.training.processes.accelerator import start_accelerator
from mae.training.processes.first_error import errors_said_once


@dataclass(frozen=True)
class EmbedSettings(ApplySettings):
    """Write the feature of each image: one row per image, in the order given.

    An image that cannot be used has a row with the reason; the exit code is then 3. A run that was killed continues
    with the same command.
    """

    EXAMPLE: ClassVar = "mae embed runs/pre photos --out features.parquet"
    FIRST: ClassVar = ("out", "tokens", "norm")

    out: Path = Path("features.parquet")
    """New file for the features; its name ends in .parquet or .npz."""
    tokens: TokenKind = "cls"
    """Tokens to read: cls, the mean of the patches (avg), or both, one after the other."""
    norm: NormKind = "normed"
    """Tokens before (raw) or after (normed) the encoder's last norm; timm gives normed; k-NN often prefers raw."""
    thumbnails: int = 96
    """Longest side of the thumbnails in a .parquet file [pixels]; 0 for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.thumbnails >= 0, "thumbnails", self.thumbnails, "0 or more")
        check(self.out.suffix in (".parquet", ".npz"), "out", self.out, "a name that ends in .parquet or .npz")
        check_name("out", self.out)


def run(settings: EmbedSettings) -> None:
    """Compute the features, and write the table."""
    application = Application.open(settings, start_accelerator("fp32"))
    thumbnail = settings.thumbnails if settings.out.suffix == ".parquet" else 0
    rows = EmbeddedRows(application.images, application.model, settings.tokens, settings.norm, thumbnail)
    application.write(rows, settings.out)


def main(argv: Sequence[str] | None = None) -> None:
    """Run `mae embed`."""
    with errors_said_once():
        run(parse(EmbedSettings, sys.argv[1:] if argv is None else argv, prog="mae embed"))


if __name__ == "__main__":
    main()
