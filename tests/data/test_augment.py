import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as vision

from mae import keyed
from mae.data.augment import (
    NUMBERS_PER_SAMPLE,
    AugmentSettings,
    Box,
    crop_box,
    eval_view,
    resize,
    seed_augmentation,
    train_view,
)
from mae.errors import UserError
from mae.keyed import Purpose

BICUBIC = v2.InterpolationMode.BICUBIC


def numbers_of(count: int, seed: int = 0) -> list[list[float]]:
    """The uniform numbers of `count` samples."""
    drawn: list[list[float]] = keyed.uniform(
        keyed.key(Purpose.CROP, seed), np.arange(count), NUMBERS_PER_SAMPLE
    ).tolist()
    return drawn


def image_of(height: int, width: int, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=generator)


def measures(boxes: Sequence[Box], height: int, width: int) -> dict[str, list[float]]:
    """What describes a crop: its share of the area, its shape and its place in the room it has."""
    return {
        "area": [b.height * b.width / (height * width) for b in boxes],
        "log ratio": [math.log(b.width / b.height) for b in boxes],
        "top": [b.top / (height - b.height + 1) for b in boxes],
        "left": [b.left / (width - b.width + 1) for b in boxes],
    }


@pytest.mark.parametrize(
    ("height", "width", "scale"), [(300, 400, (0.2, 1.0)), (97, 97, (0.08, 1.0)), (400, 150, (0.2, 0.6))]
)
def test_crops_are_distributed_as_those_of_torchvision(height: int, width: int, scale: tuple[float, float]) -> None:
    augmentation = AugmentSettings(crop_scale=scale)
    ours = [crop_box(height, width, numbers, augmentation) for numbers in numbers_of(1000)]
    torch.manual_seed(0)
    transform = v2.RandomResizedCrop(8, scale=scale, ratio=augmentation.crop_ratio)
    image = image_of(height, width)
    drawn = [transform.make_params([image]) for _ in range(1000)]
    theirs = [Box(d["top"], d["left"], d["height"], d["width"]) for d in drawn]
    for name, values in measures(ours, height, width).items():
        assert ks_2samp(values, measures(theirs, height, width)[name]).pvalue > 0.001, name


@settings(max_examples=200, deadline=None)
@given(
    height=st.integers(1, 500),
    width=st.integers(1, 500),
    number=st.integers(0, 10**6),
    scale=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    ratio=st.tuples(st.floats(0.2, 5), st.floats(0.2, 5)).map(sorted),
)
def test_crops_lie_inside_the_image_and_keep_the_ratio(
    height: int, width: int, number: int, scale: list[float], ratio: list[float]
) -> None:
    augmentation = AugmentSettings(crop_scale=(scale[0], scale[1]), crop_ratio=(ratio[0], ratio[1]))
    numbers = keyed.uniform(keyed.key(Purpose.CROP), np.array([number]), NUMBERS_PER_SAMPLE)[0].tolist()
    box = crop_box(height, width, numbers, augmentation)
    assert 0 <= box.top <= height - box.height
    assert 0 <= box.left <= width - box.width
    assert box.height >= 1
    assert box.width >= 1
    # rounding moves each side by at most half a pixel; a side of one pixel is the least there is
    assert (box.width - 0.5) / (box.height + 0.5) <= ratio[1] or box.width == 1
    assert (box.width + 0.5) / (box.height - 0.5) >= ratio[0] or box.height == 1


def test_where_every_crop_fits_each_covers_the_share_asked_for() -> None:
    augmentation = AugmentSettings(crop_scale=(0.2, 0.5))
    shares = measures([crop_box(200, 200, numbers, augmentation) for numbers in numbers_of(500)], 200, 200)["area"]
    assert 0.195 < min(shares) < 0.21  # rounding to whole pixels moves a share by 1 % of itself
    assert 0.49 < max(shares) < 0.505


@pytest.mark.parametrize(
    ("height", "width"), [(10, 300), (300, 10), (1, 50), (50, 1), (100, 137), (137, 100), (23, 33), (11, 31)]
)
def test_where_no_crop_fits_it_is_the_largest_centred_one_as_in_torchvision(height: int, width: int) -> None:
    """With the whole area asked for, no ratio from 3/4 to 4/3 fits a longer image."""
    augmentation = AugmentSettings(crop_scale=(1.0, 1.0))
    transform = v2.RandomResizedCrop(8, scale=(1.0, 1.0), ratio=augmentation.crop_ratio)
    drawn = transform.make_params([image_of(height, width)])
    expected = Box(drawn["top"], drawn["left"], drawn["height"], drawn["width"])
    assert {crop_box(height, width, numbers, augmentation) for numbers in numbers_of(20)} == {expected}


def test_the_whole_image_is_one_possible_crop() -> None:
    augmentation = AugmentSettings(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    assert crop_box(20, 20, numbers_of(1)[0], augmentation) == Box(0, 0, 20, 20)


def test_the_greatest_numbers_stay_inside() -> None:
    """Just below 1.0, a place times the room left must not round up to the room itself."""
    for side in range(1, 300):
        box = crop_box(side, side, [0.0, 0.5] * 10 + [1 - 2**-53] * 3, AugmentSettings())
        assert (box.top, box.left) == (side - box.height, side - box.width)


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_a_training_view_equals_torchvisions_resized_crop_of_the_same_box(channels: int, size: tuple[int, int]) -> None:
    image, augmentation = image_of(40, 30, channels), AugmentSettings(flip=False)
    for numbers in numbers_of(10):
        box = crop_box(40, 30, numbers, augmentation)
        expected = vision.resized_crop(image, *box, list(size), interpolation=BICUBIC, antialias=True)
        assert torch.equal(train_view(image, size, numbers, augmentation), expected)


def test_a_training_view_is_the_same_each_time_and_differs_from_sample_to_sample() -> None:
    image, augmentation = image_of(40, 30), AugmentSettings()
    views = [train_view(image, (16, 16), numbers, augmentation) for numbers in numbers_of(5)]
    torch.manual_seed(1)
    again = [train_view(image, (16, 16), numbers, augmentation) for numbers in numbers_of(5)]
    assert all(torch.equal(a, b) for a, b in zip(views, again, strict=True))
    assert len({tuple(view.flatten().tolist()) for view in views}) == 5


def test_the_last_number_mirrors_half_of_the_views_unless_turned_off() -> None:
    image = image_of(16, 16)
    mirrored = 0
    for numbers in numbers_of(400):
        plain = train_view(image, (8, 8), numbers, AugmentSettings(flip=False))
        view = train_view(image, (8, 8), numbers, AugmentSettings())
        assert torch.equal(view, plain.flip(-1) if numbers[-1] < 0.5 else plain)
        mirrored += numbers[-1] < 0.5
    assert 160 < mirrored < 240


def test_rand_augment_is_a_function_of_the_word_it_is_seeded_with() -> None:
    image, augmentation, numbers = image_of(32, 32), AugmentSettings(rand_augment=9), numbers_of(1)[0]
    views = []
    for word in [5, 2**64 - 1, 6, 7, 8, 5]:
        seed_augmentation(word)
        views.append(train_view(image, (32, 32), numbers, augmentation))
    assert torch.equal(views[0], views[-1])
    assert len({tuple(view.flatten().tolist()) for view in views}) > 1
    plain = train_view(image, (32, 32), numbers, AugmentSettings())
    assert any(not torch.equal(view, plain) for view in views)


@pytest.mark.parametrize(
    ("image_size", "size", "crop_pct", "resized"),
    [
        ((320, 400), (224, 224), 0.875, 256),
        ((512, 256), (224, 224), 0.875, 256),
        ((60, 90), (48, 48), 0.8, 60),
        ((64, 64), (32, 32), 1.0, 32),
        ((20, 40), (48, 48), 1.0, 48),
    ],
)
def test_a_square_evaluation_view_equals_torchvisions_resize_and_centre_crop(
    image_size: tuple[int, int], size: tuple[int, int], crop_pct: float, resized: int
) -> None:
    image = image_of(*image_size)
    torchvision_view = v2.Compose([v2.Resize(resized, interpolation=BICUBIC, antialias=True), v2.CenterCrop(size)])
    assert torch.equal(eval_view(image, size, crop_pct), torchvision_view(image))


@pytest.mark.parametrize(
    ("image_size", "resized"),
    [((100, 50), (80, 40)), ((50, 100), (48, 96)), ((96, 80), (48, 40)), ((10, 5), (80, 40))],
)
def test_a_rectangular_evaluation_view_covers_the_crop_and_cuts_its_centre(
    image_size: tuple[int, int], resized: tuple[int, int]
) -> None:
    """For (24, 20) of half the side, the image must just cover (48, 40)."""
    image = image_of(*image_size)
    whole = vision.resize(image, list(resized), interpolation=BICUBIC, antialias=True)
    assert torch.equal(eval_view(image, (24, 20), 0.5), vision.center_crop(whole, [24, 20]))


@settings(max_examples=100, deadline=None)
@given(
    image_size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    crop_pct=st.floats(0.3, 1.0),
)
def test_an_evaluation_view_is_never_padded(
    image_size: tuple[int, int], size: tuple[int, int], crop_pct: float
) -> None:
    view = eval_view(torch.full((1, *image_size), 255, dtype=torch.uint8), size, crop_pct)
    assert view.shape == (1, *size)
    assert view.min() == 255


def test_an_image_of_the_right_size_is_left_as_it_is() -> None:
    image = image_of(16, 12)
    assert torch.equal(eval_view(image, (16, 12), 1.0), image)
    assert resize(image, (16, 12)) is image


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("crop_scale", [(0.0, 1.0), (-0.1, 1.0), (0.5, 0.2), (0.2, 1.1), (math.nan, 1.0), (0.2, math.nan)]),
        ("crop_ratio", [(0.0, 1.0), (2.0, 1.0), (-1.0, 1.0), (1.0, math.inf), (math.nan, 1.0)]),
        ("rand_augment", [-1, 31]),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(UserError, match=rf"augment\.{name} is .*; allowed: "):
            AugmentSettings(**{name: value})


def test_settings_at_the_edge_of_their_range_are_taken() -> None:
    AugmentSettings(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), rand_augment=30)
