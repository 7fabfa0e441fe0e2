"""Exports to torchvision's ViT."""

from pathlib import Path

import pytest
import torch
from torchvision.models import VisionTransformer

from export.models import RECTANGLE, SQUARE, autoencoder, classifier, export
from mae.errors import UserError
from mae.export.trained_model import TrainedModel


@pytest.mark.parametrize(
    ("model", "left"),
    [
        pytest.param(autoencoder(SQUARE, (8, 8), 3), "decoder_embed.weight", id="autoencoder"),
        pytest.param(classifier("linear"), None, id="linear"),
        pytest.param(classifier("mlp"), "head.fc1.weight", id="mlp"),
        pytest.param(classifier("linear", "cls+avg"), "head.weight", id="both-tokens"),
    ],
)
def test_the_encoder_goes_with_a_plain_head_and_the_rest_is_named(
    model: TrainedModel, left: str | None, tmp_path: Path
) -> None:
    exported = export(model, "torchvision", tmp_path / "out")
    assert exported.greatest_difference < 1e-5
    assert (left in exported.left_behind) if left else exported.left_behind == []


def test_the_file_loads_strictly_into_torchvisions_own_builder_of_this_shape(tmp_path: Path) -> None:
    model = classifier("linear")
    export(model, "torchvision", tmp_path / "out")
    theirs = VisionTransformer(8, 4, 2, 2, 16, 64, num_classes=3)
    theirs.load_state_dict(torch.load(tmp_path / "out" / "model.pth", weights_only=True), strict=True)
    images = model.images(2)
    torch.testing.assert_close(theirs.eval()(images), model.logits(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (autoencoder(RECTANGLE, (8, 12), 3), r"its image_size is 8x12, torchvision's ViT takes squares"),
        (autoencoder(RECTANGLE, (8, 8), 3), r"its patch_size is 2x4, torchvision's ViT takes squares"),
        (autoencoder(SQUARE, (8, 8), 1), r"its images have 1 channels, torchvision's ViT takes 3"),
        (classifier("linear", "avg"), r"it pools by avg, torchvision's ViT reads the cls token"),
    ],
)
def test_what_it_cannot_hold_is_refused(model: TrainedModel, why: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"torchvision cannot hold .*: {why}; use timm or onnx"):
        export(model, "torchvision", tmp_path / "out")
    assert not (tmp_path / "out").exists()
