import math
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mae.errors import UserError
from mae.models.classifier import HeadKind, build_classifier, build_head
from mae.models.encoder import build_encoder
from mae.models.freezing import freeze, frozen_blocks
from mae.models.readout import encode_all
from mae.models.settings import EncoderSettings
from mae.models.vit import TokenKind
from mae.models.weights import load_encoder

TINY = EncoderSettings(width=16, depth=2, heads=2, patch_size=(4,))
HEADS: list[HeadKind] = ["mlp", "linear"]


def tiny_classifier(head: HeadKind, drop_path: float = 0.0, pool: TokenKind = "cls") -> VisionTransformer:
    torch.manual_seed(0)
    return build_classifier(TINY, (8, 12), 3, 5, head, drop_path, pool)


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


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("pool", ["cls", "avg", "cls+avg"])
def test_the_head_sees_the_tokens_of_the_pool(head: HeadKind, pool: TokenKind) -> None:
    classifier = tiny_classifier(head, pool=pool)
    nn.init.normal_(classifier.head.fc2.weight if head == "mlp" else classifier.head.weight)
    raw = encode_all(classifier, images())
    norm = classifier.fc_norm if pool == "avg" else classifier.norm
    assert isinstance(norm, nn.LayerNorm)
    assert norm.eps == 1e-6
    nn.init.normal_(norm.weight)
    normed = norm(raw)
    features = {
        "cls": normed[:, 0],
        "avg": norm(raw[:, 1:].mean(dim=1)),
        "cls+avg": torch.cat([normed[:, 0], normed[:, 1:].mean(dim=1)], dim=1),
    }[pool]
    torch.testing.assert_close(classifier(images()), classifier.head(features))


def test_averaging_is_that_of_timm() -> None:
    ours = tiny_classifier("linear", pool="avg").eval()
    theirs = VisionTransformer(
        img_size=(8, 12), patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=5, global_pool="avg"
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(images()), theirs(images()))


def test_the_norm_of_the_mean_is_new_and_that_of_each_token_is_left_out() -> None:
    encoder = build_encoder(TINY, (8, 12), 3)
    nn.init.normal_(encoder.norm.weight)
    classifier = tiny_classifier("linear", pool="avg")
    load_encoder(classifier, encoder.state_dict(), Path("memory"))
    assert torch.equal(classifier.fc_norm.weight, torch.ones(16))
    assert torch.equal(classifier.blocks[1].mlp.fc1.weight, encoder.blocks[1].mlp.fc1.weight)
    nn.init.normal_(classifier.fc_norm.weight)
    again = tiny_classifier("mlp", pool="avg")
    load_encoder(again, classifier.state_dict(), Path("memory"))
    assert torch.equal(again.fc_norm.weight, classifier.fc_norm.weight)
    load_encoder(encoder, classifier.state_dict(), Path("memory"))


@pytest.mark.parametrize(
    ("frozen", "trained"),
    [
        ("encoder", {"head", "fc_norm"}),
        ("blocks:0", {"blocks.0", "blocks.1", "norm", "fc_norm", "head"}),
        ("blocks:1", {"blocks.1", "norm", "fc_norm", "head"}),
        ("blocks:2", {"norm", "fc_norm", "head"}),
    ],
)
@pytest.mark.parametrize("pool", ["cls", "avg", "cls+avg"])
def test_exactly_the_named_part_is_frozen(frozen: str, trained: set[str], pool: TokenKind) -> None:
    classifier = tiny_classifier("mlp", drop_path=0.2, pool=pool)
    freeze(classifier, frozen_blocks(frozen, 2))
    learning = {name for name, parameter in classifier.named_parameters() if parameter.requires_grad}
    expected = {name for name, _ in classifier.named_parameters() if name.startswith(tuple(f"{t}." for t in trained))}
    assert learning == expected
    noisy = [not isinstance(block.drop_path1, nn.Identity) for block in classifier.blocks]
    assert noisy == [False, frozen in ("blocks:0", "blocks:1")]


@pytest.mark.parametrize("freeze", ["all", "blocks", "blocks:-1", "blocks:3", "Encoder", ""])
def test_another_part_is_refused(freeze: str) -> None:
    with pytest.raises(UserError, match="allowed: none, encoder, or blocks:N with N from 0 to 2"):
        frozen_blocks(freeze, 2)
