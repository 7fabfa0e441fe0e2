"""The page: its controls, and which part is drawn anew when one of them changes."""

import html
from collections.abc import Callable
from importlib.resources import files
from typing import Any, get_args

import gradio as gr

from mae.explore import looking
from mae.explore.actions import Actions
from mae.explore.masks import MaskChoice
from mae.explore.models import RunModels
from mae.explore.picture_set import PictureSet
from mae.models.description import ModelDescription
from mae.output import counted

# The fonts of Gradio's own themes come from a server of Google.
THEME = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
_QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
_BRUSH = """
<div class="brush" style="--columns: ${columns}" title="Click or drag over patches to hide them">
  ${picture ? `<img class="pixels" alt="Picture to paint on" src="${picture}" draggable="false">` : ""}
  <div class="patches">${[...value].map((mark) => `<i class="${mark === "1" ? "hidden" : ""}"></i>`).join("")}</div>
</div>
"""


def asset(name: str) -> str:
    """Return a file of this package as text."""
    return files("mae.explore").joinpath(name).read_text(encoding="utf-8")


def build(models: RunModels, pictures: PictureSet | None, title: str) -> gr.Blocks:
    """Return the page of a run and of a set, if there is one."""
    actions = Actions(models, pictures)
    with gr.Blocks(title=looking.plain(title), analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.HTML(_heading(title, models.description))
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                controls = _Controls(models, len(pictures or ()))
            with gr.Column(scale=3, min_width=300):
                _add_panels(actions, controls, models.description)
        _connect(page, actions, controls)
    page.queue(api_open=False)
    return page


def _heading(title: str, description: ModelDescription) -> str:
    """Return which run this is, and what model it holds."""
    rows, columns = description.grid
    height, width = description.patch_size
    kind = description.kind if description.decoder or description.kind == "classifier" else "encoder"
    parts = counted(description.depth, "block"), counted(description.heads, "head")
    text = (
        f"{kind}: {parts[0]} of width {description.width} with {parts[1]}; {rows}x{columns} patches of "
        f"{height}x{width} pixels, {counted(description.channels, 'channel')}"
    )
    return f"<h1>{html.escape(looking.plain(title))}</h1>{looking.note(text)}"


class _Controls:
    """Controls: the picture, the model, the mask; those without a choice are not shown."""

    def __init__(self, models: RunModels, images: int) -> None:
        description, stops = models.description, len(models.stops)
        decoder = description.decoder
        of_mask: dict[str, Any] = {"visible": decoder is not None}
        kind, share = (decoder.mask, round(100 * decoder.mask_ratio)) if decoder else ("random", 75)
        self.picture = gr.State(None)
        self.image = gr.Slider(1, max(images, 2), 1, step=1, label="Image of the set", visible=images > 1)
        self.upload = _without_addresses(gr.File(label="A picture of your own", type="binary", height=140))
        self.name = gr.HTML()
        self.stop = gr.Slider(1, max(stops, 2), models.last + 1, step=1, label="Checkpoint", visible=stops > 1)
        self.stop_name = gr.HTML(looking.note(models.stops[models.last].name))
        self.kind = gr.Radio(list(get_args(MaskChoice)), value=kind, label="Mask", **of_mask)
        self.share = gr.Slider(1, 99, share, step=1, label="Hidden [%]", **of_mask)
        self.seed = gr.Slider(0, 99, 0, step=1, label="Another random mask", **of_mask)
        # Gradio's image editor paints pixels instead, needs WebGL, and uploads files at each stroke.
        rows, columns = description.grid
        size = {"rows": rows, "columns": columns}
        self.unpainted = "0" * rows * columns
        self.brush = gr.HTML(
            self.unpainted, html_template=_BRUSH, js_on_load=asset("brush.js"), picture="", **size, **of_mask
        )
        self.clear = gr.Button("Remove the paint", size="sm", **of_mask)


def _without_addresses(upload: gr.File) -> gr.File:
    """Let an upload take no addresses: only requests made by hand hold any, and the server would fetch them."""
    move = upload.async_move_resource_to_block_cache

    async def move_file(path: str | None) -> str | None:
        if path is not None and "://" in path:
            raise gr.Error("a picture is uploaded, not fetched from an address", print_exception=False)
        moved: str | None = await move(path)
        return moved

    upload.async_move_resource_to_block_cache = move_file
    return upload


def _add_panels(actions: Actions, controls: _Controls, description: ModelDescription) -> None:
    """Add what the page shows."""
    of_model = [controls.picture, controls.stop]
    gr.Markdown("### Reconstruction")
    mask = [controls.kind, controls.share, controls.seed, controls.brush]
    _follow([*of_model, *mask], actions.reconstruction(), gr.HTML())
    gr.Markdown("### Attention of the cls token")
    depth = description.depth
    block = gr.Slider(1, max(depth, 2), depth, step=1, label="Block", visible=depth > 1)
    _follow([*of_model, block], actions.looked_at(looking.attention), gr.HTML())
    gr.Markdown("### Features of the patches")
    _follow(of_model, actions.looked_at(looking.patch_colors), gr.HTML())
    gr.Markdown("### Classes")
    _follow(of_model, actions.looked_at(looking.predictions), gr.HTML())
    gr.Markdown("### Nearest neighbours")
    _follow(of_model, actions.neighbours(), gr.HTML())


def _connect(page: gr.Blocks, actions: Actions, controls: _Controls) -> None:
    """Let the controls change each other."""
    chosen = [controls.picture, controls.name]
    sources = [controls.upload, controls.image]
    page.load(actions.choose, sources, chosen, **_QUIET)
    _follow(sources, actions.choose, chosen)
    _follow([controls.picture], lambda picture: gr.HTML(picture=actions.canvas(picture)), controls.brush)
    _follow([controls.stop], actions.stop, controls.stop_name)
    controls.clear.click(lambda: controls.unpainted, outputs=controls.brush, **_QUIET)
    # Paint shows nothing under another kind of mask.
    controls.brush.input(lambda: "painted", outputs=controls.kind, **_QUIET)


def _follow(controls: list[Any], work: Callable[..., Any], output: Any) -> None:
    """Compute `output` anew when one of the controls changes; the last change wins."""
    changes = [control.change for control in controls]
    gr.on(changes, work, controls, output, trigger_mode="always_last", **_QUIET)
