"""Figures that follow from measured ones."""

import math


def mfu(images_per_second: float, flops_per_image: float, peak: float | None) -> float | None:
    """Return the share of the device's peak FLOPs per second that useful work took; None if the peak is unknown."""
    return None if peak is None else images_per_second * flops_per_image / peak


def cores_needed(images_per_second: float, per_core: float) -> int:
    """Return how many loader processes keep a model of this speed busy."""
    return math.ceil(images_per_second / per_core)
