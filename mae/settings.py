"""Settings: frozen dataclasses, filled from a YAML file and from flags by one strict parser.

The entries of the YAML file become flags: both go through tyro, so a value means the same and fails the same in either
place. Flags win over the file.
"""

import dataclasses
import difflib
import io
import os
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from enum import Enum
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import tyro
import yaml

from mae.errors import UserError, is_rank_zero
from mae.help import help_of
from mae.output import be_quiet
from mae.run_files import METRICS_FILE, SETTINGS_FILE
from mae.schema import as_today, settings_of, values_before
from mae.yaml_files import load_yaml

Settings = TypeVar("Settings")

# Flag of every command.
_QUIET = "--quiet"
# Codes that change the colour of a terminal, in which tyro writes its complaints.
_COLORS = re.compile(r"\x1b\[[0-9;]*m")


def parse(schema: type[Settings], argv: Sequence[str], prog: str) -> Settings:
    """Fill the dataclass `schema` from `argv`, in which `--config FILE` names a YAML file to start from.

    `--help` prints the help of the command `prog` and ends the program; `--quiet` lets it print less.

    Raises:
        UserError: for an unknown key, a wrong type, a value out of range or an unreadable file.
    """
    if {"-h", "--help"} & set(argv):
        sys.stdout.write(help_of(schema, prog) if is_rank_zero() else "")
        raise SystemExit(0)
    path, flags = _split_config_flag([word for word in argv if word != _QUIET])
    if _QUIET in argv:
        be_quiet()
    words = [*(_flags_of_file(path, schema) if path else ()), *_spelt_out(flags, set(_switches(schema)))]
    settings, words = _parse_with_inherited(schema, words, prog)
    earlier = _earlier_values(schema, path, getattr(settings, "run_dir", None))
    return _parse(schema, [*earlier, *words], prog) if earlier else settings


def to_dict(settings: Any) -> dict[str, Any]:
    """Return the nested mapping of plain values that `dump` writes and `parse` reads back."""
    return {field.name: plain(getattr(settings, field.name)) for field in dataclasses.fields(settings)}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping with full names: `{"data": {"workers": 2}}` becomes `{"data.workers": 2}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def changed_settings(schema: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the values, plain ones by full name, that differ from the defaults of `schema`."""
    defaults = {setting.name: plain(setting.default) for setting in settings_of(schema)}
    return {name: value for name, value in values.items() if defaults.get(name) != value}


def dump(settings: Any) -> str:
    """Return the settings as YAML text, which `mae COMMAND --config` reads back to an equal dataclass."""
    return yaml.safe_dump(to_dict(settings), sort_keys=False, allow_unicode=True)


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """Return flags for the values of settings, by their full names."""
    words: list[str] = []
    for name, value in values.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return words


def check(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise a `UserError` that names the setting, its value and what is allowed unless `condition` holds."""
    if not condition:
        raise UserError(f"{name} is {value}; allowed: {allowed}")


def check_name(name: str, path: Path) -> None:
    """Raise a `UserError` that names the setting if its path is not UTF-8: safetensors cannot open a file there."""
    try:
        os.fsencode(path).decode()
    except UnicodeError:
        raise UserError(f"{name} is {str(path)!a}; allowed: a path that is UTF-8 text") from None


def _split_config_flag(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Return the path of `--config FILE` or `--config=FILE`, and the other arguments."""
    path: Path | None = None
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--config" or word.startswith("--config="):
            value = word.partition("=")[2] if "=" in word else next(words, None)
            if not value:
                raise UserError("--config needs the path of a YAML file")
            if path is not None:
                raise UserError(f"--config is given twice ({path} and {value}); give it once")
            path = Path(value)
        else:
            rest.append(word)
    return path, rest


def _spelt_out(flags: Sequence[str], switches: set[str]) -> Iterator[str]:
    """Yield the flags with `True` after each switch that has no value: `--check` is short for `--check True`."""
    for word, following in zip_longest(flags, flags[1:], fillvalue=""):
        yield word
        if word in switches and following not in ("True", "False"):
            yield "True"


def _parse_with_inherited(schema: type[Settings], words: list[str], prog: str) -> tuple[Settings, list[str]]:
    """Return the settings and the words that give them, with those that the schema inherits.

    If there is nothing to inherit from, the settings may still be valid: the run says later what it misses.
    """
    missing: UserError | None = None
    if hasattr(schema, "inherited"):
        try:
            words = [*schema.inherited(_given(words)), *words]  # type: ignore[attr-defined]
        except UserError as error:
            missing = error
    try:
        return _parse(schema, words, prog), words
    except UserError:
        if missing is not None:
            raise missing from None
        raise


def _given(words: Sequence[str]) -> dict[str, str]:
    """Return the values of each setting that the words give, joined by spaces, by the full name of the setting."""
    given: dict[str, str] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            flag, _, value = word[2:].partition("=")
            name = flag.replace("-", "_")
            given[name] = value
        else:
            given[name] = f"{given.get(name, '')} {word}".lstrip()
    return given


def _switches(schema: type) -> Iterator[str]:
    """Yield the flags whose value is True or False."""
    return (f"--{setting.name}" for setting in settings_of(schema) if setting.annotation is bool)


def _parse(schema: type[Settings], words: Sequence[str], prog: str) -> Settings:
    """Let tyro fill the schema, and turn its complaint into a `UserError` of one line."""
    complaint = io.StringIO()
    try:
        with redirect_stderr(complaint):
            return tyro.cli(
                schema,
                args=words,
                prog=prog,
                use_underscores=True,
                console_outputs=is_rank_zero(),
                config=(tyro.conf.FlagConversionOff,),
            )
    except SystemExit as end:
        if end.code in (0, None):
            raise
        raise UserError(_one_line(complaint.getvalue())) from None


def _earlier_values(schema: type, config: Path | None, run_dir: Path | None) -> list[str]:
    """Return flags for settings that are newer than the run in `run_dir` or the run that saved `config`.

    These were added since then, or had a default that was changed since then, and the run has it.
    """
    before = values_before(schema)
    if not before:
        return []
    # It is the log that tells the settings of a run from those that somebody wrote.
    files = [config] if config and config.name == SETTINGS_FILE and (config.parent / METRICS_FILE).exists() else []
    if run_dir and (run_dir / SETTINGS_FILE).exists():
        files.append(run_dir / SETTINGS_FILE)
    words: list[str] = []
    for file in files:
        try:
            saved = flatten(load_yaml(file))
        except UserError:  # the run is refused later, where that can be recorded in its folder
            continue
        kept = {
            name: value
            for name, value in before.items()
            if name not in saved or as_today(schema, name, saved[name]) == plain(value)
        }
        words += as_flags(kept)
    return words


def _flags_of_file(path: Path, schema: type) -> Iterator[str]:
    return _flags(load_yaml(path), schema, path, getattr(schema, "REMOVED", {}))


def _flags(
    tree: Mapping[str, Any], schema: type, path: Path, removed: Mapping[str, Any], prefix: str = ""
) -> Iterator[str]:
    """Yield the entries of a YAML file as flags; of removed settings only the last default is accepted."""
    hints = get_type_hints(schema)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(schema)}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key not in fields:
            gone = flatten({name: value})
            if not gone or not gone.keys() <= removed.keys():
                raise UserError(f"{path}: unknown setting {name!r}{_nearest(str(key), list(fields), prefix)}")
            for old, found in gone.items():
                check(found == removed[old], f"{path}: {old}", found, f"{removed[old]}, since this setting was removed")
            continue
        section = fields[key]
        if dataclasses.is_dataclass(section):
            if not isinstance(value, Mapping):
                raise UserError(f"{path}: {name} is a section of settings, got {value!r}")
            assert isinstance(section, type)
            yield from _flags(value, section, path, removed, f"{name}.")
        elif isinstance(value, Mapping):
            raise UserError(f"{path}: {name} takes a value, got a section of settings")
        else:
            yield f"--{name}"
            yield from _words(as_today(schema, key, value), section, f"{path}: {name}")


def _words(value: object, annotation: Any, name: str) -> Iterator[str]:
    """Yield the words that follow a flag.

    tyro sees text only, and finds most wrong types itself. Refused here are those that it could not recognise: YAML
    reads `no`, `1_000` and `12:30` as False, 1000 and 750.
    """
    options = get_args(annotation) if get_origin(annotation) in (typing.Union, types.UnionType) else (annotation,)
    tuples = [option for option in options if get_origin(option) is tuple]
    if isinstance(value, list) and not tuples:
        raise UserError(f"{name} takes one value, got a list")
    allowed = {*options, *(item for option in tuples for item in get_args(option))}
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, list | Mapping):
            raise UserError(f"{name} takes plain values, got a list of lists or of sections")
        is_none = item is None and type(None) in allowed
        if allowed & {str, Path} and not isinstance(item, str) and not is_none:
            raise UserError(f"{name} takes text, got {item!r}; put it in quotes")
        yield str(item)


def _nearest(key: str, known: list[str], prefix: str) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    if close:
        return f"; did you mean {prefix}{close[0]}?"
    return f"; known here: {', '.join(prefix + name for name in known)}"


def plain(value: Any) -> Any:
    """Return a value of a setting as YAML and JSON hold it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def _one_line(boxed: str) -> str:
    """Return a complaint of tyro, which is a box of several lines, as one line."""
    lines = []
    for raw in _COLORS.sub("", boxed).splitlines():
        line = raw.strip("│╭╮╰╯─ ")
        if raw.lstrip().startswith("╭") or not line:
            continue
        lines.append(line)
    return " ".join(" ".join(lines).split())
