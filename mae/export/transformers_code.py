"""Export to Hugging Face transformers with code: a folder that holds a classifier with any head.

transformers has no class for an MLP head, or for a head that reads the mean of the patch tokens. The folder brings one:
`modeling_mae.py`, which needs torch and transformers alone, and which runs only if it is allowed to by
`trust_remote_code=True`. Without that, transformers refuses the folder, whose kind of model it does not know.
"""

from collections.abc import Iterable
from pathlib import Path
from shutil import copyfile

import torch

from mae.export.target import Difference, compare
from mae.export.trained_model import TrainedModel
from mae.export.transformers_folder import (
    TransformersTarget,
    compare_prepared,
    labels,
    load,
    range_refusal,
    vit_config,
    write_folder,
)

_CODE = "modeling_mae.py"
_AUTO_MAP = {
    "AutoConfig": "modeling_mae.MaeClassifierConfig",
    "AutoModelForImageClassification": "modeling_mae.MaeClassifier",
}


class TransformersCode(TransformersTarget):
    """Whole classifier for transformers, with the code of its model."""

    name = "transformers_code"
    library = "transformers with trust_remote_code=True"

    def refusal(self, model: TrainedModel) -> str | None:
        """Refuse a model without a head, and images of more than 8 bits."""
        if model.head is None:
            return "it has no head; export its encoder to transformers"
        return range_refusal(model.description)

    def write(self, model: TrainedModel, folder: Path) -> None:
        """Write weights by their own names, config, code and image processor.

        The header describes the model too, so that this program reads the folder back.
        """
        config = {
            "model_type": "mae_classifier",
            "architectures": ["MaeClassifier"],
            "auto_map": _AUTO_MAP,
            "pool": model.description.pool,
            "head": model.head,
        }
        config = config | vit_config(model.description) | labels(model.classes)
        write_folder(folder, model.weights, config, model.description, model.description.metadata())
        copyfile(Path(__file__).with_name(_CODE), folder / _CODE)

    def compare(self, model: TrainedModel, folder: Path) -> Iterable[Difference]:
        """Compare the logits, and a prepared image."""
        from transformers import AutoModelForImageClassification  # noqa: PLC0415 (an extra, and slow to import)

        images = model.images()
        theirs = load(AutoModelForImageClassification, folder, trust_remote_code=True)
        with torch.no_grad():
            yield compare("logits", model.logits(images), theirs(images).logits)
        yield compare_prepared(model, folder)

    def example(self, model: TrainedModel, folder: str) -> str:
        """Return the lines of transformers."""
        return (
            "from transformers import AutoModelForImageClassification\n"
            f'model = AutoModelForImageClassification.from_pretrained("{folder}", trust_remote_code=True).eval()\n'
            "logits = model(images).logits"
        )
