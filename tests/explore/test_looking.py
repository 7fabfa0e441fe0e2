"""What is shown of one picture: known answers, and the same as the model gives."""

import html
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

import mae
from mae.errors import UserError
from mae.explore import looking
from mae.explore.masks import MaskChoice, drawn_mask, painted_mask
from mae.explore.picture_set import Picture
from mae.inference.model import Model
from mae.models.autoencoder import MaskedAutoencoder
from mae.models.masking import MaskKind
from tests.explore.runs import (
    GRID,
    NAMES,
    SIZE,
    autoencoder,
    image_file,
    noise,
    pictures_in,
    write_autoencoder,
    write_classifier,
    write_run,
)

NOISE = Picture("noise.png", image_file(noise(0)))


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return mae.load(write_run(tmp_path / "run", ()), "cpu")


@pytest.fixture
def classifier(tmp_path: Path) -> Model:
    return mae.load(write_classifier(tmp_path / "tuned"), "cpu")


def network_of(model: Model) -> MaskedAutoencoder:
    assert isinstance(model.network, MaskedAutoencoder)
    return model.network


def test_a_drawn_mask_is_the_one_that_the_model_draws(model: Model) -> None:
    for ratio, seed in ((0.5, 0), (0.5, 3), (0.8, 1)):
        hidden = drawn_mask(network_of(model), "random", ratio, seed)
        assert torch.equal(hidden, model.reconstruct(NOISE.data, ratio, seed).hidden[0])


def test_each_kind_of_mask_hides_its_share(model: Model) -> None:
    network = autoencoder(0, (16, 24))
    assert int(drawn_mask(network, "block", 0.5, 0).sum()) == 12
    hidden = drawn_mask(network, "grid", 0.6, 0)  # the nearest share of a grid mask is 3/4
    visible = (~hidden).reshape(2, 2, 3, 2).sum(dim=(1, 3))
    assert visible.tolist() == [[1, 1, 1], [1, 1, 1]]
    with pytest.raises(UserError, match="no square cells divide 2x3 patches"):
        drawn_mask(network_of(model), "grid", 0.75, 0)
    for ratio in (0.0, 0.99, 1.0):
        with pytest.raises(UserError, match="would hide none or all of 6 patches"):
            drawn_mask(network_of(model), "random", ratio, 0)


def test_a_painted_mask_hides_the_marked_patches_row_by_row() -> None:
    assert painted_mask("010001", GRID).tolist() == [[False, True, False], [False, False, True]]
    for marks, reason in (
        ("", "nothing is painted"),
        ("000000", "nothing is painted"),
        ("111111", "every patch is painted"),
        ("0101", "does not fit 2x3"),
        ("01x101", "does not fit 2x3"),
    ):
        with pytest.raises(UserError, match=reason):
            painted_mask(marks, GRID)


def test_the_reconstruction_shows_what_the_model_makes_of_the_painted_mask(model: Model) -> None:
    shown = looking.reconstruction(model, NOISE, "painted", 0.5, 0, "010001")
    hidden = torch.tensor([[[False, True, False], [False, False, True]]])
    found = model.reconstruct(NOISE.data, hidden=hidden)
    for picture, panel in zip(
        pictures_in(shown)[:4], [found.original, found.masked, found.pasted, found.rebuilt], strict=True
    ):
        np.testing.assert_allclose(picture / 255, panel[0].permute(1, 2, 0), atol=0.5 / 255 + 1e-6)
    assert "2 of 6 patches hidden" in shown
    error = (found.rebuilt - found.original).abs()[0].mean(dim=0)
    hidden_error = torch.cat([error[:4, 4:8].flatten(), error[4:, 8:].flatten()]).mean()
    assert f"Mean error of the hidden pixels: {float(hidden_error):.3f} of 1." in shown
    assert f"Their loss: {float(found.loss[0]):.3f}." in shown


def test_the_error_map_holds_the_mean_over_channels_of_hidden_pixels_only() -> None:
    original, rebuilt = torch.zeros(2, 2, 4), torch.zeros(2, 2, 4)
    rebuilt[0, 0, 0], rebuilt[1, 0, 3], rebuilt[0, 1, 2] = 1.0, 0.5, -0.5
    found = looking.error_map(original, rebuilt, torch.tensor([[False, True]]))
    np.testing.assert_array_equal(found, [[np.nan, np.nan, 0, 0.25], [np.nan, np.nan, 0.25, 0]])


def test_even_attention_is_one_colour_and_is_counted(tmp_path: Path) -> None:
    network = autoencoder(0)
    nn.init.zeros_(network.encoder.blocks[0].attn.qkv.weight)
    nn.init.zeros_(network.encoder.blocks[0].attn.qkv.bias)
    model = mae.load(write_autoencoder(tmp_path / "run", network), "cpu")
    black = Picture("black", image_file(np.zeros((*SIZE, 3), np.uint8)))
    shown = looking.attention(model, black, 1)
    maps = pictures_in(shown)
    assert len(maps) == 3  # the mean, and two heads
    for each in maps:
        assert np.ptp(each.reshape(-1, 3), axis=0).max() <= 8  # WebP rounds
        assert each.mean() > 100
    assert "The patches get 86% of the attention" in shown  # 6 of 7 tokens
    uneven = pictures_in(looking.attention(model, black, 2))
    assert max(np.ptp(each.reshape(-1, 3), axis=0).max() for each in uneven) > 30
    with pytest.raises(UserError, match="there is no block"):
        looking.attention(model, black, 3)


def test_the_brightest_patch_is_the_one_with_the_most_attention(model: Model) -> None:
    weights = model.attention(NOISE.data, 1)[0]
    black_is_even = pictures_in(looking.attention(model, NOISE, 2))[1:]
    for head, shown in zip(weights, black_is_even, strict=True):
        row, column = divmod(int(head.argmax()), GRID[1])
        height, width = (size // patches for size, patches in zip(shown.shape, GRID, strict=False))
        patch = shown[row * height : (row + 1) * height, column * width : (column + 1) * width].astype(float)
        # The hottest colour of the map is a bright yellow, whatever gray lies below it.
        assert patch[..., 0].mean() > patch[..., 2].mean() + 30


def test_patches_of_two_kinds_differ_in_the_first_component_only(tmp_path: Path) -> None:
    network = autoencoder(0)
    nn.init.zeros_(network.encoder.pos_embed)
    model = mae.load(write_autoencoder(tmp_path / "run", network), "cpu")
    pixels = np.zeros((*SIZE, 3), np.uint8)
    pixels[:, 4:8] = 255
    together, first, second, third = pictures_in(looking.patch_colors(model, Picture("stripe", image_file(pixels))))
    column = first.shape[1] // 3
    sides, middle = np.concatenate([first[:, :column], first[:, 2 * column :]], axis=1), first[:, column : 2 * column]
    inner = slice(4, -4)  # WebP blurs an edge
    values = sorted([sides[:, inner].mean() / 255, middle[:, inner].mean() / 255])
    assert values == pytest.approx([0, 1], abs=0.05)
    for rest in (second, third):
        assert np.abs(rest.astype(int) - 128).max() <= 2
    assert together.shape == first.shape


def test_predictions_are_those_of_the_model_and_names_are_text(classifier: Model) -> None:
    shown = looking.predictions(classifier, NOISE._replace(label=NAMES[1]))
    (found,) = classifier.predict(NOISE.data)
    assert len(found.names) == 4
    for name, share in zip(found.names, found.probabilities, strict=True):
        assert f"<td>{html.escape(name)}</td>" in shown
        assert f"{share:.1%}" in shown
    assert "<b>" not in shown


def test_what_a_model_does_not_have_is_said(model: Model, classifier: Model) -> None:
    with pytest.raises(UserError, match="is an encoder, which knows no classes"):
        looking.predictions(model, NOISE)
    for kind in ("random", "painted"):
        with pytest.raises(UserError, match="has no decoder, so it cannot reconstruct images"):
            looking.reconstruction(classifier, NOISE, kind, 0.5, 0, "")
    assert len(pictures_in(looking.attention(classifier, NOISE, 2))) == 3
    assert len(pictures_in(looking.patch_colors(classifier, NOISE))) == 4


def test_any_name_is_shown_as_text() -> None:
    for show in (looking.notice, looking.note):
        text = show("<img src=x onerror=alert(1)>\n\udcff")
        assert "<img" not in text
        assert "\\n\\xff" in text or "\\n\\udcff" in text
        text.encode()


def test_every_kind_of_mask_that_a_run_can_have_can_be_chosen() -> None:
    assert set(get_args(MaskChoice)) == {*get_args(MaskKind), "painted"}
