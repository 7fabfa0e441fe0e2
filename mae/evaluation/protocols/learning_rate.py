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
        """A sentence if no larger or no smaller rate was tried than the best, which may then be too small or large."""
        edges = {min(self.tried): "smallest", max(self.tried): "largest"} if len(self.tried) > 1 else {}
        return f"chosen learning rate is the {edges[self.rate]} tried" if self.rate in edges else None


def choose_rate(rates: Sequence[float], measure: Callable[[float], float]) -> RateChoice:
    """Return the rate with the greatest accuracy; of several, the middle one.

    If it is the smallest or largest of several, a third or three times as much is tried as well, three times at most.
    """
    tried = {rate: measure(rate) for rate in sorted(rates)}
    for _ in range(MOST_MORE if len(tried) > 1 else 0):
        best = _best(tried)
        if best not in (min(tried), max(tried)):
            break
        beyond = float(f"{best * _FACTOR if best == max(tried) else best / _FACTOR:.2g}")
        tried = dict(sorted({**tried, beyond: measure(beyond)}.items()))
    return RateChoice(_best(tried), max(tried.values()), tried)


def _best(tried: dict[float, float]) -> float:
    equal = [rate for rate, accuracy in tried.items() if accuracy == max(tried.values())]
    return equal[len(equal) // 2]
