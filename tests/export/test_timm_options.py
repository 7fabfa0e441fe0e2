"""Options of `timm.create_model` on an exported folder: what works, and how. docs/export.md has each as a row."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor

from export.models import SQUARE, autoencoder, classifier, export
from mae.export.trained_model import TrainedModel

pytest.importorskip("timm", "1.0.31", reason="earlier timm converts fewer channels, and resamples squares only")

GUIDE = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
MODELS: dict[str, Callable[[], TrainedModel]] = {
    "encoder": lambda: autoencoder(SQUARE, (8, 8), 3),
    "gray": lambda: autoencoder(SQUARE, (8, 8), 1),
    "5 channels": lambda: autoencoder(SQUARE, (8, 8), 5),
    "classifier, cls": lambda: classifier("linear", "cls"),
    "classifier, avg": lambda: classifier("linear", "avg"),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[TrainedModel, Path]]:
    """Each model, and its folder for timm."""
    made = {}
    for name, make in MODELS.items():
        model = make()
        made[name] = model, export(model, "timm", tmp_path_factory.mktemp("exported") / "out").folder
    return made


def images(channels: int = 3, size: tuple[int, int] = (8, 8)) -> Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1))


def maps(tokens: Tensor) -> Tensor:
    """Patch tokens of images of 2x2 patches as maps."""
    return tokens[:, 1:].transpose(1, 2).reshape(len(tokens), -1, 2, 2)


def raw(model: TrainedModel) -> Tensor:
    """Maps of the last block, before the last norm."""
    found: list[Tensor] = model.vit.get_intermediate_layers(images(), n=1, reshape=True)
    return found[0]


def stem(model: TrainedModel) -> Tensor:
    return model.weights["patch_embed.proj.weight"]


# Model, options as in the guide, and what timm's model `m` is to compute or hold, beside what ours does.
WORKS: list[tuple[str, str, Callable[[Any], Tensor], Callable[[TrainedModel], Tensor]]] = [
    ("encoder", 'global_pool="avg", fc_norm=False', lambda m: m(images()), lambda o: o.tokens(images())[:, 1:].mean(1)),
    ("encoder", 'global_pool=""', lambda m: m(images()), lambda o: o.tokens(images())),
    ("encoder", "num_classes=7", lambda m: m.forward_features(images()), lambda o: o.tokens(images())),
    (
        "encoder",
        'num_classes=7, global_pool="avg", fc_norm=False',
        lambda m: m.forward_head(m.forward_features(images()), pre_logits=True),
        lambda o: o.tokens(images())[:, 1:].mean(1),
    ),
    ("classifier, cls", "", lambda m: m(images()), lambda o: o.logits(images())),
    ("classifier, cls", "num_classes=0", lambda m: m(images()), lambda o: o.features(images())),
    ("classifier, avg", "", lambda m: m(images()), lambda o: o.logits(images())),
    (
        "encoder",
        "img_size=(8, 16)",
        lambda m: m.pos_embed,
        lambda o: resample_abs_pos_embed(o.weights["pos_embed"], [2, 4], [2, 2], num_prefix_tokens=1),
    ),
    (
        "encoder",
        "dynamic_img_size=True",
        lambda m: m.pos_embed,
        lambda o: o.weights["pos_embed"],
    ),
    ("encoder", "patch_size=2", lambda m: m.patch_embed.proj.weight, lambda o: resample_patch_embed(stem(o), [2, 2])),
    ("encoder", "in_chans=1", lambda m: m.patch_embed.proj.weight, lambda o: stem(o).sum(1, keepdim=True)),
    ("gray", "in_chans=3", lambda m: m.patch_embed.proj.weight, lambda o: stem(o).repeat(1, 3, 1, 1) / 3),
    (
        "encoder",
        "in_chans=5",
        lambda m: m.patch_embed.proj.weight,
        lambda o: torch.cat([stem(o), stem(o)[:, :2]], 1) * 3 / 5,
    ),
    ("encoder", "features_only=True, out_indices=[-1]", lambda m: m(images())[-1], raw),
]  # fmt: skip
REFUSED = [
    ("encoder", 'global_pool="avg"', "Missing key.*fc_norm.weight"),
    ("classifier, avg", 'global_pool="token"', "Missing key.*norm.weight"),
    ("5 channels", "in_chans=3", "size mismatch for patch_embed.proj.weight"),
]


def create(folder: Path, options: str) -> Any:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **eval(f"dict({options})")).eval()


@pytest.mark.parametrize(("kind", "options", "theirs", "ours"), WORKS, ids=[f"{row[0]}: {row[1]}" for row in WORKS])
def test_what_works(
    exported: Any, kind: str, options: str, theirs: Callable[[Any], Tensor], ours: Callable[[TrainedModel], Tensor]
) -> None:
    model, folder = exported[kind]
    with torch.no_grad():
        torch.testing.assert_close(theirs(create(folder, options)).detach(), ours(model), rtol=0, atol=2e-6)
    assert f"| {kind} | {f'`{options}` ' if options else ''}|" in GUIDE


def test_maps_after_the_last_norm(exported: Any) -> None:
    model, folder = exported["encoder"]
    options = "images, indices=1, norm=True, intermediates_only=True"
    with torch.no_grad():
        (found,) = create(folder, "").forward_intermediates(images(), indices=1, norm=True, intermediates_only=True)
    torch.testing.assert_close(found, maps(model.tokens(images())), rtol=0, atol=2e-6)
    assert f"| encoder | no options, `model.forward_intermediates({options})` |" in GUIDE


@pytest.mark.parametrize(("kind", "options", "message"), REFUSED, ids=[f"{row[0]}: {row[1]}" for row in REFUSED])
def test_what_timm_refuses(exported: Any, kind: str, options: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        create(exported[kind][1], options)
    assert f"| {kind} | `{options}` | **refused**" in GUIDE


def test_a_new_head_hides_that_the_norm_is_new_too(exported: Any, caplog: pytest.LogCaptureFixture) -> None:
    """With another number of classes, timm forgives all tensors that are missing."""
    model, folder = exported["encoder"]
    with caplog.at_level(logging.WARNING):
        theirs = create(folder, 'num_classes=7, global_pool="avg"')
    assert torch.equal(theirs.fc_norm.weight, torch.ones(16))
    assert not torch.equal(model.weights["norm.weight"], torch.ones(16))
    assert "Unexpected keys (norm.bias, norm.weight)" in caplog.text
    assert '| encoder | `num_classes=7, global_pool="avg"` | **wrong**' in GUIDE


@pytest.mark.parametrize("size", [(8, 8), (12, 16)])
def test_a_dynamic_size_is_any_size(exported: Any, size: tuple[int, int]) -> None:
    _, folder = exported["encoder"]
    with torch.no_grad():
        dynamic, fixed = create(folder, "dynamic_img_size=True"), create(folder, f"img_size={size}")
        torch.testing.assert_close(dynamic(images(size=size)), fixed(images(size=size)), rtol=0, atol=2e-6)
