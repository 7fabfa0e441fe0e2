"""Settings of all training pipelines: the micro-batch that is to be found."""

from pathlib import Path

import pytest

from mae.errors import UserError
from mae.settings import dump, parse
from mae.training.settings import TrainSettings, spelled_out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], []),
        (["--batch_size", "auto"], ["--micro_batch_size", "auto"]),
        (["--batch-size=auto"], ["--micro_batch_size=auto"]),
        (
            ["--batch_size", "64", "--batch_size", "auto", "--seed", "1"],
            ["--batch_size", "64", "--micro_batch_size", "auto", "--seed", "1"],
        ),
        (["--run_dir", "auto", "--batch_size"], ["--run_dir", "auto", "--batch_size"]),
        (["--micro_batch_size", "auto"], ["--micro_batch_size", "auto"]),
    ],
)
def test_an_automatic_batch_size_is_that_of_the_micro_batch(words: list[str], expected: list[str]) -> None:
    assert spelled_out(words) == expected


@pytest.mark.parametrize(
    ("value", "parsed", "limit"), [("auto", "auto", None), ("None", None, None), ("8", 8, 8)], ids=str
)
def test_a_micro_batch_is_a_number_or_none_or_to_be_found_in_flags_and_file(
    tmp_path: Path, value: str, parsed: int | str | None, limit: int | None
) -> None:
    settings = parse(TrainSettings, ["--run_dir", "run", "--micro_batch_size", value], prog="train")
    assert settings.micro_batch_size == parsed
    assert settings.micro_batch_limit == limit
    (tmp_path / "settings.yaml").write_text(dump(settings))
    assert parse(TrainSettings, ["--config", str(tmp_path / "settings.yaml")], prog="train") == settings


@pytest.mark.parametrize("value", ["0", "automatic", "1.5"])
def test_any_other_micro_batch_is_refused_k02(value: str) -> None:
    with pytest.raises(UserError, match="micro_batch_size"):
        parse(TrainSettings, ["--run_dir", "run", "--micro_batch_size", value], prog="train")
