"""One strict parser for YAML and flags."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from mae.errors import UserError
from mae.settings import check, dump, flatten, load_yaml, parse, to_dict


@dataclass(frozen=True)
class Inner:
    """A section."""

    sizes: tuple[int, ...] = (8,)
    """Sizes [pixels]."""
    rate: float | None = None
    """A rate [1/step]."""
    active: bool = True
    """A switch."""

    def __post_init__(self) -> None:
        check(self.rate is None or self.rate > 0, "inner.rate", self.rate, "above 0")


@dataclass(frozen=True)
class Outer:
    """Settings of a test."""

    run_dir: Path
    """A folder."""
    kind: Literal["mlp", "linear"] = "mlp"
    """A choice."""
    inner: Inner = field(default_factory=Inner)


def read(text: str, tmp_path: Path, *flags: str) -> Outer:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return parse(Outer, ["--config", str(path), *flags], prog="test")


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    text = "run_dir: a\ninner: {sizes: [1, 2], rate: 1e-3, active: false}\n"
    assert read(text, tmp_path) == Outer(Path("a"), inner=Inner((1, 2), 1e-3, False))
    flags = ["--run_dir", "b", "--inner.sizes", "5", "--inner.rate", "None", "--inner.active", "True"]
    assert read(text, tmp_path, *flags) == Outer(Path("b"), inner=Inner((5,), None, True))


def test_a_switch_needs_no_value(tmp_path: Path) -> None:
    text = "run_dir: a\ninner: {active: false}\n"
    assert read(text, tmp_path, "--inner.active").inner.active
    assert read(text, tmp_path, "--inner.active", "--kind", "linear") == Outer(Path("a"), "linear", Inner(active=True))
    assert not read("run_dir: a\n", tmp_path, "--inner.active", "False").inner.active
    with pytest.raises(UserError, match="Unrecognized"):
        read(text, tmp_path, "--inner.active", "maybe")


def test_a_scalar_fills_a_tuple(tmp_path: Path) -> None:
    assert read("run_dir: a\ninner: {sizes: 3}", tmp_path).inner.sizes == (3,)


def test_saved_settings_read_back_equal(tmp_path: Path) -> None:
    settings = Outer(Path("x y"), "linear", Inner((1, 2, 3), 0.25, False))
    assert read(dump(settings), tmp_path) == settings
    assert load_yaml(tmp_path / "settings.yaml") == to_dict(settings)


def test_flatten_names_settings_as_flags_do() -> None:
    assert flatten(to_dict(Outer(Path("a")))) == {
        "run_dir": "a", "kind": "mlp", "inner.sizes": [8], "inner.rate": None, "inner.active": True
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run_dir: a\ninnr: {}", ["'innr'", "did you mean inner?"]),
        ("run_dir: a\ninner: {szes: 1}", ["'inner.szes'", "did you mean inner.sizes?"]),
        ("run_dir: a\ninner: 3", ["inner is a section"]),
        ("run_dir: {a: 1}", ["run_dir takes a value"]),
        ("run_dir: a\nkind: [mlp]", ["--kind", "mlp"]),
        ("run_dir: a\nkind: conv", ["'conv'", "--kind", "'mlp', 'linear'"]),
        ("run_dir: a\ninner: {rate: fast}", ["--inner.rate", "fast"]),
        ("run_dir: a\ninner: {rate: -1}", ["inner.rate is -1.0", "allowed: above 0"]),
        ("run_dir: a\ninner: {rate: .nan}", ["inner.rate is nan"]),
        ("run_dir: a\nrun_dir: b", ["duplicate key 'run_dir'"]),
        ("run_dir: !!python/object:os.system a", ["not valid YAML"]),
        ("- a\n- b", ["must hold a mapping"]),
        ("kind: mlp", ["--run_dir"]),
    ],
)
def test_mistakes_in_a_file_are_named_in_one_line(text: str, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read(text, tmp_path)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--run_dir", "a", "--inner.szes", "1"], ["--inner.szes", "--inner.sizes"]),
        (["--run_dir", "a", "--inner.rate", "x"], ["--inner.rate", "'x'"]),
        (["--config"], ["--config needs the path"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml does not exist"]),
        (["--config=a", "--config=b"], ["given twice"]),
        ([], ["--run_dir"]),
    ],
)
def test_mistakes_in_flags_are_named_in_one_line(flags: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse(Outer, flags, prog="test")
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(Outer, ["--help"], prog="test")
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for text in ("--run_dir", "Sizes [pixels].", "A rate [1/step].", "(default: None)", "--config FILE"):
        assert text in shown
