"""The tables of docs/export.md say what the targets do."""

from export.guide import COMMAND, GUIDE, files_in_guide, holdings, refusals, section, targets


def test_the_tables_of_the_guide_are_true() -> None:
    text = GUIDE.read_text()
    remedy = f"docs/export.md is not as the targets are: {COMMAND}"
    assert section(text, "targets") == targets(files_in_guide(text)), remedy
    assert section(text, "holdings") == holdings(), remedy
    assert section(text, "refusals") == refusals(), remedy
