"""Panels show what they say; the page embeds all and fetches nothing."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from mae.data.loader import normalize
from mae.data.statistics import PixelStatistics
from mae.inference.reconstruction import reconstructed
from mae.models.autoencoder import MaskedAutoencoder
from mae.models.patches import patchify
from mae.models.settings import MaskedAutoencoderSettings
from mae.report import page
from mae.report.pictures import draw_reconstructions

STATISTICS = {c: PixelStatistics((0.4,) * c, (0.2,) * c) for c in (1, 3, 5)}


def tiny(channels: int, norm_pix_loss: bool) -> MaskedAutoencoder:
    torch.manual_seed(0)
    settings = MaskedAutoencoderSettings(
        width=16, depth=1, heads=2, patch_size=(2, 4), decoder_width=8, decoder_depth=1, decoder_heads=2,
        norm_pix_loss=norm_pix_loss,
    )  # fmt: skip
    return MaskedAutoencoder(settings, (8, 16), channels)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_panels(channels: int, norm_pix_loss: bool) -> None:
    model = tiny(channels, norm_pix_loss)
    pixels = torch.randint(0, 256, (3, channels, 8, 16), dtype=torch.uint8)
    noise = torch.rand(3, model.patches)
    images = normalize(pixels, STATISTICS[channels])
    original, masked, rebuilt, pasted = reconstructed(model, images, noise, STATISTICS[channels]).panels
    torch.testing.assert_close(original, pixels / 255)
    hidden = (masked == 0.5).all(1)
    assert hidden.float().mean() == pytest.approx(0.75, abs=0.02)
    assert torch.equal(pasted[:, 0][~hidden], original[:, 0][~hidden])
    assert torch.equal(pasted[:, 0][hidden], rebuilt[:, 0][hidden])
    assert torch.equal(masked[:, 0][~hidden], original[:, 0][~hidden])
    assert model.training
    assert rebuilt.min() >= 0
    assert rebuilt.max() <= 1

    drawn = np.asarray(Image.open(io.BytesIO(draw_reconstructions((original, masked, rebuilt, pasted), "t", True))))
    assert drawn.shape[0] > 200
    assert drawn.std() > 10


def test_a_perfect_prediction_is_drawn_as_the_original() -> None:
    """Un-normalising undoes the target, so a model that predicts its target shows the image."""
    for norm_pix_loss in (True, False):
        model = tiny(3, norm_pix_loss)
        images = normalize(torch.randint(0, 256, (2, 3, 8, 16), dtype=torch.uint8), STATISTICS[3])
        target = model.target(patchify(images, model.patch_size))
        torch.testing.assert_close(model.to_images(target, images), images, rtol=1e-4, atol=1e-4)


def test_the_page_escapes_text_and_embeds_pictures() -> None:
    url = page.data_url(b"png", "png")
    table = page.table(("x", "y"), [("<script>", "12.5 %"), ("3", "")])
    text = page.page("a<b", [("s&t", table + f'<img src="{url}">')])
    assert "&lt;script&gt;" in text
    assert text.count("<script") == 1  # its own, which is the same in each page
    assert "a&lt;b" in text
    assert '<th scope="col" class="number">y</th>' in text
    assert '<td class="number">12.5 %</td>' in text
    assert "<td>3</td>" in text  # a number in a column of words
    assert 'src="data:image/png;base64,cG5n"' in text
    assert "://" not in text
    assert "default-src 'none'; img-src data:" in text
