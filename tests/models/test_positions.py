import math

import pytest
import torch
from timm.layers import build_sincos2d_pos_embed, resample_abs_pos_embed
from torch import Tensor

from mae.models.positions import resample_positions, sincos_positions

GRIDS = [(1, 1), (3, 3), (14, 14), (2, 5), (6, 1)]


def slow_positions(rows: int, columns: int, width: int, temperature: float = 10_000) -> Tensor:
    """The formula, one number at a time."""
    quarter = width // 4
    table = [[0.0] * width]
    for row in range(rows):
        for column in range(columns):
            channels = []
            for place in (column, row):
                angles = [place * temperature ** (-i / quarter) for i in range(quarter)]
                channels += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            table.append(channels)
    return torch.tensor([table])


@pytest.mark.parametrize("width", [4, 16, 24])
@pytest.mark.parametrize("grid", GRIDS)
def test_positions_follow_the_published_formula(grid: tuple[int, int], width: int) -> None:
    torch.testing.assert_close(sincos_positions(grid, width), slow_positions(*grid, width), rtol=0, atol=2e-6)


@pytest.mark.parametrize("temperature", [1.5, 10.0, 100.0])
def test_the_temperature_sets_the_wavelengths(temperature: float) -> None:
    table = sincos_positions((4, 3), 16, temperature)
    torch.testing.assert_close(table, slow_positions(4, 3, 16, temperature), rtol=0, atol=2e-6)
    # The second patch is one column to the right of the first: its sines and cosines are those of the frequencies.
    angles = torch.atan2(table[0, 2, :4], table[0, 2, 4:8])
    torch.testing.assert_close(angles, torch.tensor([temperature ** (-i / 4) for i in range(4)]))


def test_the_default_temperature_is_the_published_one_to_the_bit() -> None:
    assert torch.equal(sincos_positions((4, 4), 64), sincos_positions((4, 4), 64, 10_000.0))
    assert not torch.equal(sincos_positions((4, 4), 64), sincos_positions((4, 4), 64, 10.0))


def test_a_low_temperature_tells_the_places_of_a_small_grid_apart_in_more_channels() -> None:
    varying = [int((sincos_positions((4, 4), 64, heat)[0, 1:].std(dim=0) > 0.1).sum()) for heat in (10_000.0, 10.0)]
    assert varying[0] < 48 < varying[1]


@pytest.mark.parametrize("grid", GRIDS)
def test_positions_are_timms_table_with_the_halves_swapped(grid: tuple[int, int]) -> None:
    timms = build_sincos2d_pos_embed(list(grid), dim=16, interleave_sin_cos=True)
    positions = sincos_positions(grid, 16)[0, 1:]
    assert torch.equal(positions[:, :8], timms[:, 8:])
    assert torch.equal(positions[:, 8:], timms[:, :8])


def test_a_step_to_the_right_changes_the_first_half_and_a_step_down_the_second() -> None:
    table = sincos_positions((2, 3), 16)[0, 1:].reshape(2, 3, 16)
    right, down = table[0, 1] - table[0, 0], table[1, 0] - table[0, 0]
    assert right[:8].abs().max() > 0.5
    assert not right[8:].any()
    assert down[8:].abs().max() > 0.5
    assert not down[:8].any()


@pytest.mark.parametrize("grid", GRIDS)
def test_the_cls_position_is_zero(grid: tuple[int, int]) -> None:
    positions = sincos_positions(grid, 8)
    assert positions.shape == (1, grid[0] * grid[1] + 1, 8)
    assert not positions[0, 0].any()


@pytest.mark.parametrize("grid", [(14, 14), (2, 30)])
def test_no_two_patches_share_a_position(grid: tuple[int, int]) -> None:
    distances = torch.cdist(sincos_positions(grid, 32)[0, 1:], sincos_positions(grid, 32)[0, 1:])
    assert distances.fill_diagonal_(torch.inf).min() > 0.5


@pytest.mark.parametrize(("old", "new"), [((2, 3), (4, 5)), ((4, 4), (2, 3)), ((1, 1), (3, 2)), ((14, 14), (16, 16))])
def test_a_table_is_resampled_as_timm_does_it(old: tuple[int, int], new: tuple[int, int]) -> None:
    table = torch.randn(1, old[0] * old[1] + 1, 8, generator=torch.Generator().manual_seed(0))
    expected = resample_abs_pos_embed(table, list(new), list(old), num_prefix_tokens=1)
    torch.testing.assert_close(resample_positions(table, old, new), expected)


def test_a_grid_of_as_many_patches_is_another_grid() -> None:
    """timm before 1.0.31 gives the table back as it is where the new grid is a square."""
    table = sincos_positions((2, 8), 16)
    resampled = resample_positions(table, (2, 8), (4, 4))
    assert resampled.shape == table.shape
    assert not torch.allclose(resampled, table, atol=0.1)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_same_grid_keeps_every_bit(grid: tuple[int, int]) -> None:
    table = sincos_positions(grid, 16)
    assert torch.equal(resample_positions(table, grid, grid), table)


def test_a_resampled_table_still_tells_rows_from_columns() -> None:
    """The cls token stays; a position halfway between two is nearer to both than they are to each other."""
    table = sincos_positions((4, 4), 32)
    table[:, 0] = 7.0
    resampled = resample_positions(table, (4, 4), (8, 8))
    assert (resampled[:, 0] == 7.0).all()
    grid = resampled[0, 1:].reshape(8, 8, 32)
    right, down = (grid[:, 1:] - grid[:, :-1]).abs().mean((0, 1)), (grid[1:] - grid[:-1]).abs().mean((0, 1))
    assert right[:16].sum() > 20 * right[16:].sum()
    assert down[16:].sum() > 20 * down[:16].sum()
