"""Choice of a learning rate: some to begin with, and more beyond the best as long as it is the smallest or largest."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

_FACTOR = 3.0
MOST_MORE = 3
"""Number of rates, at most, that are tried in addition."""


class RateChoice(NamedTuple):
    """The best learning rate and all that were tried."""

    rate: float
    accuracy: float
    """Accuracy of the best rate on held-out samples, from 0 to 1."""
    tried: dict[float, float]
    """Accuracy of each rate that was tried, from the smallest to the largest."""

    @property
    def remark(self) -> str | None:
        """A sentence if the rates do not differ, or if no larger or no smaller one was tried than the best."""
        if _is_level(self.tried):
            return f"all {len(self.tried)} learning rates that were tried are equally good on held-out samples"
        edges = {min(self.tried): "smallest", max(self.tried): "largest"} if len(self.tried) > 1 else {}
        return f"chosen learning rate is the {edges[self.rate]} tried" if self.rate in edges else None


def choose_rate(rates: Sequence[float], measure: Callable[[float], float]) -> RateChoice:
    """Return the rate with the greatest accuracy; of several, the middle one.

    If it is the smallest or largest of several, a third or three times as much is tried as well, three times at most.
    So are larger ones if all are equally good and none is always right: after a few steps, small rates learn nothing.
    """
    tried = {rate: measure(rate) for rate in sorted(rates)}
    for _ in range(MOST_MORE if len(tried) > 1 else 0):
        best = max(tried) if _is_level(tried) and max(tried.values()) < 1 else _best(tried)
        if best not in (min(tried), max(tried)):
            break
        beyond = float(f"{best * _FACTOR if best == max(tried) else best / _FACTOR:.2g}")
        tried = dict(sorted({**tried, beyond: measure(beyond)}.items()))
    return RateChoice(_best(tried), max(tried.values()), tried)


def _best(tried: dict[float, float]) -> float:
    equal = [rate for rate, accuracy in tried.items() if accuracy == max(tried.values())]
    return equal[len(equal) // 2]


def _is_level(tried: dict[float, float]) -> bool:
    return len(tried) > 1 and len(set(tried.values())) == 1
