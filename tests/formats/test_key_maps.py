"""Names of other libraries: there and back, and their own modules take what is written."""

from collections.abc import Callable, Mapping

import pytest
import torch
import torchvision
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification, ViTMAEConfig, ViTMAEForPreTraining, ViTModel

from mae.formats.key_map import Renamed, without_place
from mae.formats.published import KEY_MAP as PUBLISHED
from mae.formats.published import from_published, to_published
from mae.formats.torchvision_vit import from_torchvision, to_torchvision
from mae.formats.transformers_vit import KEY_MAPS, from_transformers, to_transformers
from mae.models.autoencoder import MaskedAutoencoder
from mae.models.classifier import build_classifier
from mae.models.settings import MaskedAutoencoderSettings
from mae.models.weights import encoder_part, file_tensors

SETTINGS = MaskedAutoencoderSettings(
    width=16, depth=2, heads=2, patch_size=(4,), decoder_width=12, decoder_depth=1, decoder_heads=3
)
AUTOENCODER = file_tensors(MaskedAutoencoder(SETTINGS, (16, 16), 3))
CLASSIFIER = file_tensors(build_classifier(SETTINGS, (16, 16), 3, 5, "linear"))
ENCODER = encoder_part(AUTOENCODER)
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
}
VIT_MAE = ViTMAEConfig(
    **VIT,
    decoder_hidden_size=12,
    decoder_num_hidden_layers=1,
    decoder_num_attention_heads=3,
    decoder_intermediate_size=48,
)


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("weights", "there", "back"),
    [
        (ENCODER, dict, from_published),
        (CLASSIFIER, dict, from_published),
        (AUTOENCODER, lambda weights: to_published(weights)["model"], from_published),
        (ENCODER, to_torchvision, from_torchvision),
        (CLASSIFIER, to_torchvision, from_torchvision),
        (ENCODER, lambda weights: to_transformers(weights, "ViTModel"), from_transformers),
        (CLASSIFIER, lambda weights: to_transformers(weights, "ViTForImageClassification"), from_transformers),
        (AUTOENCODER, lambda weights: to_transformers(weights, "ViTMAEForPreTraining"), from_transformers),
    ],
)
def test_names_go_there_and_back(
    weights: dict[str, Tensor],
    there: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
    back: Callable[[Mapping[str, Tensor]], Renamed],
) -> None:
    theirs = there(weights)
    found = back(theirs)
    assert_equal(found.weights, weights)
    assert found.names.keys() == theirs.keys()


def test_timm_and_torchvision_have_these_names() -> None:
    vit = VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=5)
    vit.load_state_dict(CLASSIFIER)
    other = torchvision.models.VisionTransformer(16, 4, 2, 2, 16, 64, num_classes=5)
    other.load_state_dict(to_torchvision(CLASSIFIER))
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(other.eval()(images), vit.eval()(images))


def test_modules_of_transformers_are_read_by_the_names_of_version_5_too() -> None:
    for model in (ViTForImageClassification(ViTConfig(**VIT)), ViTMAEForPreTraining(VIT_MAE)):
        weights = model.state_dict()
        found = from_transformers(weights)
        assert found.names.keys() == weights.keys()
        assert found.weights.keys() - {"head.weight", "head.bias"} <= AUTOENCODER.keys()
    pooled = ViTModel(ViTConfig(**VIT)).state_dict()
    assert pooled.keys() - from_transformers(pooled).names.keys() == {"pooler.dense.weight", "pooler.dense.bias"}


def test_old_names_of_torchvision_are_read() -> None:
    names = {"mlp.0": "mlp.linear_1", "mlp.3": "mlp.linear_2"}
    old = to_torchvision(ENCODER)
    for new_name, old_name in names.items():
        old = {name.replace(new_name, old_name): tensor for name, tensor in old.items()}
    assert_equal(from_torchvision(old).weights, ENCODER)


def test_what_has_no_place_is_named() -> None:
    mlp = file_tensors(build_classifier(SETTINGS, (16, 16), 3, 5, "mlp"))
    left = ["head.fc1.weight", "head.fc1.bias", "head.fc2.weight", "head.fc2.bias"]
    assert without_place(mlp, KEY_MAPS["ViTForImageClassification"]) == left
    assert without_place(mlp, PUBLISHED) == left
    assert_equal(from_transformers(to_transformers(mlp, "ViTForImageClassification")).weights, encoder_part(mlp))


def test_a_tensor_without_all_its_parts_is_left_out() -> None:
    theirs = to_transformers(ENCODER, "ViTModel")
    del theirs["encoder.layer.1.attention.attention.key.bias"]
    found = from_transformers(theirs)
    assert ENCODER.keys() - found.weights.keys() == {"blocks.1.attn.qkv.bias"}
    assert "encoder.layer.1.attention.attention.query.bias" not in found.names
