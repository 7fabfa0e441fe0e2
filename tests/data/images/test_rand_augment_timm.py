import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import rand_augment_transform
from timm.data.transforms_factory import create_transform

from data.jpegs import photo
from mae.data.images.rand_augment import rand_augment_of
from mae.data.images.rand_augment_timm import TimmRandAugment
from mae.keyed import Purpose, bits, key

PUBLISHED = "rand-m9-mstd0.5-inc1"
MEAN = (0.485, 0.456, 0.406)
FILL = (124, 116, 104)
WORDS = [0, 1, 2**32, 2**63, 2**64 - 1, *bits(key(Purpose.AUGMENT), np.arange(1), 300)[0].tolist()]


def seed(word: int) -> None:
    """The global generators, of which numpy's takes at most 32 bits in one number."""
    random.seed(word)
    np.random.seed([word % 2**32, word // 2**32])


@pytest.fixture(autouse=True)
def _own_generators() -> Iterator[None]:
    states = random.getstate(), np.random.get_state()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])


@pytest.fixture(autouse=True)
def _zero_bits_are_black(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Pillow before 13, which refuses them: timm fails there."""
    usual = ImageOps.posterize

    def posterize(image: Image.Image, bits: int) -> Image.Image:
        return image.point([0] * 256 * len(image.getbands())) if bits == 0 else usual(image, bits)

    monkeypatch.setattr(ImageOps, "posterize", posterize)


def as_tensor(image: Image.Image, channels: int) -> torch.Tensor:
    return torch.from_numpy(np.array(image).reshape(*image.size[::-1], channels)).permute(2, 0, 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "text",
    [PUBLISHED, "rand", "rand-m5", "rand-m0-inc1", "rand-m10-n3-p1-inc1", "rand-mstd2.5-p0.8", "rand-inc1-m20-mstd0"],
)
def test_it_is_timms_under_the_same_seeds(channels: int, text: str) -> None:
    pixels = photo(37, 29)[:, :, :channels]
    bicubic = {"interpolation": Image.Resampling.BICUBIC}
    theirs = rand_augment_transform(text, {"img_mean": FILL[:channels]} | bicubic)
    ours = rand_augment_of(text, channels, MEAN[:channels])
    assert ours is not None
    image, changed = torch.from_numpy(pixels).permute(2, 0, 1), 0
    for word in WORDS:
        seed(word)
        expected = as_tensor(theirs(Image.fromarray(pixels.squeeze())), channels)
        found = ours(image, word)
        assert torch.equal(found, expected)
        assert (found.dtype, found.shape) == (torch.uint8, image.shape)
        changed += not torch.equal(found, image)
    assert changed > 40


def test_the_published_one_is_that_of_timms_transform_for_training() -> None:
    """As in the first code of masked autoencoders: the colour from outside the image is the mean, moves are bicubic."""
    steps = create_transform(
        (48, 40), is_training=True, color_jitter=None, auto_augment=PUBLISHED, interpolation="bicubic", mean=MEAN
    )
    theirs = steps.transforms[2]
    ours = rand_augment_of(PUBLISHED, 3, MEAN)
    assert ours is not None
    pixels = photo(48, 40)
    for word in WORDS:
        seed(word)
        expected = as_tensor(theirs(Image.fromarray(pixels)), 3)
        assert torch.equal(ours(torch.from_numpy(pixels).permute(2, 0, 1), word), expected)


def test_without_a_mean_it_fills_with_timms_gray() -> None:
    theirs, pixels = rand_augment_transform(PUBLISHED, {"interpolation": Image.Resampling.BICUBIC}), photo(30, 30)
    ours = rand_augment_of(PUBLISHED, 3)
    assert ours is not None
    for word in WORDS[:100]:
        seed(word)
        expected = as_tensor(theirs(Image.fromarray(pixels)), 3)
        assert torch.equal(ours(torch.from_numpy(pixels).permute(2, 0, 1), word), expected)


def test_it_neither_draws_from_the_global_generators_nor_changes_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.arange(300, dtype=torch.uint8).reshape(3, 10, 10)
    pixels, numpys, torchs = image.clone(), np.random.get_state(), torch.random.get_rng_state()
    for name in ("random", "gauss", "choice"):  # beartype, of tests only, draws others
        monkeypatch.setattr(random, name, None)
    for word in WORDS[:50]:
        TimmRandAugment(9, deviation=0.5, increasing=True)(image, word, FILL)
    assert all(np.array_equal(now, then) for now, then in zip(np.random.get_state(), numpys, strict=True))
    assert torch.equal(torch.random.get_rng_state(), torchs)
    assert torch.equal(image, pixels)


@pytest.mark.parametrize("channels", [1, 3])
def test_no_strength_fails_with_any_version_of_pillow(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Posterizing to 0 bits is the strongest of the published recipe: about one image in 650."""
    monkeypatch.undo()
    image = torch.full((channels, 4, 4), 200, dtype=torch.uint8)
    black = 0
    for word in range(300):
        found = TimmRandAugment(10, 1, probability=1.0, increasing=True)(image, word, FILL[:channels])
        black += not found.any()
    assert black > 5


def test_a_text_gives_the_options_that_it_names_in_any_order() -> None:
    assert TimmRandAugment.parse("rand") == TimmRandAugment(10, 2, 0.5, 0.0, False)
    assert TimmRandAugment.parse(PUBLISHED) == TimmRandAugment(9, 2, 0.5, 0.5, True)
    assert TimmRandAugment.parse("rand-inc0-p0.25-n3-mstd2-m100") == TimmRandAugment(100, 3, 0.25, 2.0, False)


@pytest.mark.parametrize(
    "text",
    [
        "", "rand-", "rand9", "Rand-m9", "rand-m9.5", "rand-m-9", "rand-m9-m8", "rand-m101", "rand-n0", "rand-p1.5",
        "rand-inc2", "rand-mstd101", "rand-mstdinf", "rand-tweights", "rand-w0", "rand-mmax5", "rand-x1", "m9-rand",
        "rand-m9 ", "augmix-m3", "original", "rand-m٣",
    ],
)  # fmt: skip
def test_other_texts_are_none_of_it(text: str) -> None:
    assert TimmRandAugment.parse(text) is None
