"""Comparison of the settings that a run has saved with those that it is to be resumed with."""

from collections.abc import Mapping
from typing import Any

from mae.schema import REQUIRED, as_today, settings_of, values_before
from mae.settings import flatten, plain, to_dict


def deciding(settings: Any) -> dict[str, Any]:
    """Return the settings that decide the weights, by full name: all that are not marked `MayChange`."""
    flat = flatten(to_dict(settings))
    return {setting.name: flat[setting.name] for setting in settings_of(type(settings)) if not setting.may_change}


def differences(saved: Mapping[str, Any], settings: Any) -> list[str]:
    """Return each difference between saved settings, by full name, and `settings` that would change the weights.

    A setting that was added since then counts as its `Before`, else as its default. One that was removed since then
    makes no difference if it had its last default. Values in the form of an earlier version count as those of today.
    """
    schema, unset = type(settings), "(not set)"
    defaults = {setting.name: setting.default for setting in settings_of(schema)}
    before = {name: plain(value) for name, value in (defaults | values_before(schema)).items() if value is not REQUIRED}
    before |= {name: as_today(schema, name, value) for name, value in saved.items()}
    changed = [
        f"{name} was {_shown(before.get(name, unset), value)}, is {value}"
        for name, value in deciding(settings).items()
        if before.get(name, unset) != value
    ]
    removed = getattr(schema, "REMOVED", {})
    gone = [
        f"{name} was {value}, is " + (f"{removed[name]} since it was removed" if name in removed else unset)
        for name, value in saved.items()
        if name not in defaults and not (name in removed and removed[name] == value)
    ]
    return changed + gone


def _shown(before: Any, now: Any) -> str:
    """Return the text of a saved value, in quotes if without them it would look like the one of now."""
    return repr(before) if str(before) == str(now) else str(before)
