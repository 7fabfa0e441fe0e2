"""HTML page in one file: pictures are embedded, and nothing is loaded from elsewhere."""

import base64
import html
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch

from mae import __version__

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1f2328; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; border-bottom: 1px solid #d1d9e0; }
table { border-collapse: collapse; margin: .6rem 0; } th { text-align: left; background: #f6f8fa; }
td, th { border: 1px solid #d1d9e0; padding: .25rem .7rem; } td.number { text-align: right; }
figure { margin: 1rem 0; } img { max-width: 100%; } figcaption, footer { color: #59636e; font-size: .85rem; }
"""
_NUMBER = re.compile(r"[\d.,:e%± -]+")
_LIBRARIES = ("torch", "torchvision", "timm", "accelerate", "webdataset", "numpy", "pillow")


def page(title: str, sections: Iterable[tuple[str, str]]) -> str:
    """Return a whole page of (heading, HTML body) sections; bytes in names that are not UTF-8 are shown as `\\xff`."""
    body = "".join(f"<section><h2>{html.escape(heading)}</h2>{content}</section>\n" for heading, content in sections)
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    text = (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head>\n'
        f"<body><h1>{html.escape(title)}</h1>\n{body}"
        f"<footer>made {made} by mae {__version__}</footer></body>\n</html>\n"
    )
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def paragraph(text: str) -> str:
    """Return a paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table, with numbers aligned to the right."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    lines = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"


def picture(png: bytes, caption: str) -> str:
    """Return an embedded PNG with its caption."""
    data = base64.b64encode(png).decode()
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def settings_table(flat: Mapping[str, Any]) -> str:
    """Return a table of all settings."""
    return table(("setting", "value"), [(name, str(value)) for name, value in flat.items()])


def environment_table(device: torch.device) -> str:
    """Return a table of the machine and the versions of the libraries."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    rows = [
        ("machine", f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} torch threads"),
        ("GPU", gpu),
        ("Python", platform.python_version()),
        *((name, version(name)) for name in _LIBRARIES),
    ]
    return table(("what", "version"), rows)


def _cell(value: object) -> str:
    text = str(value)
    kind = ' class="number"' if _NUMBER.fullmatch(text) else ""
    return f"<td{kind}>{html.escape(text)}</td>"
