"""Export to ViTMAE of Hugging Face transformers: encoder and decoder, to go on with pretraining or to reconstruct.

It is no source of features: `AutoModel` makes a `ViTMAEModel` of the folder, which hides most patches of an image
whenever it runs. Export to `transformers` for features.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from mae.export.target import Difference, compare
from mae.export.trained_model import TrainedModel
from mae.export.transformers_folder import (
    TransformersTarget,
    compare_prepared,
    load,
    range_refusal,
    vit_config,
    write_folder,
)
from mae.formats.transformers_vit import to_transformers
from mae.models.autoencoder import MaskedAutoencoder
from mae.models.description import DecoderDescription, ModelDescription

_REMEDY = "export its encoder to transformers"


class TransformersMae(TransformersTarget):
    """ViTMAE of transformers: encoder and decoder."""

    name = "vit_mae"
    library = "transformers (ViTMAEForPreTraining)"

    def refusal(self, model: TrainedModel) -> str | None:
        """Refuse what is not the published autoencoder of square images."""
        description, decoder = model.description, model.description.decoder
        if decoder is None or not model.decoder_names:
            return "it has no decoder; export the run of its pretraining, or its encoder to transformers"
        if decoder.kind != "self":
            return f"its decoder is {decoder.kind}, that of ViTMAE is self; {_REMEDY}"
        if decoder.mask != "random":
            return f"its mask is {decoder.mask}, that of ViTMAE is random; {_REMEDY}"
        if not (_is_square(description.image_size) and _is_square(description.patch_size)):
            return f"its images or patches are not square, as ViTMAE needs them; {_REMEDY}"
        return range_refusal(description)

    def left_behind(self, model: TrainedModel) -> Sequence[str]:
        """Return nothing."""
        return []

    def write(self, model: TrainedModel, folder: Path) -> None:
        """Write weights, config and image processor."""
        assert model.description.decoder is not None
        weights = to_transformers(model.weights, "ViTMAEForPreTraining")
        write_folder(folder, weights, _config(model.description, model.description.decoder), model.description)

    def compare(self, model: TrainedModel, folder: Path) -> Iterable[Difference]:
        """Compare the mask, the predicted pixels and the loss that follow from the same noise."""
        from transformers import AutoModelForPreTraining  # noqa: PLC0415 (an extra, and slow to import)

        images, ours = model.images(), model.network
        assert isinstance(ours, MaskedAutoencoder)
        noise = torch.rand(len(images), ours.patches, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            theirs = load(AutoModelForPreTraining, folder)(images, noise=noise)
            yield compare("mask", ours.mask(noise).hidden().float(), theirs.mask)
            yield compare("predicted pixels", ours.predict_all(images, noise), theirs.logits)
            yield compare("loss", ours(images, noise).loss, theirs.loss)
        yield compare_prepared(model, folder)

    def example(self, model: TrainedModel, folder: str) -> str:
        """Return the lines of transformers."""
        return (
            "from transformers import AutoModelForPreTraining  # AutoModel hides most patches: no features\n"
            f'model = AutoModelForPreTraining.from_pretrained("{folder}").eval()\n'
            "predicted_pixels = model(images).logits"
        )


def _config(description: ModelDescription, decoder: DecoderDescription) -> dict[str, Any]:
    return {
        "model_type": "vit_mae",
        "architectures": ["ViTMAEForPreTraining"],
        "decoder_hidden_size": decoder.width,
        "decoder_num_hidden_layers": decoder.depth,
        "decoder_num_attention_heads": decoder.heads,
        "decoder_intermediate_size": 4 * decoder.width,
        "mask_ratio": decoder.mask_ratio,
        "norm_pix_loss": decoder.norm_pix_loss,
    } | vit_config(description)


def _is_square(size: tuple[int, int]) -> bool:
    return size[0] == size[1]
