"""Pictures of maps whose answer is known."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from mae.report.images import Tile, displayable, embedded, enlarged, grid, heat_over, pca_colors


def decoded(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"))


def test_the_patch_that_is_looked_at_is_the_brightest() -> None:
    heat = np.zeros((2, 3), dtype=np.float32)
    heat[1, 2] = 0.25
    drawn = heat_over(np.full((8, 12, 3), 0.5, dtype=np.float32), heat)
    brightness = drawn.mean(axis=2)
    assert brightness[4:, 8:].min() > brightness[:4].max() + 0.3
    assert brightness[4:, 8:].min() > brightness[4:, :8].max() + 0.3
    assert np.ptp(brightness[:4]) == pytest.approx(0, abs=1e-6)


def test_patches_of_one_kind_have_one_color() -> None:
    """Three kinds of patches that differ in two directions: three colours, and noise changes little."""
    kinds = np.array([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0]])
    places = np.array([[[0, 0, 1], [0, 1, 1]], [[2, 2, 1], [0, 2, 1]]])
    noise = np.random.default_rng(0).normal(0, 1e-3, (2, 2, 3, 4))
    colors = pca_colors((kinds[places] + noise).astype(np.float32))
    centers = [colors[places == kind][:, :2].mean(axis=0) for kind in range(3)]
    for kind in range(3):
        assert np.abs(colors[places == kind][:, :2] - centers[kind]).max() < 0.02
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(centers[a] - centers[b]).max() > 0.4
    assert colors.min() >= 0
    assert colors.max() <= 1


def test_features_that_do_not_vary_are_gray() -> None:
    assert (pca_colors(np.ones((2, 2, 2, 5), dtype=np.float32)) == 0.5).all()
    assert pca_colors(np.ones((1, 1, 1, 1), dtype=np.float32)).shape == (1, 1, 1, 3)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_any_number_of_channels_is_shown(channels: int) -> None:
    image = torch.randint(0, 256, (channels, 6, 9), dtype=torch.uint8)
    shown = displayable(image)
    assert shown.shape == (6, 9, 3)
    expected = image[:3] if channels >= 3 else image[:1].expand(3, -1, -1)
    np.testing.assert_allclose(shown, expected.permute(1, 2, 0).numpy() / 255, atol=1e-6)
    np.testing.assert_allclose(displayable(image / 255), shown, atol=1e-6)
    assert (decoded(embedded(shown)) == np.round(255 * shown)).all()


def test_large_pictures_become_small() -> None:
    url = embedded(np.random.default_rng(0).random((300, 600, 3)).astype(np.float32))
    assert decoded(url).shape == (56, 112, 3)
    assert len(url) < 12_000
    assert enlarged(np.zeros((2, 2, 3), dtype=np.float32), (7, 9)).shape == (7, 9, 3)


def test_names_are_escaped() -> None:
    text = grid(("<b>",), [[Tile("data:,", '"><script>', "<i>")]])
    assert "<script>" not in text
    assert "<b>" not in text
    assert "&lt;i&gt;" in text
    assert grid((), []) == ""
