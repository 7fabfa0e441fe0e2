"""Description of settings: type, default, and what a change of each means for a run.

    log_every: MayChange[int] = 50
    new_order: Annotated[int, Before(1)] = 2
    colour: Annotated[str, Formerly(name_of_number)] = "red"

A settings class may also have these class variables: `EXAMPLE`, a command line for its help; `FIRST`, the full names of
the settings that its help shows first; `REMOVED`, the last default of each setting that it no longer has, by full name.
Its static method `inherited` may return flags for settings that are not given, from the names and values of those that
are.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple, TypeVar, get_args, get_type_hints

T = TypeVar("T")

REQUIRED = dataclasses.MISSING
"""Default of a setting that has none."""
_MAY_CHANGE = object()
MayChange = Annotated[T, _MAY_CHANGE]
"""Type of a setting that may change when a run is resumed: it changes speed, places or what is shown, never weights."""


@dataclasses.dataclass(frozen=True)
class Before:
    """Value that a setting has in runs from before it was added, or its default in runs from before that was changed.

    A new setting needs it only if its default is another.
    """

    value: Any


@dataclasses.dataclass(frozen=True)
class Formerly:
    """How the values of a setting are read that are written as in earlier versions; all others stay as they are."""

    read: Callable[[Any], Any]


class Setting(NamedTuple):
    """One setting of a settings class or of one of its sections."""

    name: str
    """Full name, such as `data.workers`."""
    annotation: Any
    marks: tuple[Any, ...]
    """Metadata of the annotation."""
    default: Any
    owner: type
    """Class that it is read from."""

    @property
    def may_change(self) -> bool:
        """Whether it may change when a run is resumed."""
        return _MAY_CHANGE in self.marks


def settings_of(schema: type, prefix: str = "", section: Any = None) -> Iterator[Setting]:
    """Yield the settings of a dataclass and of its sections, in order of declaration.

    The defaults are those of `schema`, or the values of `section`, an instance of it.
    """
    hints = get_type_hints(schema, include_extras=True)
    for field in dataclasses.fields(schema):
        marks = getattr(hints[field.name], "__metadata__", ())
        annotation = get_args(hints[field.name])[0] if marks else hints[field.name]
        default = _default(field) if section is None else getattr(section, field.name)
        if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
            yield from settings_of(annotation, f"{prefix}{field.name}.", default)
        else:
            yield Setting(prefix + field.name, annotation, marks, default, schema)


def values_before(schema: type) -> dict[str, Any]:
    """Return the value of each setting marked `Before` in runs that are older than it, by full name."""
    marked = ((setting.name, mark) for setting in settings_of(schema) for mark in setting.marks)
    return {name: mark.value for name, mark in marked if isinstance(mark, Before)}


def as_today(schema: type, name: str, value: Any) -> Any:
    """Return the value of a setting, by its full name, in today's form if it is in that of an earlier version."""
    marks = (mark for setting in settings_of(schema) if setting.name == name for mark in setting.marks)
    return next((mark.read(value) for mark in marks if isinstance(mark, Formerly)), value)


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
