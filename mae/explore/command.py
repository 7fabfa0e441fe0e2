"""`mae explore`: look at a run by hand, in the browser.

mae explore runs/first photos
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from tyro.conf import Positional

from mae.errors import UserError, one_line_errors
from mae.explore.address import Address
from mae.explore.models import RunModels
from mae.explore.picture_set import PictureSet
from mae.explore.stops import stops_of
from mae.inference.settings import ReadSettings
from mae.inference.sources import open_images
from mae.output import say
from mae.settings import check, parse


@dataclass(frozen=True)
class ExploreSettings(ReadSettings):
    """Look at a run by hand, in the browser: reconstructions, attention, features, neighbours, classes.

    The page is served to this machine only, sends nothing elsewhere, and ends with Ctrl-C.
    """

    EXAMPLE: ClassVar = "mae explore runs/first photos"
    FIRST: ClassVar = ("most", "port", "host")

    run: Positional[Path]
    """Folder of a run, finished or not; or any model that mae embed takes."""
    source: Positional[tuple[str, ...]] = ()
    """Images to choose from, and to seek nearest neighbours among: image files, globs, folders or tar shards. None:
    pictures are uploaded in the page."""
    most: int = 300
    """Most images of the set among which neighbours are sought, spread evenly. On a CPU, large models need minutes for
    some hundreds, anew for each checkpoint that is looked at."""
    port: int | None = None
    """Port of the page; None: the first free one from 7860 on."""
    host: str = "127.0.0.1"
    """Address to serve the page at. Any but 127.0.0.1 lets others use it, without a password."""
    most_megabytes: float = 20.0
    """Greatest size of an uploaded picture [MB]."""

    def __post_init__(self) -> None:
        check(self.workers >= 0, "workers", self.workers, "0 or more")
        check(self.most >= 1, "most", self.most, "1 or more")
        check(self.port is None or 1 <= self.port <= 65535, "port", self.port, "1 to 65535")
        # Gradio cannot serve others.
        check(":" not in self.host, "host", self.host, "a name, or an IPv4 address such as 127.0.0.1")
        check(0 < self.most_megabytes <= 2000, "most_megabytes", self.most_megabytes, "above 0, up to 2000")

    @property
    def address(self) -> Address:
        """Where to serve the page."""
        return Address(self.host, self.port)


def run(settings: ExploreSettings) -> None:
    """Open models and images, and serve the page until the program is told to stop.

    Raises:
        UserError: if Gradio is not installed, no model can be read, the set has no images, or the port is taken.
    """
    if find_spec("gradio") is None:
        raise UserError("mae explore needs Gradio: pip install 'mae-pretraining[explore]'")
    models = RunModels(stops_of(settings.run), settings.normalization, settings.heads)
    pictures = None
    if settings.source:
        images = open_images(settings.source, settings.as_seen_by(models.description), say)
        pictures = PictureSet(images, models.description, settings.most, settings.workers)
    if not settings.address.is_local:
        say(f"warning: whoever reaches {settings.host} can use the page, without a password")
    serving = import_module("mae.explore.serving")  # it needs Gradio
    title = settings.run.name or str(settings.run)
    serving.serve(models, pictures, title, settings.address, int(settings.most_megabytes * 1e6))


def main(argv: Sequence[str] | None = None) -> None:
    """Run `mae explore`."""
    with one_line_errors():
        run(parse(ExploreSettings, sys.argv[1:] if argv is None else argv, prog="mae explore"))
