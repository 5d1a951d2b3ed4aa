"""Rates that something may happen at, with bounded memory. No I/O; `now` is monotonic seconds."""

from __future__ import annotations

from collections import OrderedDict

MAX_SOURCES = 16_384
"""sources whose rate is known; of more, those without a request for longest are forgotten"""


class Rate:
    """Up to `per_second` a second, and as many together after a second of rest."""

    __slots__ = ("_paid_until", "_step")

    def __init__(self, per_second: float) -> None:
        self._step = 1.0 / per_second
        self._paid_until = float("-inf")

    def take(self, now: float) -> bool:
        """Whether one more is within the rate; it counts if so."""
        begin = max(self._paid_until, now)
        # half a step of room for what sums of fractions lack
        if begin - now > 1.0 - self._step / 2:
            return False
        self._paid_until = begin + self._step
        return True


class SourceRates:
    """A Rate for each source, the `limit` that sent last."""

    def __init__(self, per_second: float, limit: int = MAX_SOURCES) -> None:
        self._per_second = per_second
        self._limit = limit
        self._rates: OrderedDict[str | bytes, Rate] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rates)

    def take(self, source: str | bytes, now: float) -> bool:
        """Whether one more of this source is within its rate."""
        rate = self._rates.get(source)
        if rate is None:
            if len(self._rates) >= self._limit:
                self._rates.popitem(last=False)
            rate = self._rates[source] = Rate(self._per_second)
        else:
            self._rates.move_to_end(source)
        return rate.take(now)
