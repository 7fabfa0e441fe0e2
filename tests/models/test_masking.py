import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mae.models.masking import kept_patches, random_mask


def noise_of(batch: int, patches: int) -> torch.Tensor:
    return torch.rand(batch, patches, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("patches", "mask_ratio", "kept"),
    [(196, 0.75, 49), (196, 0.6, 78), (16, 0.75, 4), (9, 0.75, 2), (9, 0.5, 4), (256, 0.9, 25), (3, 0.75, 0)],
)
def test_the_kept_share_is_rounded_down(patches: int, mask_ratio: float, kept: int) -> None:
    assert kept_patches(patches, mask_ratio) == kept
    mask = random_mask(noise_of(5, patches), mask_ratio)
    assert mask.ids_keep.shape == (5, kept)
    assert mask.hidden.sum(dim=1).tolist() == [patches - kept] * 5


def test_the_kept_share_keeps_the_published_rounding_of_floats() -> None:
    # In floating point 10 * (1 - 0.9) is a little below 1; the published code, too, keeps none.
    assert kept_patches(10, 0.9) == 0


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(1, 4), patches=st.integers(2, 30), mask_ratio=st.floats(0.05, 0.95))
def test_each_patch_is_kept_or_hidden_and_kept_once(batch: int, patches: int, mask_ratio: float) -> None:
    ids_keep, hidden = random_mask(noise_of(batch, patches), mask_ratio)
    for kept, unseen in zip(ids_keep.tolist(), hidden.tolist(), strict=True):
        assert len(set(kept)) == len(kept)
        assert set(kept) | {i for i in range(patches) if unseen[i]} == set(range(patches))
        assert not any(unseen[i] for i in kept)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=2, max_size=60))
def test_the_smallest_noise_is_kept_and_ties_keep_the_earlier_patch(noise: list[float]) -> None:
    by_noise_then_place = sorted(range(len(noise)), key=lambda place: (noise[place], place))
    mask = random_mask(torch.tensor([noise]), 0.5)
    assert mask.ids_keep[0].tolist() == by_noise_then_place[: len(noise) // 2]


def test_kept_noise_is_below_hidden_noise() -> None:
    noise = noise_of(8, 49)
    ids_keep, hidden = random_mask(noise, 0.75)
    assert (noise.gather(1, ids_keep).amax(dim=1) < noise.where(hidden, torch.inf).amin(dim=1)).all()


def test_images_of_a_batch_are_masked_each_in_its_own_way() -> None:
    assert len({tuple(row) for row in random_mask(noise_of(8, 49), 0.75).hidden.tolist()}) == 8
