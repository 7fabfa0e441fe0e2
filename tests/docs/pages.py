"""Pages of the documentation: their links, headings and blocks of code."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")],
    key=lambda page: page.relative_to(ROOT).as_posix(),
)
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


class Block(NamedTuple):
    """Block of code, and the language that its page names."""

    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    return [Block(*found.groups()) for found in _FENCED.finditer(page.read_text())]


def without_blocks(page: Path) -> str:
    return _FENCED.sub("", page.read_text())


def links(page: Path) -> list[str]:
    """Targets of the links of a page, without those in code."""
    return _LINK.findall(_INLINE.sub("", without_blocks(page)))


def inline(page: Path) -> list[str]:
    """Pieces of code within the text."""
    return [" ".join(code.split()) for code in _INLINE.findall(without_blocks(page))]


def anchors(page: Path) -> set[str]:
    """Names by which headings can be reached, as code hosts and the site make them."""
    text = without_blocks(page)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in _HEADING.findall(text)}


def lines(block: Block) -> Iterator[list[str]]:
    """The words of each command of a shell block, without comments."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def command_of(words: list[str]) -> list[str] | None:
    """The words after `mae` of a command line, also of one that a launcher starts; None if it is of another program."""
    if words[0] == "mae" and len(words) > 1:
        return words[1:]
    for number, word in enumerate(words):
        if found := re.fullmatch(r"pipelines/(\w+)\.py", word):
            return [found[1], *words[number + 1 :]]
    return None
