import math
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mae.models.classifier import HeadKind, build_classifier, build_head
from mae.models.encoder import build_encoder
from mae.models.settings import EncoderSettings
from mae.models.weights import load_encoder

TINY = EncoderSettings(width=16, depth=2, heads=2, patch_size=(4,))
HEADS: list[HeadKind] = ["mlp", "linear"]


def tiny_classifier(head: HeadKind, drop_path: float = 0.0) -> VisionTransformer:
    torch.manual_seed(0)
    return build_classifier(TINY, (8, 12), 3, 5, head, drop_path)


def images() -> torch.Tensor:
    return torch.randn(4, 3, 8, 12, generator=torch.Generator().manual_seed(1))


def test_the_linear_head_is_one_layer() -> None:
    head = build_head("linear", 16, 5)
    assert {name: tuple(p.shape) for name, p in head.named_parameters()} == {"weight": (5, 16), "bias": (5,)}


def test_the_mlp_head_has_one_hidden_layer_of_the_encoders_width() -> None:
    head = build_head("mlp", 16, 5)
    assert {name: tuple(p.shape) for name, p in head.named_parameters()} == {
        "fc1.weight": (16, 16),
        "fc1.bias": (16,),
        "fc2.weight": (5, 16),
        "fc2.bias": (5,),
    }
    x = torch.randn(3, 16)
    expected = nn.functional.gelu(x @ head.fc1.weight.T + head.fc1.bias) @ head.fc2.weight.T + head.fc2.bias
    torch.testing.assert_close(head(x), expected)


@pytest.mark.parametrize("head", HEADS)
def test_a_head_starts_undecided(head: HeadKind) -> None:
    classifier = tiny_classifier(head)
    last = classifier.head.fc2 if head == "mlp" else classifier.head
    assert 0 < last.weight.abs().max() < 1e-3
    assert not last.bias.any()
    loss = nn.functional.cross_entropy(classifier(images()), torch.tensor([0, 1, 2, 4]))
    assert loss.item() == pytest.approx(math.log(5), abs=1e-3)


def test_the_hidden_layer_of_the_mlp_is_initialised_as_the_encoders_layers() -> None:
    torch.manual_seed(0)
    hidden = build_head("mlp", 64, 5).fc1
    bound = math.sqrt(6 / (64 + 64))
    assert 0.95 * bound < hidden.weight.abs().max() <= bound
    assert not hidden.bias.any()


@pytest.mark.parametrize("head", HEADS)
def test_logits_are_the_head_of_the_encoders_normed_cls_token(head: HeadKind) -> None:
    classifier = tiny_classifier(head)
    encoder = build_encoder(TINY, (8, 12), 3)
    load_encoder(encoder, classifier.state_dict(), Path("memory"))
    features = encoder(images())
    assert classifier(images()).shape == (4, 5)
    torch.testing.assert_close(classifier(images()), classifier.head(features))
    before_the_head = classifier.forward_head(classifier.forward_features(images()), pre_logits=True)
    torch.testing.assert_close(before_the_head, features)


@pytest.mark.parametrize("head", HEADS)
def test_everything_learns_the_positions_too(head: HeadKind) -> None:
    classifier = tiny_classifier(head)
    # A head of almost zero weights passes almost no gradient down.
    nn.init.normal_(classifier.head.fc2.weight if head == "mlp" else classifier.head.weight)
    nn.functional.cross_entropy(classifier(images()), torch.tensor([0, 1, 2, 4])).backward()
    assert [name for name, p in classifier.named_parameters() if not p.grad.any()] == []
    assert classifier.pos_embed.grad.abs().amax(dim=2).min() > 0


def test_drop_path_reaches_the_last_block_and_timm_knows_the_classes() -> None:
    classifier = tiny_classifier("linear", drop_path=0.3)
    assert classifier.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    assert classifier.num_classes == 5
