"""Names that tell apart what is judged beside each other."""

from collections.abc import Mapping, Sequence
from typing import Any


def distinct_names(names: Sequence[str], facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names, each of which several have followed by the facts in which these differ.

    Args:
        names: A name for each.
        facts: What is known of each, by the name of the fact.
    """
    found = []
    for name, own in zip(names, facts, strict=True):
        same = [each for other, each in zip(names, facts, strict=True) if other == name]
        differing = [fact for fact, value in own.items() if any(each.get(fact) != value for each in same)]
        words = ", ".join(f"{fact} {_word(own[fact])}" for fact in differing)
        found.append(f"{name} ({words})" if words else name)
    return found


def _word(value: Any) -> str:
    if not isinstance(value, tuple | list):
        return str(value)
    return " ".join(map(str, value[:1] if len(set(value)) == 1 else value))
