"""Each image is in one part and one batch, whoever computes it; bad images have a reason."""

from pathlib import Path

import pytest
import torch
from conftest import png

import mae
from mae.errors import UserError
from mae.inference.image_set import ImageSet
from mae.inference.model import BATCH
from mae.inference.parts import compute_parts, part_ranges


class Pictures(ImageSet):
    """Random pictures; every seventh is damaged, every eleventh cannot be read."""

    fingerprint = "pictures"

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def name(self, number: int) -> str:
        return f"{number}.png"

    def label(self, number: int) -> int | None:
        return None

    def read(self, number: int) -> bytes:
        if number % 11 == 1:
            raise UserError("it has gone")
        return b"damaged" if number % 7 == 2 else png(number, (9, 13), "RGB")


@pytest.mark.parametrize("images", [0, 1, BATCH, BATCH + 1, 2 * BATCH + 5, 5000, 70_000, 10**6])
def test_parts_cover_all_images_in_whole_batches(images: int) -> None:
    parts = part_ranges(images)
    assert [number for part in parts for number in part] == list(range(images))
    assert all(len(part) % BATCH == 0 and len(part) <= 1024 for part in parts[:-1])
    assert len(parts) >= min(32, images // BATCH) or len(parts) >= 16


@pytest.mark.parametrize("workers", [0, 2])
def test_the_results_do_not_depend_on_which_parts_are_computed(pretrained: Path, workers: int) -> None:
    model = mae.load(pretrained, "cpu")
    images = Pictures(2 * BATCH + 5)
    parts = part_ranges(len(images))
    assert len(parts) == 3
    everything = list(compute_parts(images, parts, model.description, model.features_of, workers))
    assert [part.numbers for part in everything] == parts
    (second,) = compute_parts(images, parts[1:2], model.description, model.features_of, workers)
    assert torch.equal(second.results, everything[1].results)
    assert second.reasons == everything[1].reasons
    reasons = {number: text for part in everything for number, text in part.reasons.items()}
    for number in range(len(images)):
        if number % 11 == 1:
            assert reasons[number] == "it has gone"
        elif number % 7 == 2:
            assert "not a valid image" in reasons[number]
        else:
            assert number not in reasons
    good = [number for number in range(BATCH) if number not in reasons]
    single = torch.cat([model.features_of(model.view(images.read(number))[None]) for number in good])
    torch.testing.assert_close(everything[0].results[good], single, rtol=1e-4, atol=1e-5)
    assert not list(compute_parts(images, [], model.description, model.features_of, workers))
