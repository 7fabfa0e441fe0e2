import json
import re
from html.parser import HTMLParser

import pytest

from mae.report.charts import Level, Line, chart, figure, percent


class Places(HTMLParser):
    """The paths of a chart by class, and its whole text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.paths: dict[str, list[str]] = {}
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "path":
            self.paths.setdefault(found["class"] or "", []).append(found["d"] or "")

    def handle_data(self, data: str) -> None:
        self.words += data


def points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"([-\d.]+) ([-\d.]+)", path)]


def data_of(text: str) -> dict[str, list[dict[str, list[str]]]]:
    found: dict[str, list[dict[str, list[str]]]] = json.loads(
        text.partition('type="application/json">')[2].partition("<")[0]
    )
    return found


def test_a_curve_is_where_its_figures_are() -> None:
    text = chart("Loss", [Line("a", [0.0, 5.0, 10.0], [1.5, 1.0, 0.5])], [Level("mean", 1.0)])
    places = Places(text)
    (line,), (level,) = places.paths["line"], places.paths["level"]
    (x0, y0), (x1, y1), (x2, y2) = points(line)
    assert (x0, x1, x2) == (0, pytest.approx(x2 / 2, abs=0.1), pytest.approx(1000 / 1.012, abs=0.1))
    assert y0 < y1 < y2
    assert y1 == pytest.approx(500, abs=0.1)
    assert points(level)[0][1] == pytest.approx(500, abs=0.1)
    assert data_of(text)["lines"][0]["y"] == ["1.5", "1", "0.5"]
    assert 'aria-label="Loss: a 1.5 at epoch 0 to 0.5 at epoch 10"' in text


def test_many_points_become_few_with_a_band_from_least_to_greatest() -> None:
    text = chart("Speed", [Line("a", [float(x) for x in range(9600)], [float(1 + x % 2) for x in range(9600)])])
    places = Places(text)
    assert len(points(places.paths["line"][0])) == 240
    assert {y for _, y in points(places.paths["line"][0])} == {500.0}
    assert len({y for _, y in points(places.paths["band"][0])}) == 2
    assert "dots" not in places.paths
    assert len(text) < 20_000


def test_a_spike_at_the_start_is_cut_off_and_told() -> None:
    ys = [20.0, *(1 - number / 200 for number in range(99))]
    text = chart("Loss", [Line("a", [float(x) for x in range(100)], ys)])
    assert "the first values are cut off" in text
    assert points(Places(text).paths["line"][0])[-1][1] > 900
    assert "cut off" not in chart("Loss", [Line("a", [0.0, 1.0], [1.0, 0.9])])


def test_names_cannot_leave_their_place() -> None:
    name = '</script><script>alert(1)</script>&"'
    text = chart(name, [Line(name, [1.0], [2.0]), Line("b", [1.0], [3.0])])
    assert text.count("<script") == 1
    assert text.count("</script") == 1
    assert data_of(text)["lines"][0]["name"] == name
    assert text.count("<button") == 2


def test_nothing_to_draw() -> None:
    assert chart("Loss", []) == ""
    assert chart("Loss", [Line("a", [], [])]) == ""


def test_one_value_and_flat_lines_have_room() -> None:
    for ys in ([0.0, 0.0], [3.0, 3.0], [1e-30, 1e-30]):
        line = points(Places(chart("x", [Line("a", [1.0, 2.0], ys)])).paths["line"][0])
        assert 0 < line[0][1] < 1000


def ticks(text: str) -> list[str]:
    return re.findall(r'class="y"[^>]*>([^<]*)<', text)


@pytest.mark.parametrize(("ys", "top"), [([1.0], "100 %"), ([0.0], "100 %"), ([0.97, 1.0], "100 %"), ([0.2], "22 %")])
def test_the_axis_of_a_share_ends_at_100_percent(ys: list[float], top: str) -> None:
    text = chart("Accuracy", [Line("a", [float(x) for x in range(len(ys))], ys)], (), percent)
    assert ticks(text)[-1] == top
    assert not any(tick.startswith("-") for tick in ticks(text))
    assert all(10 <= y <= 990 for path in Places(text).paths["line"] for _, y in points(path))


def test_the_axis_of_a_loss_ends_at_0_unless_the_loss_is_negative() -> None:
    xs = [float(x) for x in range(3)]
    assert ticks(chart("Loss", [Line("a", xs, [5.0, 1.0, 0.01])]))[0] == "0"
    assert "-1" in ticks(chart("Loss", [Line("a", xs, [2.0, 1.0, -1.1])]))


def test_epochs_read_as_a_person_would_write_them() -> None:
    text = chart("Loss", [Line("a", [12345.0, 800_000.0], [2.0, 1.0])])
    assert data_of(text)["lines"][0]["at"] == ["12,345", "800,000"]
    assert "2 at epoch 12,345 to 1 at epoch 800,000" in text
    assert "e+" not in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.46712, "0.4671"), (1234.5, "1,234"), (1e-4, "1e-4"), (7.5e-4, "7.5e-4"), (0.0, "0"), (20.0, "20")],
)
def test_figures_read_as_a_person_would_write_them(value: float, text: str) -> None:
    assert figure(value) == text


def test_percent() -> None:
    assert (percent(0.7963), percent(0.05), percent(1.0)) == ("79.6 %", "5 %", "100 %")
