"""Gather the pages of the site: `python docs/scripts/stage.py OUT`, which `make docs` does before the site is built.

The pages are read on a code host too, so their links lead to files of the repository. A site knows only the files
below its own folder: what a page links to outside of docs/ is copied there, and its links are changed to match.
"""

import os
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# Pages outside of docs/ that have their place in the navigation.
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_BLOCK = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)


def place(file: Path) -> Path:
    """Return where a file of the repository is in the site."""
    return file.relative_to(DOCS) if file.is_relative_to(DOCS) else Path("repository") / file.relative_to(ROOT)


def rewritten(text: str, page: Path, wanted: set[Path]) -> str:
    """Return a page with its links as they are in the site; add the files outside of docs/ to `wanted`."""

    def changed(link: re.Match[str]) -> str:
        target = (page.parent / link[2]).resolve()
        if ":" in link[2] or not target.is_relative_to(ROOT) or not target.exists():
            return link[0]  # an address, or an error that the build reports
        if target.is_dir():
            return link[0]
        if not target.is_relative_to(DOCS):
            wanted.add(target)
        there = Path(os.path.relpath(place(target), place(page).parent)).as_posix()
        return f"{link[1]}{there}{link[3] or ''}{link[4]}"

    parts = _BLOCK.split(text)
    return "".join(part if number % 2 else _LINK.sub(changed, part) for number, part in enumerate(parts))


def stage(out: Path) -> None:
    """Write all pages and what they link to into the folder `out`, which is emptied first."""
    shutil.rmtree(out, ignore_errors=True)
    todo = {path for path in DOCS.rglob("*") if path.is_file() and not path.is_relative_to(Path(__file__).parent)}
    todo |= {ROOT / name for name in PAGES}
    done: set[Path] = set()
    while todo:
        file = todo.pop()
        done.add(file)
        target = out / place(file)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".md":
            wanted: set[Path] = set()
            target.write_text(rewritten(file.read_text(), file, wanted))
            todo |= wanted - done
        else:
            shutil.copyfile(file, target)


if __name__ == "__main__":
    stage(Path(sys.argv[1]))
