import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from mae.data.images.erasing import erase, erased_box
from mae.data.images.jpeg import Box
from mae.keyed import Purpose, bits, key

WORDS = [0, 1, 2**63, 2**64 - 1, *bits(key(Purpose.ERASE), np.arange(1), 500)[0].tolist()]


@pytest.fixture(autouse=True)
def _own_generators() -> Iterator[None]:
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(state)


def theirs(images: Tensor, words: list[int], probability: float) -> Tensor:
    transform, found = RandomErasing(probability, mode="pixel", max_count=1, device="cpu"), images.clone()
    for image, word in zip(found, words, strict=True):
        random.seed(word)
        torch.manual_seed(word)
        transform(image)
    return found


@pytest.mark.parametrize("probability", [0.25, 1.0])
@pytest.mark.parametrize("shape", [(3, 32, 40), (1, 28, 28), (4, 90, 12), (3, 2, 2), (3, 1, 1)])
def test_it_is_timms_under_the_same_seeds(shape: tuple[int, int, int], probability: float) -> None:
    images = torch.randn(len(WORDS), *shape, generator=torch.Generator().manual_seed(0))
    expected = theirs(images, WORDS, probability)
    found = erase(images.clone(), WORDS, probability)
    assert torch.equal(found, expected)
    changed = (found != images).flatten(1).any(dim=1).float().mean().item()
    if min(shape[1:]) > 2:
        assert abs(changed - probability) < 0.06


def test_the_boxes_have_the_published_sizes_and_fit() -> None:
    boxes = [box for word in WORDS if (box := erased_box(200, 300, word, 1.0)) is not None]
    assert len(boxes) > 0.95 * len(WORDS)
    areas = [box.height * box.width / 60_000 for box in boxes]
    assert 0.019 < min(areas) < 0.03
    assert 0.3 < max(areas) < 0.34
    ratios = [box.height / box.width for box in boxes]
    assert 0.28 < min(ratios) < 0.4
    assert 2.5 < max(ratios) < 3.5
    assert all(0 <= box.top <= 200 - box.height and 0 <= box.left <= 300 - box.width for box in boxes)


def test_an_image_has_its_own_box_and_noise_whatever_is_beside_it() -> None:
    images = torch.zeros(8, 3, 16, 16)
    together = erase(images.clone(), WORDS[:8], 1.0)
    for row in range(8):
        assert torch.equal(erase(images[row : row + 1].clone(), WORDS[row : row + 1], 1.0)[0], together[row])
    assert len({tuple(image.flatten().tolist()) for image in together}) == 8


def test_without_words_or_probability_nothing_is_erased() -> None:
    images = torch.ones(3, 1, 8, 8)
    assert torch.equal(erase(images.clone(), [], 1.0), images)
    assert torch.equal(erase(images.clone(), WORDS[1:4], 0.0), images)
    with pytest.raises(ValueError, match="shorter"):
        erase(images, WORDS[:2], 1.0)


def test_it_does_not_draw_from_the_global_generators(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.random.get_rng_state()
    for name in ("random", "uniform", "randint"):  # beartype, of tests only, draws others
        monkeypatch.setattr(random, name, None)
    erase(torch.zeros(20, 3, 16, 16), WORDS[:20], 1.0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_box_of_a_word_is_pinned() -> None:
    """Runs are resumed by later versions: a word must keep its box."""
    boxes = [Box(33, 65, 103, 125), Box(16, 30, 164, 87), Box(21, 5, 74, 215)]
    assert [erased_box(224, 224, word, 1.0) for word in range(3)] == boxes
