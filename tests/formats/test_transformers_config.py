"""What the config of a transformers folder says about the preparation of images."""

import math
from pathlib import Path
from typing import Any

import pytest

from mae.formats.facts import Facts
from mae.formats.transformers_config import share_of_resized, transformers_facts

SIDES = range(32, 513)


def facts(**processor: Any) -> Facts:
    known = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    return transformers_facts({"model_type": "vit", "image_size": 96}, known | processor, Path("config.json"))


def test_the_share_of_a_crop_gives_the_resized_side_again() -> None:
    wrong = [
        (side, resized)
        for side in SIDES
        for resized in SIDES
        if resized >= side and math.floor(side / share_of_resized(side, resized)) != resized
    ]
    assert wrong == []
    assert share_of_resized(224, 256) == 0.875
    assert share_of_resized(224, 200) == 1


@pytest.mark.parametrize("size", [{"shortest_edge": 118}, {"height": 118, "width": 118}, 118])
def test_a_crop_is_a_share_of_the_resized_side(size: object) -> None:
    found = facts(size=size, do_center_crop=True)
    assert found.crop_pct is not None
    assert math.floor(96 / found.crop_pct) == 118
    assert bool(found.remarks) == (size != {"shortest_edge": 118})


def test_without_a_resize_nothing_says_how_images_are_cropped() -> None:
    assert facts(do_resize=False, do_center_crop=False).crop_pct is None
    assert facts(do_resize=False, do_center_crop=False).remarks == ()
    assert facts(size={"height": 96, "width": 96}).crop_pct == 1


def test_mean_and_std_of_images_that_are_not_divided_by_255_are_not_taken() -> None:
    assert facts(do_rescale=True).mean == (0.5,) * 3
    assert facts(do_rescale=False).mean is None
