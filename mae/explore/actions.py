"""What the page shows for the values of its controls, in which models, images and blocks count from 1."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from mae.errors import BadImageError, UserError, user_error_of
from mae.explore import looking
from mae.explore.models import RunModels
from mae.explore.picture_set import Picture, PictureSet
from mae.inference.model import Model

Number = int | float
"""What a slider gives."""
_NEAREST = 12


class Actions:
    """A run and a set of images, if there is one. A mistake becomes a sentence in place of the pictures."""

    def __init__(self, models: RunModels, pictures: PictureSet | None) -> None:
        self.models, self.pictures = models, pictures

    def looked_at(self, look: Callable[..., str]) -> Callable[..., str]:
        """Return a function of a picture, a stop and other values that shows what `look` makes of the model there."""

        def work(picture: Picture, stop: Number, *values: Any) -> str:
            with self.models.use(int(stop) - 1) as model:
                return look(model, picture, *values)

        return _said(work)

    def reconstruction(self) -> Callable[..., str]:
        """Return a function of picture, stop, kind of mask, percentage, seed and marks."""

        def look(model: Model, picture: Picture, kind: Any, percent: Number, seed: Number, marks: str) -> str:
            return looking.reconstruction(model, picture, kind, percent / 100, int(seed), marks)

        return self.looked_at(look)

    def neighbours(self) -> Callable[..., str]:
        """Return a function of picture and stop."""

        def work(picture: Picture, stop: Number) -> str:
            if self.pictures is None:
                raise UserError("there is no set to search; start with images: mae explore RUN IMAGES")
            found = self.pictures.nearest(self.models, int(stop) - 1, picture, _NEAREST)
            return looking.neighbours(picture, found, self.pictures.searched, len(self.pictures))

        return _said(work)

    def stop(self, stop: Number) -> str:
        """Return the name of a model."""
        return looking.note(self.models.stops[int(stop) - 1].name)

    def choose(self, uploaded: bytes | None, number: Number) -> tuple[Picture | None, str]:
        """Return the uploaded picture, or without one that of the set, and its name or why there is none."""
        try:
            if uploaded is not None:
                picture = Picture("your picture", uploaded)
            elif self.pictures is not None:
                picture = self.pictures.picture(int(number) - 1)
            else:
                raise UserError("choose a picture of your own, or start with images: mae explore RUN IMAGES")
        except UserError as error:
            return None, looking.notice(str(error))
        return picture, looking.note(f"{picture.name}, class {picture.label}" if picture.label else picture.name)

    def canvas(self, picture: Picture | None) -> str:
        """Return the URL of the picture to paint on; "" for one that cannot be used, as the other parts say."""
        with suppress(BadImageError, UserError), self.models.use(self.models.last) as model:
            return "" if picture is None else looking.canvas(model, picture)
        return ""


def _said(work: Callable[..., str]) -> Callable[..., str]:
    """Return `work` so that it shows nothing without a picture, and says in a sentence what cannot be used."""

    def run(picture: Picture | None, *values: Any) -> str:
        try:
            return "" if picture is None else work(picture, *values)
        except BadImageError as error:
            return looking.notice(f"The picture cannot be used: {error}")
        except Exception as error:
            mistake = user_error_of(error)
            if mistake is None:
                raise
            return looking.notice(str(mistake))

    return run
