"""Reconstruction pictures: original | masked | reconstruction | reconstruction with the visible patches."""

import io
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

COLUMNS = ("original", "masked", "reconstruction", "with visible patches")
_INCHES = 1.5


def draw_reconstructions(
    panels: Sequence[Float[Tensor, "batch channels height width"]], title: str, norm_pix_loss: bool
) -> bytes:
    """Draw one row per image and one labelled column per panel, and return a PNG file."""
    rows, columns = len(panels[0]), len(panels)
    aspect = panels[0].shape[2] / panels[0].shape[3]
    figure = Figure(figsize=(_INCHES * columns + 0.4, _INCHES * aspect * rows + 1.0), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for column, (name, panel) in enumerate(zip(COLUMNS, panels, strict=True)):
        axes[0][column].set_title(name, fontsize=9)
        for row in range(rows):
            axes[row][column].imshow(_displayable(panel[row]), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes[row][column].set_axis_off()
    figure.suptitle(title, fontsize=10)
    if norm_pix_loss:
        figure.supxlabel("each predicted patch has the mean and contrast of the original", fontsize=7)
    return figure_png(figure)


def figure_png(figure: Figure) -> bytes:
    """Render a figure into a PNG file, without a display or global state."""
    buffer = io.BytesIO()
    with mpl.rc_context({"savefig.dpi": 130}):
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _displayable(image: Float[Tensor, "channels height width"]) -> NDArray[np.float32]:
    """Return the first three channels as colours, or the first as gray if there are fewer."""
    array: NDArray[np.float32] = image.permute(1, 2, 0).numpy()
    return array[:, :, :3] if array.shape[2] >= 3 else array[:, :, 0]
