"""The same weights, images and noise through `transformers`' model and a plain one, which are independent of ours."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.models import PlainMaskedAutoencoder, published_names, published_weights, transformers_model
from mae.models.autoencoder import MaskedAutoencoder
from mae.models.weights import name_in_file

Build = Callable[..., MaskedAutoencoder]
Draw = Callable[..., tuple[Tensor, Tensor]]

TOLERANCE = 1e-5
"""Of the largest value of a tensor."""

CASES: list[dict[str, Any]] = [
    {"image_size": (16, 16), "channels": 3, "patch_size": (4,), "mask_ratio": 0.75, "decoder_depth": 2},
    {"image_size": (12, 12), "channels": 1, "patch_size": (2,), "mask_ratio": 0.6, "width": 24, "heads": 3},
    {"image_size": (64, 64), "channels": 3, "patch_size": (16,), "size": "tiny", "width": None, "heads": None},
    {"image_size": (96, 96), "channels": 3, "patch_size": (16,), "size": "small", "width": None, "heads": None}
    | {"decoder_width": 64, "decoder_depth": 3, "decoder_heads": 4},
]
RECTANGLE: dict[str, Any] = {"image_size": (8, 24), "channels": 5, "patch_size": (2, 4), "decoder_depth": 2}

both_targets = pytest.mark.parametrize("norm_pix_loss", [True, False], ids=["normalised", "plain pixels"])


def name_of(case: dict[str, Any]) -> str:
    return f"{case.get('size', 'of width ' + str(case.get('width', 16)))}, {case['image_size'][0]} px"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@both_targets
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_loss_predictions_mask_and_every_gradient_are_those_of_transformers(
    tiny_autoencoder: Build, draw: Draw, case: dict[str, Any], norm_pix_loss: bool, attention: Any
) -> None:
    model = with_random_weights(tiny_autoencoder(**case, norm_pix_loss=norm_pix_loss))
    theirs = transformers_model(model, attention)
    images, noise = draw(model)
    parameters = loaded_from(published_weights(model), theirs)
    expected = theirs(images, noise=noise)
    expected.loss.backward()
    gradients = {
        name: torch.cat([parameters[part].grad for part in published_names(name)]) for name in parameters_of(model)
    }
    assert_equal_step(model, images, noise, expected, gradients)


@pytest.mark.parametrize("attention", ["manual", "sdpa"])
@both_targets
@pytest.mark.parametrize("case", [*CASES, RECTANGLE], ids=name_of)
def test_loss_predictions_mask_and_every_gradient_are_those_of_the_plain_model(
    tiny_autoencoder: Build, draw: Draw, case: dict[str, Any], norm_pix_loss: bool, attention: Any
) -> None:
    model = with_random_weights(tiny_autoencoder(**case, norm_pix_loss=norm_pix_loss))
    plain = PlainMaskedAutoencoder(model, attention)
    images, noise = draw(model)
    expected = plain(images, noise)
    expected.loss.backward()
    assert_equal_step(model, images, noise, expected, gradients_of(plain))


def with_random_weights(model: MaskedAutoencoder) -> MaskedAutoencoder:
    """Biases, norms and a cls position that are not zeros and ones, so that a mixed-up pair shows."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """All that learn, under their names in a file."""
    return {name_in_file(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Of all that learn, under their names in a file; a parameter without one is left out."""
    return {name: each.grad for name, each in parameters_of(model).items() if each.grad is not None}


def loaded_from(weights: Mapping[str, Tensor], theirs: nn.Module) -> dict[str, nn.Parameter]:
    """Name in a published file -> parameter. Found by value: a model's own names change from release to release."""
    found = {
        name: [each for each in theirs.parameters() if each.shape == tensor.shape and torch.equal(each, tensor)]
        for name, tensor in weights.items()
    }
    assert all(len(parameters) == 1 for parameters in found.values())
    return {name: parameters[0] for name, parameters in found.items()}


def assert_equal_step(
    model: MaskedAutoencoder, images: Tensor, noise: Tensor, expected: Any, gradients: Mapping[str, Tensor]
) -> None:
    """`expected` has the loss, the prediction of every patch and a mask that is 1 where a patch is hidden."""
    ours = model(images, noise)
    assert torch.equal(model.mask(noise).hidden(), expected.mask.bool())
    assert_close(model.predict_all(images, noise), expected.logits, "predictions")
    assert_close(ours.loss, expected.loss, "loss")
    ours.loss.backward()
    found = gradients_of(model)
    assert found.keys() == gradients.keys() == parameters_of(model).keys()
    for name, gradient in found.items():
        assert_close(gradient, gradients[name], name)


def assert_close(ours: Tensor, theirs: Tensor, name: str) -> None:
    largest = theirs.abs().max()
    assert largest > 0, name
    assert (ours - theirs).abs().max() <= TOLERANCE * largest, name
