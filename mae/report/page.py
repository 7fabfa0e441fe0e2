"""HTML page in one file: pictures, style and script are embedded, and nothing is loaded from elsewhere."""

import base64
import html
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import torch

from mae import __version__
from mae.output import valid_text

Section = tuple[str, str]
"""Heading, and body in HTML."""
_NUMBER = re.compile(r"[\d.,:e%± -]+")
_LIBRARIES = ("torch", "torchvision", "timm", "accelerate", "webdataset", "numpy", "pillow")
# The browser itself then refuses to load anything, whatever a name or a setting may hold.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(title: str, sections: Iterable[Section], head: str = "") -> str:
    """Return a whole page of sections; bytes in names that are not UTF-8 are shown as `\\xff`.

    Args:
        head: HTML below the title, before the first section.
    """
    parts = list(sections)
    links = "".join(f'<a href="#{number}">{html.escape(heading)}</a>' for number, (heading, _) in enumerate(parts))
    body = "".join(
        f'<section id="{number}"><h2>{html.escape(heading)}</h2>{content}</section>\n'
        for number, (heading, content) in enumerate(parts)
    )
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    text = (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title>"
        f'<link rel="icon" href="data:,"><style>\n{_asset("report.css")}</style></head>\n'
        f"<body><header><h1>{html.escape(title)}</h1>{head}</header>\n"
        f'<nav aria-label="Contents">{links}</nav>\n<main>{body}</main>'
        f"<footer>Made {made} by mae {__version__}. This file holds everything that it shows.</footer>\n"
        f"<script>\n{_asset('report.js')}</script></body>\n</html>\n"
    )
    return valid_text(text)


def paragraph(text: str) -> str:
    """Return a paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>"


def subheading(text: str) -> str:
    """Return a heading within a section."""
    return f"<h3>{html.escape(text)}</h3>"


def details(summary: str, body: str) -> str:
    """Return HTML that is shown when its summary is opened."""
    return f"<details><summary>{html.escape(summary)}</summary>{body}</details>"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table, with columns of numbers aligned to the right; one that is too wide can be scrolled."""
    texts = [[str(cell) for cell in row] for row in rows]
    filled = [[row[column] for row in texts if row[column]] for column in range(len(header))]
    kinds = [' class="number"' if cells and all(map(_NUMBER.fullmatch, cells)) else "" for cells in filled]
    head = "".join(
        f'<th scope="col"{kind}>{html.escape(title)}</th>' for title, kind in zip(header, kinds, strict=True)
    )
    lines = "".join(
        "<tr>" + "".join(f"<td{kind}>{html.escape(cell)}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in texts
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def data_url(data: bytes, kind: str) -> str:
    """Return the URL of an embedded picture of a kind, such as `png`."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def settings_table(flat: Mapping[str, Any]) -> str:
    """Return a table of all settings."""
    return table(("setting", "value"), [(name, setting(value)) for name, value in flat.items()])


def setting(value: object) -> str:
    """Return the value of a setting as a person would write it."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


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


@cache
def _asset(name: str) -> str:
    """Return the text of a file beside this one."""
    return files("mae.report").joinpath(name).read_text("utf-8")
