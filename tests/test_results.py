"""Tables of results in the docs: made from stored figures, each with the commands that repeat it."""

import json
import re
import sys
from pathlib import Path

import pytest

from benchmarks.results import PAGES, TABLES, main, with_tables
from benchmarks.tables import table as tables
from benchmarks.tables.table import Row, Table, markdown_table, percent

# Measured before tables were made from stored figures; each section names its command.
BY_HAND = {"Fashion-MNIST, protocols that train, with a small budget"}
MADE = [table for table in TABLES.values() if table.path.exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_shows_the_stored_figures(page: Path) -> None:
    text = page.read_text()
    assert with_tables(text) == text, "run benchmarks/results.py, or correct the figures"
    here = [table.name for table in MADE if tables.ROOT / table.page == page]
    assert re.findall(r"<!-- table (\w+) -->", text) == here


def test_every_other_table_is_known_to_be_written_by_hand_and_has_a_command() -> None:
    rest = re.sub(r"<!-- table .*?<!-- end -->", "", (tables.ROOT / "docs" / "results.md").read_text(), flags=re.DOTALL)
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", rest, flags=re.MULTILINE | re.DOTALL))
    assert {title for title, text in sections.items() if "\n|---" in text} == BY_HAND
    assert all("```sh\n" in sections[title] for title in BY_HAND)


@pytest.mark.parametrize("table", MADE, ids=lambda table: table.name)
def test_every_stored_figure_has_its_commands_commit_and_versions(table: Table) -> None:
    known = {row.name: row for row in table.rows}
    assert table.figures()
    for name, about in table.figures().items():
        assert tuple(about["commands"]) == (*table.prepare, *known[name].commands)
        assert re.fullmatch(r"[0-9a-f]{7,}", about["commit"]), f"{name} was measured with changes: {about['commit']}"
        assert about["versions"].keys() >= {"torch", "timm", "accelerate"}
        assert about["figures"]
    assert not re.search(r"/(home|work|tmp|root)/", table.path.read_text())


def test_rows_are_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "FIGURES", tmp_path / "figures")
    script = tmp_path / "count.py"
    script.write_text("import sys; open(sys.argv[1], 'a').write('x')")

    def row(name: str) -> Row:
        return Row(name, (f"python {script} OUT/{name}.txt",), lambda out: {"runs": (out / f"{name}.txt").read_text()})

    def markdown(found: dict[str, tables.Figures]) -> str:
        return markdown_table(("row", "runs"), [[name, about["figures"]["runs"]] for name, about in found.items()])

    one = Table("counts", (row("a"), row("b"), row("d")), markdown, prepare=(f"python {script} OUT/before.txt",))
    out = tmp_path / "out"
    one.measure(tmp_path, out, jobs=2, only=("d", "a"))
    one.measure(tmp_path, out, jobs=1, only=("a", "d"))
    one.gather(out)
    assert (out / "counts" / "before.txt").read_text() == "x"
    stored = json.loads((tmp_path / "figures" / "counts.json").read_text())
    assert list(stored) == ["a", "d"]
    assert stored["a"]["commands"] == [f"python {script} OUT/before.txt", f"python {script} OUT/a.txt"]
    assert one.markdown(one.figures()) == "| row | runs |\n|---|---|\n| a | x |\n| d | x |\n"
    # On another machine, where only the third row is measured, the others stay.
    one.measure(tmp_path, tmp_path / "other", jobs=1, only=("b",))
    one.gather(tmp_path / "other")
    assert list(one.figures()) == ["a", "b", "d"]


def test_the_time_of_a_row_that_was_interrupted_is_not_known(tmp_path: Path) -> None:
    rows = tuple(Row(name, ("python -c 1",), lambda _: {}) for name in ("cut", "whole"))
    once = Table("once", rows, lambda _: "")
    (tmp_path / "once").mkdir()
    (tmp_path / "once" / "cut.log").write_text("begun")
    once.measure(tmp_path, tmp_path, jobs=1)
    cut, whole = (json.loads((tmp_path / "once" / f"{name}.json").read_text()) for name in ("cut", "whole"))
    assert (cut["cpu_minutes"], tables.minutes(cut)) == (None, "-")
    assert tables.minutes(whole) == "0"


def test_a_command_that_fails_ends_the_measurement_and_names_its_log(tmp_path: Path) -> None:
    failing = Table("bad", (Row("a", ("python -c 'print(17); raise SystemExit(3)'",), lambda _: {}),), lambda _: "")
    with pytest.raises(SystemExit, match=r"failed with exit code 3, see .*a\.log: python .*\n17$"):
        failing.measure(tmp_path, tmp_path, jobs=1)
    assert not (tmp_path / "bad" / "a.json").exists()


def test_an_unknown_table_or_row_is_named_with_those_that_exist(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, said in ((["tables"], "no table tables; allowed: demo, "), (["demo", "--rows", "x"], "no row x; allow")):
        monkeypatch.setattr(sys, "argv", ["results.py", *words, "--data", "."])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert said in capsys.readouterr().err


def test_percent_is_the_mean_and_the_sample_deviation() -> None:
    assert percent([0.5]) == "50.0"
    assert percent([0.5, 0.6]) == "55.0 ± 7.1"


def test_commands_run_with_this_python(tmp_path: Path) -> None:
    seconds = tables.run("python -c 'import sys; print(sys.executable)'", tmp_path, tmp_path, tmp_path / "log")
    assert (tmp_path / "log").read_text().strip() == sys.executable
    assert seconds > 0
