import pytest
import torch

from data.jpegs import photo
from mae.data.images.rand_augment import NONE, name_of, rand_augment_of
from mae.data.images.rand_augment_torchvision import rand_augment
from mae.errors import UserError

IMAGE = torch.from_numpy(photo(20, 24)).permute(2, 0, 1)


def test_none_changes_nothing_and_torchvisions_has_its_own_name() -> None:
    assert rand_augment_of(NONE, 3) is None
    for magnitude in (0, 9, 30):
        change = rand_augment_of(f"torchvision-{magnitude}", 3, (0.1, 0.2, 0.3))
        assert change is not None
        for word in range(20):
            assert torch.equal(change(IMAGE, word), rand_augment(IMAGE, magnitude, word))


def test_the_values_of_earlier_versions_are_torchvisions_magnitudes() -> None:
    assert [name_of(value) for value in (0, 9, "0", "9", "30")] == [
        "none", "torchvision-9", "none", "torchvision-9", "torchvision-30",
    ]  # fmt: skip
    for other in ("none", "torchvision-9", "rand-m9", "-1", "٣", "9" * 5000, "9.0", 9.0, True, False, None, [9]):
        assert name_of(other) is other


@pytest.mark.parametrize(
    "name", ["", "None", "torchvision", "torchvision-31", "torchvision--1", "torchvision-٣", "timm", "rand-m9-tweights"]
)
def test_another_name_is_refused_in_one_line_with_the_allowed_forms(name: str) -> None:
    with pytest.raises(
        UserError, match=f"augment.rand_augment is {name}; allowed: none; torchvision-N .* rand-m9-"
    ) as e:
        rand_augment_of(name, 3)
    assert "\n" not in str(e.value)


def test_the_mean_of_the_data_fills_what_timms_moves_into_the_image() -> None:
    white = torch.full((3, 40, 40), 255, dtype=torch.uint8)
    change = rand_augment_of("rand-m10-n1-p1-inc1", 3, (0.2, 1.0, 0.0))
    assert change is not None
    found = [change(white, word).permute(1, 2, 0).numpy().reshape(-1, 3) for word in range(60)]
    filled = [pixels for pixels in found if (pixels == [51, 255, 0]).all(axis=1).any()]
    assert len(filled) > 10
