"""Intersection over union, the measure of segmentation."""

from torch import Tensor, bincount


def confusion(labels: Tensor, predicted: Tensor, classes: int, ignore: int) -> Tensor:
    """Count pixels by true class (rows) and predicted class (columns)."""
    kept = labels != ignore
    return bincount(labels[kept] * classes + predicted[kept], minlength=classes**2).view(classes, classes)


def intersection_over_union(counts: Tensor) -> Tensor:
    """Return one IoU per class; a class that is neither true nor predicted anywhere is nan."""
    both = counts.diagonal().double()
    return both / (counts.sum(0) + counts.sum(1) - both)
