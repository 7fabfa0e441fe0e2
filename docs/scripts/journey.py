"""Draw the pictures of docs/guides/journey.md from the models of docs/guides/quickstart.md.

`python docs/scripts/journey.py runs/pre runs/tuned docs/guides`, after the commands of that guide. The image is one of
scikit-learn's scanned digits (doi:10.24432/C50P49, CC BY 4.0), from the test split.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

import mae
from mae.data.packing.digits import digit_splits
from mae.inference.model import Model
from mae.report.pictures import figure_png

_IMAGE = 5
_BACK = "#ffffff"


def draw(pretrained: Model, tuned: Model, out: Path) -> None:
    """Write both pictures into the folder `out`."""
    image = digit_splits()["test"][_IMAGE].image
    assert isinstance(image, bytes)
    _save(_training(pretrained, image), out / "journey-training.png")
    _save(_use(pretrained, tuned, image), out / "journey-use.png")


def _training(model: Model, image: bytes) -> Figure:
    """Image, patches, what is visible, and what the model fills in."""
    pixels = model.view(image)[0].numpy()
    figure, axes = _row(4)
    made = model.reconstruct([image])
    panels = (
        ("1. image, with the edges of its patches", pixels / 255),
        ("2. half of the patches are hidden", made.masked[0, 0].numpy()),
        ("3. what the model predicts", made.rebuilt[0, 0].numpy()),
        ("4. prediction in the hidden patches", made.pasted[0, 0].numpy()),
    )
    for place, (title, panel) in zip(axes, panels, strict=True):
        _show(place, title, panel)
    _grid(axes[0], model.description.patch_size, pixels.shape)
    _grid(axes[1], model.description.patch_size, pixels.shape)
    return figure


def _use(pretrained: Model, tuned: Model, image: bytes) -> Figure:
    """Features of the patches, attention, and the probabilities of the classes."""
    figure, axes = _row(3)
    attention = pretrained.attention([image])[0].mean(dim=0).numpy()
    _show(axes[0], "5. attention of the cls token", attention / attention.max())
    feature = pretrained.embed([image])[0].numpy()
    axes[1].bar(range(len(feature)), feature, color="#31688e", width=1.0)
    axes[1].set_title(f"6. feature: {len(feature)} numbers", fontsize=9)
    axes[1].tick_params(labelsize=7)
    prediction = tuned.predict([image], top=len(tuned.classes))[0]
    chances = dict(zip(prediction.names, prediction.probabilities, strict=True))
    axes[2].bar(tuned.classes, [chances[name] for name in tuned.classes], color="#31688e")
    axes[2].set_title("7. probability of each class", fontsize=9)
    axes[2].tick_params(labelsize=7)
    return figure


def _row(number: int) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(2.3 * number, 2.4), layout="constrained", facecolor=_BACK)
    return figure, list(figure.subplots(1, number))


def _show(axes: Axes, title: str, panel: NDArray[np.float32]) -> None:
    axes.imshow(panel, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=8)
    axes.set_axis_off()


def _grid(axes: Axes, patch: tuple[int, int], shape: tuple[int, int]) -> None:
    for row in range(patch[0], shape[0], patch[0]):
        axes.axhline(row - 0.5, color="#e8a33d", linewidth=1)
    for column in range(patch[1], shape[1], patch[1]):
        axes.axvline(column - 0.5, color="#e8a33d", linewidth=1)


def _save(figure: Figure, path: Path) -> None:
    path.write_bytes(figure_png(figure))


if __name__ == "__main__":
    draw(mae.load(sys.argv[1], "cpu"), mae.load(sys.argv[2], "cpu"), Path(sys.argv[3]))
