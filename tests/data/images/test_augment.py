import io
import math
import threading
from collections.abc import Sequence

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import ks_2samp
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as vision

from data.jpegs import encoded, photo, subsampled
from mae import keyed
from mae.data.images import augment
from mae.data.images.augment import (
    CROP_VERSION,
    FLIP,
    NUMBERS_PER_SAMPLE,
    AugmentSettings,
    TrainViews,
    crop_box,
    crop_boxes,
    eval_view,
    pixels_to_keep,
    resize,
)
from mae.data.images.decode import decode, decode_pixels
from mae.data.images.jpeg import Box
from mae.data.images.rand_augment import rand_augment_of
from mae.data.images.rand_augment_torchvision import rand_augment
from mae.errors import BadImageError, UserError
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


def train_views(
    image: bytes | np.ndarray,
    numbers: np.ndarray,
    settings: AugmentSettings,
    out: Tensor,
    words: Sequence[int] = (),
) -> None:
    """All the views of one image, with nothing else in the batch."""
    views = TrainViews(out, numbers, settings, words)
    views.add(image, range(len(out)))
    views.finish()


def view_of(
    image: Tensor, size: tuple[int, int], numbers: list[float], settings: AugmentSettings, word: int = 0
) -> Tensor:
    """One view of a decoded image [channels height width]."""
    out = torch.zeros(1, len(image), *size, dtype=torch.uint8)
    train_views(image.permute(1, 2, 0).numpy(), np.array([numbers]), settings, out, [word])
    return out[0]


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


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 500), st.integers(1, 500)), min_size=1, max_size=5),
    seed=st.integers(0, 10**6),
    scale=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    ratio=st.tuples(st.floats(0.2, 5), st.floats(0.2, 5)).map(sorted),
)
def test_many_crops_at_once_are_those_of_one_by_one(
    sizes: list[tuple[int, int]], seed: int, scale: list[float], ratio: list[float]
) -> None:
    augmentation = AugmentSettings(crop_scale=(scale[0], scale[1]), crop_ratio=(ratio[0], ratio[1]))
    numbers = numbers_of(len(sizes), seed)
    heights, widths = np.array(sizes).T
    found = crop_boxes(heights, widths, np.array(numbers), augmentation)
    assert found.dtype == np.int64
    expected = [crop_box(*size, row, augmentation) for size, row in zip(sizes, numbers, strict=True)]
    assert [Box(*row) for row in found.tolist()] == expected


# Images up to 64 KiB wait for others, larger ones do not.
SMALL_AND_LARGE = pytest.mark.parametrize("image_size", [(40, 30), (210, 330)])


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
@pytest.mark.parametrize("size", [(16, 16), (8, 24), (40, 30)])
@SMALL_AND_LARGE
def test_a_training_view_equals_torchvisions_resized_crop_of_the_same_box(
    channels: int, size: tuple[int, int], image_size: tuple[int, int]
) -> None:
    image, augmentation = image_of(*image_size, channels), AugmentSettings(flip=False)
    for numbers in numbers_of(10):
        box = crop_box(*image_size, numbers, augmentation)
        expected = vision.resized_crop(image, *box, list(size), interpolation=BICUBIC, antialias=True)
        assert torch.equal(view_of(image, size, numbers, augmentation), expected)


@SMALL_AND_LARGE
def test_a_training_view_is_the_same_each_time_and_differs_from_sample_to_sample(image_size: tuple[int, int]) -> None:
    image, augmentation = image_of(*image_size), AugmentSettings()
    views = [view_of(image, (16, 16), numbers, augmentation) for numbers in numbers_of(5)]
    torch.manual_seed(1)
    again = [view_of(image, (16, 16), numbers, augmentation) for numbers in numbers_of(5)]
    assert all(torch.equal(a, b) for a, b in zip(views, again, strict=True))
    assert len({tuple(view.flatten().tolist()) for view in views}) == 5


@SMALL_AND_LARGE
def test_the_flip_number_mirrors_half_of_the_views_unless_turned_off(image_size: tuple[int, int]) -> None:
    image = image_of(*image_size)
    mirrored = 0
    for numbers in numbers_of(200):
        plain = view_of(image, (8, 8), numbers, AugmentSettings(flip=False))
        view = view_of(image, (8, 8), numbers, AugmentSettings())
        assert torch.equal(view, plain.flip(-1) if numbers[FLIP] < 0.5 else plain)
        mirrored += numbers[FLIP] < 0.5
    assert 75 < mirrored < 125


# Two views each of three samples: top, left, height and width of the crop, and whether the view is mirrored. The first
# image fits most tries, the second few, the third none.
GOLDEN = {
    1: [
        (9, 60, 129, 115, False),
        (44, 79, 106, 107, False),
        (7, 24, 53, 65, True),
        (0, 88, 60, 60, True),
        (0, 94, 9, 12, True),
        (0, 94, 9, 12, True),
    ]
}


def test_crops_and_flips_change_only_with_their_version() -> None:
    """A resumed run must cut what the run before it would have cut: a change needs a new CROP_VERSION and line here."""
    numbers = keyed.uniform(keyed.key(Purpose.CROP, 5, 2), np.array([0, 7, 10**9]), 2 * NUMBERS_PER_SAMPLE)
    rising = torch.arange(200, dtype=torch.uint8).expand(1, 150, 200)
    found = []
    for height, row in zip((150, 60, 9), numbers.reshape(3, 2, -1).tolist(), strict=True):
        image = rising[:, :height]
        for of_view in row:
            view = view_of(image, (8, 8), of_view, AugmentSettings())
            found.append(
                (*crop_box(*image.shape[1:], of_view, AugmentSettings()), bool(view[0, 0, 0] > view[0, 0, -1]))
            )
    assert found == GOLDEN[CROP_VERSION]


@SMALL_AND_LARGE
def test_rand_augment_changes_each_view_by_its_own_word(image_size: tuple[int, int]) -> None:
    image, numbers = image_of(*image_size), numbers_of(1)[0]
    plain = view_of(image, (32, 32), numbers, AugmentSettings())
    for word in (5, 2**64 - 1, 6, 7):
        view = view_of(image, (32, 32), numbers, AugmentSettings(rand_augment="torchvision-9"), word)
        assert torch.equal(view, rand_augment(plain, 9, word))


def test_the_mean_of_the_data_fills_what_timms_rand_augment_moves_into_a_view() -> None:
    image, numbers, name = image_of(40, 40), np.array(numbers_of(30)), "rand-m9-p1-inc1"
    for mean in ((0.1, 0.2, 0.3), None):
        plain, found = (torch.zeros(30, 3, 16, 16, dtype=torch.uint8) for _ in range(2))
        train_views(image.permute(1, 2, 0).numpy(), numbers, AugmentSettings(), plain)
        views = TrainViews(found, numbers, AugmentSettings(rand_augment=name), range(30), mean=mean)
        views.add(image.permute(1, 2, 0).numpy(), range(30))
        views.finish()
        change = rand_augment_of(name, 3, mean)
        assert change is not None
        assert torch.equal(found, torch.stack([change(view, word) for word, view in enumerate(plain)]))


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(buffer, "PNG")
    return buffer.getvalue()


def mixture() -> list[bytes]:
    """Images of all sorts: large and small, of equal and of different sizes, some of them too large to keep."""
    small = [png(photo(28, 28)[:, :, :1]), png(photo(28, 28)), png(photo(31, 20)), png(photo(3, 90))]
    large = [png(photo(160, 150)), encoded(photo(120, 200)), subsampled(photo(300, 420), "420")]
    return [*small, encoded(photo(40, 30)), *large, subsampled(photo(64, 64), "Gray"), png(photo(28, 28))] * 2


ALL_OF_IT = AugmentSettings(rand_augment="torchvision-9")


def batch_of(
    images: Sequence[bytes | np.ndarray], rows: Sequence[int], numbers: np.ndarray, channels: int = 3
) -> Tensor:
    """Image n makes row n of the batch; they are added in the order of `rows`."""
    out = torch.zeros(len(images), 24, 20, channels, dtype=torch.uint8).permute(0, 3, 1, 2)
    views = TrainViews(out, numbers, ALL_OF_IT, list(range(len(images))))
    for row in rows:
        views.add(images[row], [row])
    views.finish()
    return out


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("most_together", [1, 3, 512])
def test_o10_a_view_does_not_depend_on_what_else_is_in_the_batch(
    channels: int, most_together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(augment, "_MAX_TOGETHER", most_together)
    images, numbers = mixture(), np.array(numbers_of(20))
    whole = batch_of(images, range(20), numbers, channels)
    assert torch.equal(batch_of(images, [*range(19, -1, -1)], numbers, channels), whole)
    for row in range(20):
        alone = torch.zeros(1, channels, 24, 20, dtype=torch.uint8)
        train_views(images[row], numbers[row : row + 1], ALL_OF_IT, alone, [row])
        assert torch.equal(alone[0], whole[row])


@pytest.mark.parametrize("channels", [1, 3])
def test_o10_images_that_are_kept_decoded_give_the_same_views(channels: int) -> None:
    images, numbers = mixture(), np.array(numbers_of(20))
    kept = [pixels_to_keep(data, channels, (24, 20)) for data in images]
    assert [pixels is None for pixels in kept[:10]] == [False] * 5 + [False, True, True, False, False]
    mixed = [data if pixels is None else pixels for data, pixels in zip(images, kept, strict=True)]
    expected = batch_of(images, range(20), numbers, channels)
    assert torch.equal(batch_of(mixed, range(20), numbers, channels), expected)


def test_o10_threads_that_share_a_batch_change_nothing() -> None:
    images, numbers = mixture(), np.array(numbers_of(20))
    expected = batch_of(images, range(20), numbers)
    out = torch.zeros_like(expected)

    def make(part: slice) -> None:
        for _ in range(10):
            views = TrainViews(out[part], numbers[part], ALL_OF_IT, list(range(20))[part])
            for row, image in enumerate(images[part]):
                views.add(image, [row])
            views.finish()

    threads = [threading.Thread(target=make, args=(slice(start, start + 5),)) for start in range(0, 20, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(out, expected)


def test_the_order_of_a_batch_in_memory_changes_no_pixel() -> None:
    images, numbers = mixture(), np.array(numbers_of(20))
    expected = batch_of(images, range(20), numbers)
    wide = torch.zeros(20, 3, 48, 25, dtype=torch.uint8)
    for out in (torch.zeros(20, 3, 24, 20, dtype=torch.uint8), wide[:, :, ::2, :20]):
        views = TrainViews(out, numbers, ALL_OF_IT, list(range(20)))
        for row, image in enumerate(images):
            views.add(image, [row])
        views.finish()
        assert torch.equal(out, expected)
    assert wide[:, :, 1::2].max() == 0
    assert wide[:, :, :, 20:].max() == 0


@pytest.mark.parametrize("image", [photo(40, 30), photo(160, 150), encoded(photo(40, 30)), encoded(photo(160, 150))])
def test_several_views_of_an_image_are_cut_each_by_its_own_numbers(image: bytes | np.ndarray) -> None:
    numbers = np.array(numbers_of(3))
    out = torch.zeros(3, 3, 64, 64, dtype=torch.uint8)
    train_views(image, numbers, ALL_OF_IT, out, [7, 8, 9])
    for view in range(3):
        alone = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
        train_views(image, numbers[view : view + 1], ALL_OF_IT, alone, [7 + view])
        assert torch.equal(out[view], alone[0])


def test_s01_a_bad_image_leaves_its_rows_as_they_were_and_disturbs_no_other() -> None:
    good, numbers = mixture(), np.array(numbers_of(20))
    expected = batch_of(good, range(20), numbers)
    out = torch.full_like(expected, 7)
    views = TrainViews(out, numbers, ALL_OF_IT, list(range(20)))
    for row, image in enumerate(good):
        for bad in (image[: len(image) // 2], b""):
            with pytest.raises(BadImageError):
                views.add(bad, [row])
        if row != 3:
            views.add(image, [row])
    views.finish()
    assert out[3].unique().tolist() == [7]
    others = [row for row in range(20) if row != 3]
    assert torch.equal(out[others], expected[others])


WHOLE = AugmentSettings(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=False)


@pytest.mark.parametrize(("side", "scale"), [(16, 1), (47, 1), (48, 2), (95, 2), (96, 4), (191, 4), (192, 8), (400, 8)])
def test_a_jpeg_of_three_times_the_size_of_a_view_is_reduced_while_it_is_decoded(side: int, scale: int) -> None:
    data = encoded(photo(side, side), subsampling=0)
    out = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    train_views(data, np.array(numbers_of(1)), WHOLE, out)
    reduced = simplejpeg.decode_jpeg(data, min_height=-(-side // scale), min_width=-(-side // scale), min_factor=scale)
    whole = reduced[: side // scale, : side // scale] if scale > 1 else decode_pixels(data, 3)
    assert torch.equal(out[0], resize(torch.from_numpy(whole).permute(2, 0, 1), (16, 16)))
    assert (pixels_to_keep(data, 3, (16, 16)) is None) == (scale > 1)


def test_a_reduced_view_is_close_to_that_of_the_whole_image() -> None:
    data = encoded(photo(400, 300))
    pixels, numbers, augmentation = decode(data, 3), numbers_of(20), AugmentSettings(flip=False)
    for row in numbers:
        box = crop_box(400, 300, row, augmentation)
        out = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
        train_views(data, np.array([row]), augmentation, out)
        scale = max(s for s in (1, 2, 4, 8) if min(box.height, box.width) >= 48 * s or s == 1)
        top, left, height, width = (side // scale * scale for side in box)
        exact = resize(pixels[:, top : top + height, left : left + width], (32, 32))
        error = (out[0].double() - exact.double()).square().mean().item()
        assert error < 255**2 / 10**3.8  # 38 dB, and this is half noise; of photos it is 50


@pytest.mark.parametrize("orientation", range(2, 9))
def test_s10_crops_lie_in_the_upright_image(orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    data, numbers = encoded(photo(150, 200), exif=exif), np.array(numbers_of(2))
    out, upright = torch.zeros(2, 3, 64, 64, dtype=torch.uint8), torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    train_views(data, numbers, AugmentSettings(), out)
    train_views(decode_pixels(data, 3), numbers, AugmentSettings(), upright)
    assert torch.equal(out, upright)
    assert torch.equal(decode(data, 3), torch.from_numpy(decode_pixels(data, 3).copy()).permute(2, 0, 1))


@pytest.mark.parametrize("image_size", [(1, 1), (1, 10_000), (10_000, 1), (2, 2000)])
def test_s11_the_narrowest_images_have_views(image_size: tuple[int, int]) -> None:
    for data in (png(np.full((*image_size, 3), 200, np.uint8)), encoded(np.full((*image_size, 3), 200, np.uint8))):
        out = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
        train_views(data, np.array(numbers_of(2)), AugmentSettings(), out)
        assert (out.int() - 200).abs().max() <= 2


@pytest.mark.parametrize(
    ("image_size", "size", "crop_pct", "resized"),
    [
        ((320, 400), (224, 224), 0.875, 256),
        ((512, 256), (224, 224), 0.875, 256),
        ((60, 90), (48, 48), 0.8, 60),
        ((64, 64), (32, 32), 1.0, 32),
        ((20, 40), (48, 48), 1.0, 48),
        ((49, 98), (224, 224), 1.0, 224),
        ((480, 720), (128, 128), 0.875, 146),
        ((309, 206), (224, 224), 1.0, 224),
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
        ("rand_augment", ["-1", "31", "torchvision-31", "rand-m9-mmax5", "autoaugment", ""]),
        ("erase", [-0.1, 1.1, math.nan]),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(UserError, match=rf"augment\.{name} is .*; allowed: "):
            AugmentSettings(**{name: value})


def test_settings_at_the_edge_of_their_range_are_taken() -> None:
    AugmentSettings(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), rand_augment="torchvision-30", erase=1.0)


def test_rand_augment_has_one_name_however_it_is_written() -> None:
    assert AugmentSettings(rand_augment="9") == AugmentSettings(rand_augment="torchvision-9")
    assert AugmentSettings(rand_augment="0") == AugmentSettings()
