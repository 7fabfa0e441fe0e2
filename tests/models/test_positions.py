import math

import pytest
import torch
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor

from mae.models.positions import sincos_positions

GRIDS = [(1, 1), (3, 3), (14, 14), (2, 5), (6, 1)]


def slow_positions(rows: int, columns: int, width: int) -> Tensor:
    """The formula, one number at a time."""
    quarter = width // 4
    table = [[0.0] * width]
    for row in range(rows):
        for column in range(columns):
            channels = []
            for place in (column, row):
                angles = [place * 10000 ** (-i / quarter) for i in range(quarter)]
                channels += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            table.append(channels)
    return torch.tensor([table])


@pytest.mark.parametrize("width", [4, 16, 24])
@pytest.mark.parametrize("grid", GRIDS)
def test_positions_follow_the_published_formula(grid: tuple[int, int], width: int) -> None:
    torch.testing.assert_close(sincos_positions(grid, width), slow_positions(*grid, width), rtol=0, atol=2e-6)


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
