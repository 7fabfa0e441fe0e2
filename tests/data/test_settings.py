"""Data settings out of range are refused by name."""

from typing import Any

import pytest

from mae.data.settings import DataSettings
from mae.errors import UserError


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("data.workers", {"workers": -1}),
        ("data.image_size", {"image_size": ()}),
        ("data.image_size", {"image_size": (1, 2, 3)}),
        ("data.image_size", {"image_size": (0,)}),
        ("data.channels", {"channels": 0}),
        ("data.threads", {"threads": 0}),
        ("data.views_per_image", {"views_per_image": 0}),
        ("data.chunk_samples", {"chunk_samples": 0}),
        ("data.window_chunks", {"window_chunks": 0}),
        ("data.lanes", {"lanes": 0}),
        ("data.max_bad_samples", {"max_bad_samples": -1}),
        ("data.cache_bytes", {"cache_bytes": 0.0}),
        ("data.crop_pct", {"crop_pct": 0.0}),
        ("data.crop_pct", {"crop_pct": 1.1}),
        ("data.crop_pct", {"crop_pct": float("nan")}),
        ("data.mean", {"mean": (0.5,) * 3}),
        ("data.mean", {"std": (0.5,) * 3}),
        ("data.mean", {"mean": (0.5,), "std": (0.5,)}),
        ("data.std", {"mean": (0.5,) * 3, "std": (0.5,)}),
        ("data.mean", {"mean": (0.5, 0.5, 1.5), "std": (0.5,) * 3}),
        ("data.std", {"mean": (0.5,) * 3, "std": (0.5, 0.5, 0.0)}),
        ("data.std", {"mean": (0.5,) * 3, "std": (0.5, 0.5, float("nan"))}),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"^{name} is .*; allowed: "):
        DataSettings(**settings)


def test_one_number_is_a_square() -> None:
    assert (DataSettings(image_size=(32,)).size, DataSettings(image_size=(32, 16)).size) == ((32, 32), (32, 16))
