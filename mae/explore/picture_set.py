"""The set that samples come from, and among which nearest neighbours are sought."""

from typing import NamedTuple

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from mae.data.spread import spread_evenly
from mae.errors import UserError
from mae.explore.models import RunModels
from mae.inference.image_set import ImageSet
from mae.inference.model import BATCH
from mae.inference.parts import compute_parts
from mae.models.description import ModelDescription
from mae.models.readout import select
from mae.output import counted, say


class Picture(NamedTuple):
    """One picture, as it came."""

    name: str
    data: bytes
    label: str = ""
    """Name of its class; empty if it has none, or it is not known."""


class Neighbour(NamedTuple):
    """Image of the set that is similar to a picture."""

    name: str
    label: str
    similarity: float
    view: UInt8[Tensor, "channels height width"]


class PictureSet:
    """Images of a set, of which some are decoded, to seek neighbours among them."""

    def __init__(self, images: ImageSet, description: ModelDescription, most: int, workers: int) -> None:
        """Decode at most `most` images, spread evenly over the set, by `workers` processes."""
        self._images = images
        chosen = [int(number) for number in spread_evenly(len(images), most)]
        parts = [range(number, number + 1) for number in chosen]
        found = list(compute_parts(images, parts, description, lambda views: views, workers))
        if bad := [reason for part in found for reason in part.reasons.values()]:
            count = counted(len(bad), "image")
            say(f"warning: left out of the neighbours: {count} that cannot be used; the first: {bad[0]}")
        self._numbers = [part.numbers.start for part in found if not part.reasons]
        self._views = torch.cat([part.results for part in found if not part.reasons] or [torch.zeros(0)])
        self._features = dict[str, Tensor]()

    def __len__(self) -> int:
        return len(self._images)

    @property
    def searched(self) -> int:
        """Number of images among which neighbours are sought."""
        return len(self._numbers)

    def picture(self, number: int) -> Picture:
        """Return an image of the set.

        Raises:
            UserError: if there is no such image, or it cannot be read.
        """
        if not 0 <= number < len(self):
            raise UserError(f"there is no image {number + 1}; allowed: 1 to {len(self):,}")
        return Picture(self._images.name(number), self._images.read(number), self._label(number))

    def nearest(self, models: RunModels, stop: int, picture: Picture, count: int) -> list[Neighbour]:
        """Return the images whose features are most similar to those of a picture, by their cosine.

        The features are the cls token and the mean of the patches, before the last norm. The picture itself is left
        out, if it is of the set.

        Raises:
            UserError: if the set has no image that can be used, or the model cannot be read.
            BadImageError: if the picture cannot be used.
        """
        if not self._numbers:
            raise UserError("no image of the set can be used")
        with models.use(stop) as model:
            own, sha256 = select(model.features_of(model.view(picture.data)[None]), "cls+avg", "raw"), model.sha256
        similar = torch.nn.functional.cosine_similarity(own, self._features_at(models, stop, sha256))
        found = list[Neighbour]()
        for at in similar.argsort(descending=True, stable=True).tolist():
            number = self._numbers[at]
            name = self._images.name(number)
            if len(found) < count and name != picture.name:
                found.append(Neighbour(name, self._label(number), float(similar[at]), self._views[at]))
        return found

    def _label(self, number: int) -> str:
        label = self._images.label(number)
        return "" if label is None else self._images.class_name(label) or str(label)

    def _features_at(self, models: RunModels, stop: int, sha256: str) -> Float32[Tensor, "images feature"]:
        """Return the features of all images that are searched; other threads may use models between the batches.

        `sha256` is the hash of the model: a run that goes on may write another one into the same file.
        """
        if sha256 not in self._features:
            batches = []
            for views in torch.split(self._views, BATCH):
                with models.use(stop) as model:
                    if model.sha256 != sha256:
                        raise UserError(f"{model.path} was written anew meanwhile; try again")
                    batches.append(select(model.features_of(views), "cls+avg", "raw"))
            self._features[sha256] = torch.cat(batches)
        return self._features[sha256]
