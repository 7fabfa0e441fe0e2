"""Text of `mae COMMAND --help`, made from a settings class: types, defaults, and the docstrings below the fields."""

import ast
import inspect
import shutil
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent, wrap
from typing import Any, get_args, get_origin

from tyro.conf import Positional

from mae.schema import REQUIRED, Setting, settings_of

_POSITIONAL = Positional[str].__metadata__[0]  # type: ignore[attr-defined]  # it is an `Annotated`
_WORDS: dict[Any, str] = {int: "integer", float: "number", str: "text", Path: "path", bool: "True | False"}
_COUNTS = {2: "two", 3: "three", 4: "four"}
_MOST_COLUMNS = 100


def help_of(schema: type, prog: str) -> str:
    """Return the help of the command `prog`, whose settings are `schema`, wrapped to the width of the terminal."""
    columns = min(shutil.get_terminal_size().columns, _MOST_COLUMNS)
    settings = {setting.name: setting for setting in settings_of(schema)}
    words = [setting.name.upper() for setting in settings.values() if _POSITIONAL in setting.marks]
    first = [*(word.lower() for word in words), *getattr(schema, "FIRST", ())]
    groups = {"Most used:": [settings.pop(name) for name in first]}
    for setting in settings.values():
        section = setting.name.rpartition(".")[0]
        title = f"{section}: {inspect.getdoc(setting.owner)}" if section else "Others:" if first else "Settings:"
        groups.setdefault(title, []).append(setting)

    lines = [f"usage: {' '.join([prog, *words])} [--config FILE] [--setting value ...]"]
    for paragraph in (inspect.getdoc(schema) or "").split("\n\n"):
        lines += ["", *_wrapped(paragraph, columns)]
    lines += ["", "Example:", f"  {schema.EXAMPLE}"] if hasattr(schema, "EXAMPLE") else []
    lines += ["", *_entry("--config FILE", "Read settings from a YAML file first; flags win over it.", columns)]
    lines += _entry("--quiet", "Print errors, warnings and the result only.", columns)
    for title, group in groups.items():
        lines += ["", *_wrapped(title, columns)] if group else []
        for setting in group:
            lines += _entry(_heading(setting), f"{_doc(setting)} ({_remarks(setting)})", columns)
    return "\n".join(lines) + "\n"


def _heading(setting: Setting) -> str:
    """Return the flag, or the name of a positional word, and its type."""
    name = setting.name.upper() if _POSITIONAL in setting.marks else f"--{setting.name}"
    return f"{name}  {describe_type(setting.annotation)}"


def describe_type(annotation: Any) -> str:
    """Return a type as a person would write it, such as `two numbers, or None`."""
    options = get_args(annotation) if get_origin(annotation) in (typing.Union, types.UnionType) else (annotation,)
    words = " | ".join(_word(option) for option in options if option is not types.NoneType)
    return words + (", or None" if types.NoneType in options else "")


def _word(annotation: Any) -> str:
    if get_origin(annotation) is typing.Literal:
        return " | ".join(map(str, get_args(annotation)))
    if get_origin(annotation) is not tuple:
        return _WORDS[annotation]
    kind, *others = get_args(annotation)
    if get_origin(kind) is typing.Literal:
        return f"one or more of {_word(kind)}"
    count = "" if others == [...] else f"{_COUNTS[len(others) + 1]} "
    return f"{count}{_WORDS[kind]}s"


def _remarks(setting: Setting) -> str:
    """Return the default of a setting, and whether it may change."""
    default = "required" if setting.default is REQUIRED else f"default: {_shown(setting.default)}"
    return default + ("; may change on resume" if setting.may_change and setting.default is not REQUIRED else "")


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_shown, value)) or "none given"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _doc(setting: Setting) -> str:
    """Return the docstring below a field, in its class or in the nearest base class that has one."""
    name = setting.name.rpartition(".")[2]
    docs = (dict(_docs(owner)) for owner in setting.owner.__mro__ if owner is not object)
    return next(found[name] for found in docs if name in found)


def _docs(owner: type) -> Iterator[tuple[str, str]]:
    """Yield name and docstring of each field that a class itself declares."""
    (tree,) = ast.parse(dedent(inspect.getsource(owner))).body
    assert isinstance(tree, ast.ClassDef)
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield name, text


def _entry(heading: str, text: str, columns: int) -> list[str]:
    first = wrap(
        heading,
        columns,
        initial_indent="  ",
        subsequent_indent=" " * 10,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [*first, *_wrapped(text, columns, indent=" " * 6)]


def _wrapped(text: str, columns: int, indent: str = "") -> list[str]:
    words = " ".join(text.split())
    return wrap(
        words, columns, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
