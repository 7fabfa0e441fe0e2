import re

import pytest

from mae.progress import progress_bar, working


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    return plain.replace("\r", "\n").strip().splitlines()[-1]


def test_a_terminal_shows_the_count_and_the_speed(terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("packing", 7) as advance:
        advance(2)
        advance(3, 5_000_000_000)
    assert re.match(r"packing .* 5/7 +[0-9,]+ MB/s", last_line(capsys))


def test_without_sizes_there_is_no_speed(terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("decoding", 7) as advance:
        advance(2)
    line = last_line(capsys)
    assert "2/7" in line
    assert "/s" not in line


def test_bytes_are_shown_with_their_unit(terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("indexing", 8_000_000, is_bytes=True) as advance:
        advance(2_000_000)
    assert "2.0/8.0 MB" in last_line(capsys)


def test_nothing_is_shown_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with progress_bar("packing", 7) as advance:
        advance(7, 100)
    assert capsys.readouterr() == ("", "")


def test_work_without_a_known_end_shows_its_name_and_time(terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    with working("looking at the source"):
        pass
    assert re.search(r"[-|/\\] looking at the source 0:00:00", last_line(capsys))


def test_only_rank_0_shows_a_bar(
    terminal: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with progress_bar("packing", 7) as advance, working("looking"):
        advance(7)
    assert capsys.readouterr().err == ""
