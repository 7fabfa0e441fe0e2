"""One strict parser for YAML and flags."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
import yaml

from mae.errors import UserError
from mae.pipelines.pretrain import run
from mae.schema import Before
from mae.settings import check, dump, flatten, parse, to_dict
from mae.tasks.finetune_settings import FinetuneSettings
from mae.tasks.pretraining import PretrainSettings
from mae.training.optimizer import cosine_schedule
from mae.yaml_files import load_yaml


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
        ("run_dir: a\ninner: {1: 2}", ["not valid YAML: key 1 is not text"]),
        ("run_dir: a\ninner: 3", ["inner is a section"]),
        ("run_dir: {a: 1}", ["run_dir takes a value"]),
        ("run_dir: a\nkind: [mlp]", ["kind takes one value, got a list"]),
        ("run_dir: [a]", ["run_dir takes one value, got a list"]),
        ("run_dir:", ["run_dir takes text, got None; put it in quotes"]),
        ("run_dir: no", ["run_dir takes text, got False"]),
        ("run_dir: 12:30", ["'12:30'; allowed: decimal numbers", "text in quotes"]),
        ("run_dir: a\ninner: {sizes: [[1]]}", ["inner.sizes takes plain values, got a list of lists"]),
        ("run_dir: a\ninner: {sizes: [{a: 1}]}", ["inner.sizes takes plain values, got a list of lists or of"]),
        ("run_dir: a\ninner: {sizes: [1.5]}", ["--inner.sizes", "1.5"]),
        ("run_dir: a\nkind: conv", ["'conv'", "--kind", "'mlp', 'linear'"]),
        ("run_dir: a\ninner: {rate: fast}", ["--inner.rate", "fast"]),
        ("run_dir: a\ninner: {rate: -1}", ["inner.rate is -1.0", "allowed: above 0"]),
        ("run_dir: a\ninner: {rate: .nan}", ["inner.rate is nan"]),
        ("run_dir: a\nrun_dir: b", ["duplicate key 'run_dir'"]),
        ("run_dir: !!python/object:os.system a", ["not valid YAML"]),
        ("- a\n- b", ["must hold a mapping"]),
        ("run_dir: a\ninner: {rate: 1, rate: 2}", ["duplicate key 'rate'"]),
        ("run_dir: a\n[1]: 2", ["not valid YAML"]),
        ("run_dir: a\n---\nrun_dir: b", ["not valid YAML"]),
        ("kind: mlp", ["--run_dir"]),
        ("run_dir: a\ncount: 010", ["'010'; allowed: decimal numbers", "line 2"]),
        ("run_dir: a\ncount: 1:30", ["'1:30'"]),
        ("run_dir: a\ncount: 0x10", ["'0x10'"]),
        ("run_dir: a\ninner: {rate: 1:30.5}", ["'1:30.5'"]),
        ("run_dir: 2020-13-01", ["not valid YAML", "month must be in 1..12"]),
        ("run_dir: !!int x", ["not valid YAML"]),
        ("run_dir: !!bool x", ["not valid YAML"]),
        (f"run_dir: {'9' * 6000}", ["not valid YAML"]),
        ('run_dir: "a\\0b"', ["not valid YAML", "null character"]),
    ],
)
def test_mistakes_in_a_file_are_named_in_one_line_k01_k02_k06(text: str, words: list[str], tmp_path: Path) -> None:
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
def test_mistakes_in_flags_are_named_in_one_line_k01_k02(flags: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse(Outer, flags, prog="test")
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "run_dir: !!python/object/apply:os.mkdir ['{canary}']",
        "run_dir: !!python/name:os.system ''",
        "run_dir: !!python/module:os ''",
        "inner: !!python/object/new:os.mkdir ['{canary}']",
        "? !!python/object/apply:os.mkdir ['{canary}']\n: 1",
        "run_dir: !path a",
    ],
)
def test_a_tag_in_a_file_is_refused_and_nothing_made_of_it_k06(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not valid YAML: could not determine a constructor for the tag"):
        read(text.replace("{canary}", str(tmp_path / "canary")), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["settings.yaml"]


@pytest.mark.parametrize("text", ["run_dir: {bomb}", "run_dir: a\nx: {bomb}", "run_dir: a\ninner: {sizes: {bomb}}"])
def test_a_file_of_a_few_lines_takes_little_memory_k06(text: str, tmp_path: Path) -> None:
    bomb = "ha"
    for level in range(11):  # written out, 10**11 words
        bomb = f"[&x{level} {bomb}{f', *x{level}' * 9}]"
    with pytest.raises(UserError) as caught:
        read(text.replace("{bomb}", bomb), tmp_path)
    assert len(str(caught.value)) < 500


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(Outer, ["--help"], prog="test")
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for text in ("--run_dir", "Sizes [pixels].", "A rate [1/step]. (default: None)", "--config FILE"):
        assert text in shown


@dataclass(frozen=True)
class Changed:
    """Settings of a later version: `old` and a section are gone, `new` was added."""

    REMOVED: ClassVar[dict[str, object]] = {"old": 2, "gone.rate": None, "inner.kept": [1]}

    run_dir: Path
    new: Annotated[tuple[int, ...], Before((1, 2))] = (3,)
    inner: Inner = field(default_factory=Inner)


def test_a_removed_setting_in_a_file_is_accepted_at_its_last_default_only(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("run_dir: a\nold: 2\ngone: {rate: null}\ninner: {kept: [1], rate: 5}\n")
    assert parse(Changed, ["--config", str(path)], prog="test") == Changed(Path("a"), inner=Inner(rate=5))
    for text, words in {
        "old: 3": "old is 3; allowed: 2, since this setting was removed",
        "gone: {rate: 1}": "gone.rate is 1; allowed: None",
        "inner: {kept: 1}": "inner.kept is 1; allowed: [1]",
        "gone: {rte: 1}": "unknown setting 'gone'",
        "gone: {}": "unknown setting 'gone'",
    }.items():
        path.write_text(f"run_dir: a\n{text}\n")
        with pytest.raises(UserError, match=re.escape(words)):
            parse(Changed, ["--config", str(path)], prog="test")


def test_an_added_setting_has_its_old_meaning_in_runs_that_are_older(tmp_path: Path) -> None:
    """By the run's folder as by its settings file; unless it is given, or the file is not that of a run."""

    def new(*flags: str) -> tuple[int, ...]:
        return parse(Changed, flags, prog="test").new

    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    assert new("--run_dir", str(run)) == (3,)
    saved = run / "settings.yaml"
    saved.write_text(f"run_dir: {run}\n")
    assert new("--run_dir", str(run)) == (1, 2)
    assert new("--run_dir", str(run), "--new", "7") == (7,)
    assert new("--config", str(saved), "--run_dir", str(other)) == (3,)
    (run / "metrics.jsonl").touch()
    assert new("--config", str(saved), "--run_dir", str(other)) == (1, 2)
    saved.write_text(f"run_dir: {run}\nnew: 5\n")
    assert new("--config", str(saved)) == (5,)
    assert new("--run_dir", str(run)) == (3,)  # which the comparison with the run refuses


# What the pipelines' own settings refuse, all of it before anything is read or written.

PIPELINES = [PretrainSettings, FinetuneSettings]
Pipeline = type[PretrainSettings] | type[FinetuneSettings]


def from_yaml(schema: Pipeline, name: str, value: object, folder: Path) -> PretrainSettings | FinetuneSettings:
    """The defaults, with one setting from a file."""
    tree: object = value
    for key in reversed(name.split(".")):
        tree = {key: tree}
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump({"run_dir": "a"} | tree if isinstance(tree, dict) else {}))
    return parse(schema, ["--config", str(path)], prog="test")


def names_of(schema: Pipeline) -> dict[str, object]:
    """Every setting with its default."""
    return flatten(to_dict(parse(schema, ["--run_dir", "a"], prog="test")))


@pytest.mark.parametrize("schema", PIPELINES)
def test_any_misspelt_setting_is_refused_with_the_right_name_k01(schema: Pipeline, tmp_path: Path) -> None:
    for name in names_of(schema):
        misspelt = name + name[-1]
        with pytest.raises(UserError, match=rf"unknown setting '{misspelt}'; did you mean {name}\?$"):
            from_yaml(schema, misspelt, 1, tmp_path)
        with pytest.raises(UserError, match=rf"{misspelt}.*--{name}\b"):
            parse(schema, ["--run_dir", "a", f"--{misspelt}", "1"], prog="test")


@pytest.mark.parametrize("schema", PIPELINES)
@pytest.mark.parametrize("value", [math.nan, -1, -0.5, -math.inf, "word", {"a": 1}, [[1]]])
def test_no_setting_takes_a_number_or_a_type_that_has_no_meaning_k02(
    schema: Pipeline, value: object, tmp_path: Path
) -> None:
    texts = {"run_dir", "resume", "init", "eval_shards", "data.shards", "data.cache_dir", "data.index"}
    # Unknown targets are refused at the start of a run.
    texts |= {"evaluation.eval_shards", "tracker_project", "export.targets"}
    for name in names_of(schema):
        if value == "word" and name in texts:
            continue
        with pytest.raises(UserError, match=name.rpartition(".")[2]):
            from_yaml(schema, name, value, tmp_path)


@pytest.mark.parametrize("schema", PIPELINES)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0), ("epochs", math.inf), ("batch_size", 0), ("batch_size", 2.5), ("batch_size", True),
        ("checkpoint_every", 0), ("keep_checkpoints", 0), ("micro_batch_size", 0), ("timeout", 0),
        ("timeout", math.inf), ("ema_decay", 0), ("ema_decay", 1),
        ("optim.base_lr", 0), ("optim.base_lr", math.inf), ("optim.min_lr", math.inf), ("optim.clip_grad", 0),
        ("optim.betas", [0.9, 1.0]), ("optim.betas", [0.9]), ("optim.betas", 0.9),
        ("data.image_size", 0), ("data.image_size", []), ("data.image_size", [8, 8, 8]), ("data.mean", 2.0),
        ("data.crop_pct", 0), ("data.crop_pct", 1.5), ("augment.crop_scale", [0, 1]), ("augment.rand_augment", 31),
        ("model.size", "gigantic"), ("model.depth", 0), ("precision", "fp16"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_name_k02(
    schema: Pipeline, name: str, value: object, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=name):
        from_yaml(schema, name, value, tmp_path)


@pytest.mark.parametrize("schema", PIPELINES)
def test_rand_augment_of_earlier_versions_is_read_as_it_is_named_today(schema: Pipeline, tmp_path: Path) -> None:
    """They saved torchvision's magnitude, and 0 for none; users have it in files and flags."""
    for earlier, name in ((0, "none"), (9, "torchvision-9"), ("9", "torchvision-9"), ("rand-m9", "rand-m9")):
        assert from_yaml(schema, "augment.rand_augment", earlier, tmp_path).augment.rand_augment == name
        flags = ["--run_dir", "a", "--augment.rand_augment", str(earlier)]
        assert parse(schema, flags, prog="test").augment.rand_augment == name
    for other in (31, -1, 9.0, True, None):
        with pytest.raises(UserError, match=r"augment\.rand_augment") as caught:
            from_yaml(schema, "augment.rand_augment", other, tmp_path)
        assert "\n" not in str(caught.value)


def test_random_erasing_is_for_fine_tuning_only(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"augment\.erase is 0\.25; allowed: 0 in pretraining"):
        from_yaml(PretrainSettings, "augment.erase", 0.25, tmp_path)
    assert from_yaml(FinetuneSettings, "augment.erase", 0.25, tmp_path).augment.erase == 0.25


@pytest.mark.parametrize("value", [0, 1, 1.5, 75])
def test_a_mask_ratio_outside_0_and_1_is_refused_k02_n07(value: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.mask_ratio is .*; allowed: above 0 and below 1"):
        from_yaml(PretrainSettings, "model.mask_ratio", value, tmp_path)


@pytest.mark.parametrize("value", [0.999, 1e-20])
def test_a_mask_ratio_that_hides_or_keeps_no_patch_is_refused_n07(value: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.mask_ratio is .* at least 1 .* hides at least 1 of the 196 patches"):
        from_yaml(PretrainSettings, "model.mask_ratio", value, tmp_path)


@pytest.mark.parametrize("schema", PIPELINES)
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("data.image_size", 225, "model.patch_size is 16x16; allowed: divisors of the image size 225x225"),
        ("data.image_size", [224, 200], "divisors of the image size 224x200"),
        ("model.patch_size", 15, "model.patch_size is 15x15"),
        ("model.patch_size", 448, "model.patch_size is 448x448"),
        ("model.heads", 7, "model.heads is 7; allowed: a divisor of the width 768"),
        ("model.width", 770, "model.width is 770; allowed: a multiple of 4"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused_at_parsing_k03(
    schema: Pipeline, name: str, value: object, words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        from_yaml(schema, name, value, tmp_path)


def test_a_decoder_that_cannot_be_built_is_refused_at_parsing_k03(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.decoder_heads is 7; allowed: a divisor of the width 512"):
        from_yaml(PretrainSettings, "model.decoder_heads", 7, tmp_path)


@pytest.mark.parametrize("schema", PIPELINES)
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("optim.warmup_epochs", 800, "optim.warmup_epochs is 800.0; allowed: less than epochs = "),
        ("optim.min_lr", 1, "optim.min_lr is 1.0; allowed: at most the peak learning rate 0.00"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_k07(
    schema: Pipeline, name: str, value: object, words: str, tmp_path: Path
) -> None:
    settings = from_yaml(schema, name, value, tmp_path)
    with pytest.raises(UserError, match=re.escape(words)):
        cosine_schedule(settings.optim, settings.batch_size, settings.epochs, 1.0, 100)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("shards", "holds no run"),
        ("shards/run", "in the folder of the shards"),
        ("shards/runs/deeper", "in the folder of the shards"),
        ("link/run", "in the folder of the shards"),
        ("file", "is a file"),
        ("file/run", "cannot be written"),
    ],
)
def test_a_run_dir_in_a_place_that_is_not_its_own_is_refused_k08(
    place: str, words: str, make_shards: Callable[..., Path], tmp_path: Path
) -> None:
    shards = make_shards([5])
    (tmp_path / "link").symlink_to(shards)
    (tmp_path / "file").touch()
    flags = ["--data.shards", f"{shards}/*.tar", "--run_dir", str(tmp_path / place), "--batch_size", "5"]
    flags += ["--epochs", "1", "--optim.warmup_epochs", "0", "--data.image_size", "8", "--data.channels", "1"]
    flags += ["--data.workers", "0", "--model.width", "8", "--model.depth", "1", "--model.heads", "2"]
    flags += ["--model.patch_size", "4", "--model.decoder_width", "8", "--model.decoder_depth", "1"]
    settings = parse(PretrainSettings, [*flags, "--model.decoder_heads", "2"], prog="test")
    with pytest.raises(UserError, match=rf"run_dir .*{place} .*{words}"):
        run(settings)
    assert [path.name for path in shards.iterdir()] == ["train-000000.tar"]
    assert (tmp_path / "file").read_bytes() == b""
