import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mae.data.plan import plan_batches
from mae.errors import UserError
from mae.models.autoencoder import MaskedAutoencoder
from mae.models.decoders import DECODERS
from mae.models.masking import MaskKind, make_mask, mask_of
from mae.models.patches import patchify, take
from mae.models.positions import sincos_positions

Build = Callable[..., MaskedAutoencoder]
Draw = Callable[..., tuple[Tensor, Tensor]]

SHAPES = [
    {"image_size": (16, 16), "channels": 3},
    {"image_size": (8, 16), "channels": 1},
    {"image_size": (12, 8), "channels": 5, "patch_size": (2, 4)},
]


def slow_loss(model: MaskedAutoencoder, images: Tensor, predicted: Tensor, ids: Tensor) -> float:
    """The formula, one number at a time."""
    columns, (down, across) = model.grid[1], model.patch_size
    errors = []
    for image, patches, places in zip(images.tolist(), predicted.tolist(), ids.tolist(), strict=True):
        for patch, place in zip(patches, places, strict=True):
            top, left = place // columns * down, place % columns * across
            pixels = [channel[top + y][left + x] for y in range(down) for x in range(across) for channel in image]
            if model.norm_pix_loss:
                mean = sum(pixels) / len(pixels)
                variance = sum((pixel - mean) ** 2 for pixel in pixels) / (len(pixels) - 1)
                pixels = [(pixel - mean) / math.sqrt(variance + 1e-6) for pixel in pixels]
            squares = [(p - t) ** 2 for p, t in zip(patch, pixels, strict=True)]
            errors.append(sum(squares) / len(squares))
    return sum(errors) / len(errors)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_loss_is_the_mean_squared_error_over_hidden_patches(
    tiny_autoencoder: Build, draw: Draw, shape: dict[str, Any], norm_pix_loss: bool
) -> None:
    model = tiny_autoencoder(**shape, norm_pix_loss=norm_pix_loss)
    images, noise = draw(model, batch=3)
    loss, predicted, ids = model(images, noise)
    assert loss.item() == pytest.approx(slow_loss(model, images, predicted, ids), rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decoder", DECODERS)
def test_any_rectangle_and_number_of_channels_trains(
    tiny_autoencoder: Build, draw: Draw, shape: dict[str, Any], decoder: str
) -> None:
    model = tiny_autoencoder(**shape, decoder=decoder)
    images, noise = draw(model)
    loss, predicted, ids = model(images, noise)
    loss.backward()
    down, across = model.patch_size
    assert predicted.shape == (2, model.patches * 3 // 4, down * across * images.shape[1])
    assert torch.equal(ids, model.mask(noise).ids_hidden)
    frozen = {"encoder.pos_embed", "decoder.decoder_pos_embed"}
    if not DECODERS[decoder].reads_normed_output:
        frozen |= {"encoder.norm.weight", "encoder.norm.bias"}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name not in frozen), name
        assert (parameter.grad is None) == (name in frozen), name
        assert name in frozen or parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("decoder", DECODERS)
def test_encoder_and_decoder_have_positions_of_the_temperature(tiny_autoencoder: Build, decoder: str) -> None:
    model = tiny_autoencoder(decoder=decoder, position_temperature=10.0)
    for table in (model.encoder.pos_embed, model.decoder.decoder_pos_embed):
        assert torch.equal(table, sincos_positions(model.grid, table.shape[2], 10.0))
        assert not table.requires_grad


@pytest.mark.parametrize("decoder", DECODERS)
def test_at_the_start_hidden_patches_of_an_image_are_predicted_differently(
    tiny_autoencoder: Build, draw: Draw, decoder: str
) -> None:
    model = tiny_autoencoder(decoder=decoder)
    for patches in model(*draw(model)).predicted:
        assert torch.cdist(patches, patches).fill_diagonal_(torch.inf).min() > 0.1


@pytest.mark.parametrize("decoder", DECODERS)
def test_nothing_that_is_returned_is_a_view(tiny_autoencoder: Build, draw: Draw, decoder: str) -> None:
    model = tiny_autoencoder(decoder=decoder, predict_ratio=0.25)
    result = model(*draw(model))
    assert [tensor._base for tensor in result] == [None] * 3
    result.predicted.sum().backward()
    assert any(parameter.grad is not None for parameter in model.decoder.parameters())


@pytest.mark.parametrize("decoder", DECODERS)
def test_what_is_left_out_does_not_change_what_is_predicted(tiny_autoencoder: Build, draw: Draw, decoder: str) -> None:
    model = tiny_autoencoder(decoder=decoder, decoder_depth=3)
    images, noise = draw(model)
    everything = model.predict_all(images, noise)
    some = tiny_autoencoder(decoder=decoder, decoder_depth=3, predict_ratio=0.25)
    assert some.predicted == 3
    for each in (model, some):
        _, predicted, ids = each(images, noise)
        assert ids.shape == (2, each.predicted)
        torch.testing.assert_close(predicted, take(everything, ids))


def test_the_pruned_step_has_the_gradients_of_the_whole_computation(tiny_autoencoder: Build, draw: Draw) -> None:
    pruned, whole = tiny_autoencoder(decoder_depth=3), tiny_autoencoder(decoder_depth=3)
    images, noise = draw(pruned)
    result = pruned(images, noise)
    result.loss.backward()
    # All patches are predicted, and the error of the visible ones is weighed with nothing.
    target = whole.target(patchify(images, whole.patch_size))
    error = (whole.predict_all(images, noise) - target).square().mean(dim=2)
    hidden = whole.mask(noise).hidden()
    loss = (error * hidden).sum() / hidden.sum()
    loss.backward()
    torch.testing.assert_close(result.loss, loss)
    for (name, found), expected in zip(pruned.named_parameters(), whole.parameters(), strict=True):
        if expected.requires_grad:
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("kind", get_args(MaskKind))
def test_every_kind_of_mask_trains_and_ones_own_mask_is_taken(tiny_autoencoder: Build, draw: Draw, kind: str) -> None:
    model = tiny_autoencoder(mask=kind)
    images, noise = draw(model)
    mask = make_mask(noise, model.grid, kind, kept=4)
    result = model(images, noise)
    assert torch.equal(result.ids, mask.ids_hidden)
    assert torch.equal(model(images, mask).loss, result.loss)
    own = mask_of(mask.hidden(), noise)
    assert model(images, own).loss.item() == pytest.approx(result.loss.item(), rel=1e-5)
    another = model(images, mask_of(torch.arange(16).expand(2, -1) < 6, noise))
    assert sorted(another.ids[0].tolist()) == list(range(6))


def test_the_loss_asks_nothing_of_visible_patches(tiny_autoencoder: Build, draw: Draw) -> None:
    model = tiny_autoencoder()
    images, noise = draw(model)
    loss, predicted, ids = model(images, noise)
    pixels = patchify(images, model.patch_size)
    visible = torch.ones_like(noise).scatter(1, ids, 0.0)
    elsewhere = pixels + 100 * visible[:, :, None]
    assert torch.equal(model.loss(take(elsewhere, ids), predicted), loss)
    assert model.loss(take(pixels, ids), predicted + 100) > 100


@pytest.mark.parametrize("decoder", DECODERS)
def test_predictions_do_not_depend_on_hidden_pixels(tiny_autoencoder: Build, draw: Draw, decoder: str) -> None:
    model = tiny_autoencoder(norm_pix_loss=False, decoder=decoder)
    images, noise = draw(model)
    predicted, hidden = model(images, noise).predicted, model.mask(noise).hidden()

    def disturbed(patches: Tensor) -> Tensor:
        change = patches[:, :, None].float().expand(-1, -1, predicted.shape[2])
        return model(images + model.to_images(change, images), noise).predicted

    assert torch.equal(disturbed(hidden), predicted)
    assert (disturbed(~hidden) - predicted).abs().amax(dim=(1, 2)).min() > 1e-3


def test_an_image_is_predicted_without_regard_to_the_others_of_its_batch(tiny_autoencoder: Build, draw: Draw) -> None:
    model = tiny_autoencoder()
    images, noise = draw(model, batch=3)
    together = model(images, noise).predicted
    alone = model(images[1:2], noise[1:2]).predicted
    torch.testing.assert_close(alone, together[1:2])


def test_a_normalised_target_has_mean_zero_and_variance_one_in_each_patch(tiny_autoencoder: Build, draw: Draw) -> None:
    model = tiny_autoencoder()
    target = model.target(patchify(draw(model)[0] * 3 + 7, model.patch_size))
    torch.testing.assert_close(target.mean(dim=2), torch.zeros(2, 16), rtol=0, atol=1e-5)
    torch.testing.assert_close(target.var(dim=2), torch.ones(2, 16), rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", [-2.0, 0.0, 0.7, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_of_one_colour_has_a_finite_loss_and_gradient_n06(
    tiny_autoencoder: Build, draw: Draw, value: float, dtype: torch.dtype
) -> None:
    model = tiny_autoencoder()
    images, noise = draw(model)
    plain = torch.full_like(images, value)
    # Of the rounding of the mean, over the least deviation there can be.
    assert model.target(patchify(plain, model.patch_size)).abs().max() < 1e-2 * max(1.0, abs(value))
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        loss = model(plain, noise).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_predicting_each_patchs_mean_has_a_loss_of_one(tiny_autoencoder: Build, draw: Draw) -> None:
    model = tiny_autoencoder()
    images, noise = draw(model)
    pixels = take(patchify(images, model.patch_size), model(images, noise).ids)
    # The variance divides by one pixel less than the mean of squares.
    expected = (pixels.shape[2] - 1) / pixels.shape[2]
    assert model.loss(pixels, torch.zeros_like(pixels)).item() == pytest.approx(expected, rel=1e-4)


def test_the_loss_starts_at_one_plus_the_spread_of_the_first_predictions(tiny_autoencoder: Build, draw: Draw) -> None:
    model = tiny_autoencoder(image_size=(32, 32), patch_size=(8,))
    pixels, width = 8 * 8 * 3, 12
    # Xavier weights on normed tokens of `width` channels: 2 / (width + pixels) per channel.
    expected = (pixels - 1) / pixels + 2 * width / (width + pixels)
    assert model(*draw(model, batch=4)).loss.item() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_the_target_as_an_image_is_the_image(
    tiny_autoencoder: Build, draw: Draw, shape: dict[str, Any], norm_pix_loss: bool
) -> None:
    model = tiny_autoencoder(**shape, norm_pix_loss=norm_pix_loss)
    images, _ = draw(model)
    atol = 1e-5 if norm_pix_loss else 0
    target = model.target(patchify(images, model.patch_size))
    torch.testing.assert_close(model.to_images(target, images), images, rtol=0, atol=atol)


def test_bfloat16_autocast_computes_the_loss_in_float32(tiny_autoencoder: Build, draw: Draw) -> None:
    model = tiny_autoencoder()
    images, noise = draw(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, predicted, ids = model(images, noise)
    assert predicted.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert torch.equal(loss, model.loss(take(patchify(images, model.patch_size), ids), predicted.float()))
    assert loss.item() == pytest.approx(model(images, noise).loss.item(), rel=0.02)
    loss.backward()
    assert model.encoder.patch_embed.proj.weight.grad.isfinite().all()


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize(
    ("decoder", "name"),
    [
        ("self", "encoder.blocks.0.mlp.fc1.bias"),
        ("self", "encoder.cls_token"),
        ("self", "decoder.mask_token"),
        ("cross", "encoder.blocks.0.mlp.fc1.bias"),
        ("cross", "decoder.decoder_mix"),
        ("cross", "decoder.decoder_norms.0.weight"),
    ],
)
def test_the_gradient_is_the_slope_of_the_loss(
    tiny_autoencoder: Build, draw: Draw, norm_pix_loss: bool, decoder: str, name: str
) -> None:
    model = tiny_autoencoder(norm_pix_loss=norm_pix_loss, decoder=decoder).double()
    images, noise = (tensor.double() for tensor in draw(model))
    parameter = model.get_parameter(name)
    model(images, noise).loss.backward()
    direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)).double()

    def loss_at(step: float) -> float:
        with torch.no_grad():
            parameter.add_(step * direction)
            _, predicted, ids = model(images, noise)
            parameter.sub_(step * direction)
        # `model.loss` rounds to float32, too coarse for a difference quotient.
        return slow_loss(model, images, predicted, ids)

    slope = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5
    assert (parameter.grad * direction).sum().item() == pytest.approx(slope, rel=1e-4)


def test_the_same_seed_builds_the_same_model(tiny_autoencoder: Build, draw: Draw) -> None:
    model = tiny_autoencoder()
    images, noise = draw(model)
    assert torch.equal(tiny_autoencoder()(images, noise).loss, model(images, noise).loss)
    assert not torch.equal(tiny_autoencoder(seed=1)(images, noise).loss, model(images, noise).loss)


def test_a_patch_of_one_value_cannot_be_normalised_and_is_refused(tiny_autoencoder: Build, draw: Draw) -> None:
    single = {"image_size": (4, 4), "channels": 1, "patch_size": (1,)}
    with pytest.raises(UserError, match=r"model\.norm_pix_loss is True; allowed: False"):
        tiny_autoencoder(**single, norm_pix_loss=True)
    model = tiny_autoencoder(**single, norm_pix_loss=False)
    assert model(*draw(model)).loss.isfinite()


def test_a_share_that_hides_all_patches_is_refused_n07(tiny_autoencoder: Build) -> None:
    with pytest.raises(UserError, match=r"model\.mask_ratio is 0\.95"):
        tiny_autoencoder(mask_ratio=0.95)


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_gradients_of_equal_parts_add_up_to_the_gradient_of_the_whole_batch_n08(
    tiny_autoencoder: Build, draw: Draw, parts: int
) -> None:
    whole, accumulated = tiny_autoencoder(), tiny_autoencoder()
    images, noise = draw(whole, batch=6)
    whole(images, noise).loss.backward()
    for some, of_some in zip(images.chunk(parts), noise.chunk(parts), strict=True):
        (accumulated(some, of_some).loss / parts).backward()
    for (name, expected), found in zip(whole.named_parameters(), accumulated.parameters(), strict=True):
        if expected.requires_grad:
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=name)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.integers(1, 8), st.none() | st.integers(1, 64))
def test_there_is_no_partial_last_part_of_a_batch_n08(
    global_batch: int, processes: int, micro_batch: int | None
) -> None:
    try:
        plan = plan_batches(global_batch, processes, micro_batch)
    except UserError:
        assert global_batch % (processes * (micro_batch or 1))
        return
    rows = [plan.positions(micro, rank) for micro in range(plan.accumulation) for rank in range(processes)]
    assert {stop - start for start, stop in rows} == {plan.per_process}
    assert sum(stop - start for start, stop in rows) == global_batch
