"""Export to Hugging Face transformers: a folder that `AutoModel` and `AutoModelForImageClassification` load.

The folder holds a `ViTModel`, or a `ViTForImageClassification` if the head is one linear layer on the cls token.
`preprocessor_config.json` prepares images as our evaluation does, except that transformers rounds the place of an odd
crop down, so that it may be one pixel further up or left. `pipeline("image-classification")` converts every image to
RGB: a model of other channels is for images that you prepare by `AutoImageProcessor`.
"""

from collections.abc import Iterable
from pathlib import Path

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
from mae.formats.transformers_vit import to_transformers


class Transformers(TransformersTarget):
    """ViT of transformers: the encoder, with the head of a classifier if that is one linear layer on the cls token."""

    name = "transformers"
    library = "transformers"

    def refusal(self, model: TrainedModel) -> str | None:
        """Refuse a model that does not norm its tokens one by one, and images of more than 8 bits."""
        if model.description.pool == "avg":
            return (
                "it norms the mean of the tokens (pool: avg), transformers' ViT norms each token; export it to "
                "transformers_code or timm, or fine-tune with pool: cls"
            )
        return range_refusal(model.description)

    def keeps_head(self, model: TrainedModel) -> bool:
        """Return whether the head is one linear layer on the cls token."""
        return model.head == "linear" and model.description.pool == "cls"

    def write(self, model: TrainedModel, folder: Path) -> None:
        """Write weights, config and image processor."""
        kept, config = self.kept(model), {"model_type": "vit"} | vit_config(model.description)
        if self.keeps_head(model):
            config = {"architectures": ["ViTForImageClassification"]} | config | labels(model.classes)
            weights = to_transformers(kept, "ViTForImageClassification")
        else:
            # A pooler that changes nothing: without one in the file, transformers adds one with random weights.
            width = model.description.width
            pooler = {"pooler.dense.weight": torch.eye(width), "pooler.dense.bias": torch.zeros(width)}
            config = {"architectures": ["ViTModel"]} | config | {"pooler_act": "linear"}
            weights = to_transformers(kept, "ViTModel") | pooler
        write_folder(folder, weights, config, model.description)

    def compare(self, model: TrainedModel, folder: Path) -> Iterable[Difference]:
        """Compare all tokens, the logits of a classifier or the cls token of an encoder, and a prepared image."""
        from transformers import AutoModel, AutoModelForImageClassification  # noqa: PLC0415 (an extra)

        images = model.images()
        tokens = model.tokens(images)
        with torch.no_grad():
            if self.keeps_head(model):
                theirs = load(AutoModelForImageClassification, folder)
                yield compare("tokens", tokens, theirs.vit(images).last_hidden_state)
                yield compare("logits", model.logits(images), theirs(images).logits)
            else:
                output = load(AutoModel, folder)(images)
                yield compare("tokens", tokens, output.last_hidden_state)
                yield compare("features", tokens[:, 0], output.pooler_output)
        yield compare_prepared(model, folder)

    def example(self, model: TrainedModel, folder: str) -> str:
        """Return the lines of transformers."""
        kind, output, field = (
            ("AutoModelForImageClassification", "logits", "logits")
            if self.keeps_head(model)
            else ("AutoModel", "features", "pooler_output")
        )
        return (
            f"from transformers import {kind}\n"
            f'model = {kind}.from_pretrained("{folder}").eval()\n'
            f"{output} = model(images).{field}"
        )
