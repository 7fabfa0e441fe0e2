import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mae.models.patches import grid_size, patchify, unpatchify

GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 4))
PATCHES = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=40, deadline=None)
@given(batch=st.integers(1, 3), channels=st.integers(1, 5), grid=GRIDS, patch=PATCHES)
def test_unpatchify_inverts_patchify(batch: int, channels: int, grid: tuple[int, int], patch: tuple[int, int]) -> None:
    shape = batch, channels, grid[0] * patch[0], grid[1] * patch[1]
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    patches = patchify(images, patch)
    assert patches.shape == (batch, grid[0] * grid[1], patch[0] * patch[1] * channels)
    assert torch.equal(unpatchify(patches, grid, patch), images)


@settings(max_examples=20, deadline=None)
@given(channels=st.integers(1, 5), grid=GRIDS, patch=PATCHES)
def test_patches_run_row_by_row_and_pixels_row_column_channel(
    channels: int, grid: tuple[int, int], patch: tuple[int, int]
) -> None:
    height, width = grid[0] * patch[0], grid[1] * patch[1]
    image = torch.arange(channels * height * width, dtype=torch.float32).reshape(1, channels, height, width)
    expected = [
        [
            image[0, channel, row * patch[0] + down, column * patch[1] + across].item()
            for down in range(patch[0])
            for across in range(patch[1])
            for channel in range(channels)
        ]
        for row in range(grid[0])
        for column in range(grid[1])
    ]
    assert patchify(image, patch)[0].tolist() == expected


def test_patches_of_a_drawn_out_example() -> None:
    image = torch.tensor([[[[1.0, 2, 3, 4], [5, 6, 7, 8]]]])
    assert patchify(image, (1, 2))[0].tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert patchify(image, (2, 1))[0].tolist() == [[1, 5], [2, 6], [3, 7], [4, 8]]


def test_the_grid_is_rows_and_columns() -> None:
    assert grid_size((8, 12), (4, 2)) == (2, 6)
