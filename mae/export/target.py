"""Target of an export: how a model is written for another library, loaded back by it, and compared."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

from packaging.requirements import Requirement
from torch import Tensor

from mae.errors import UserError
from mae.export.trained_model import TrainedModel
from mae.versions import installed


@dataclass(frozen=True)
class Difference:
    """Difference between one output of an export and the same output of the model."""

    output: str
    """Name of the output, such as `features` or `logits of 5 images`."""
    greatest: float
    """Greatest absolute difference of a value; infinite if the outputs have different shapes."""
    scale: float
    """Greatest absolute value of the model's output."""

    def is_within(self, tolerance: float) -> bool:
        """Return whether the difference is at most `tolerance` times the greatest value."""
        return self.greatest <= tolerance * self.scale


def compare(output: str, ours: Tensor, theirs: Tensor) -> Difference:
    """Compare an output of the model with the same output of its export."""
    same_shape = ours.shape == theirs.shape
    greatest = float((ours.double() - theirs.double()).abs().max()) if same_shape else float("inf")
    return Difference(output, greatest, float(ours.abs().max()))


class Target(ABC):
    """Kind of export: one file of this package derives one class, and `mae/export/targets.py` lists it."""

    name: ClassVar[str]
    """Name on the command line."""
    library: ClassVar[str]
    """Library that loads the export, as people call it."""
    tolerance: ClassVar[float]
    """Greatest difference of an output that is allowed, as a share of the greatest absolute value of that output."""
    inputs: ClassVar[str] = "random normal images, seed 0"
    """Images that the outputs are compared on, in words."""
    requires: ClassVar[tuple[str, ...]] = ()
    """Packages beside those of every installation, with their versions: `onnx>=1.17`."""
    hub_library: ClassVar[str | None] = None
    """`library_name` of the model card, if the Hugging Face hub knows the library."""
    takes_pixels: ClassVar[bool] = False
    """Whether the export takes pixels from 0 to 255, and normalises them itself."""
    extra: ClassVar[str] = "export"
    """Extra of this project that installs them."""

    def refusal(self, model: TrainedModel) -> str | None:
        """Return why this target cannot hold the model, and the remedy; None if it can."""
        return None

    def keeps_head(self, model: TrainedModel) -> bool:
        """Return whether the export holds the head of a classifier like this model."""
        return True

    def left_behind(self, model: TrainedModel) -> Sequence[str]:
        """Return the names of the model's tensors that the export does not hold: its decoder, and perhaps its head."""
        return [*model.decoder_names, *([] if self.keeps_head(model) else model.head_names)]

    def kept(self, model: TrainedModel) -> dict[str, Tensor]:
        """Return the model's tensors that the export holds, by our names."""
        left = self.left_behind(model)
        return {name: tensor for name, tensor in model.weights.items() if name not in left}

    @abstractmethod
    def write(self, model: TrainedModel, folder: Path) -> None:
        """Write the files of the export into an empty folder."""

    @abstractmethod
    def compare(self, model: TrainedModel, folder: Path) -> Iterable[Difference]:
        """Load the folder back by the target's own library, and compare its outputs with the model's."""

    @abstractmethod
    def example(self, model: TrainedModel, folder: str) -> str:
        """Return Python lines that load the folder, and run it on the normalised images `images`."""

    def require_packages(self) -> None:
        """Raise a `UserError` unless the packages are installed in versions that are known to work."""
        missing = [requirement for requirement in map(Requirement, self.requires) if not _is_installed(requirement)]
        if missing:
            found = ", ".join(f"{each.name} {installed(each.name) or 'is missing'}" for each in missing)
            wanted = ", ".join(map(str, missing))
            raise UserError(
                f"export to {self.name} needs {wanted}; {found}: pip install 'mae-pretraining[{self.extra}]'"
            )

    def versions(self) -> dict[str, str]:
        """Return the versions of the packages that this target needs beside those of every installation."""
        return {name: version(name) for name in (Requirement(each).name for each in self.requires)}


def _is_installed(requirement: Requirement) -> bool:
    found = installed(requirement.name)
    return found is not None and requirement.specifier.contains(found, prereleases=True)
