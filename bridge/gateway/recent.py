"""What happened here lately, for as long as it matters: a set whose entries expire."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Final, Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

RECENT_MAX: Final = 200_000
"""of what is remembered; of more, the oldest are forgotten"""


class Recent(Generic[Key]):
    """What happened here lately; each is remembered for `seconds`."""

    def __init__(self, seconds: float, *, clock: Callable[[], float]) -> None:
        self._seconds = seconds
        self._clock = clock
        self._until: OrderedDict[Key, float] = OrderedDict()

    def add(self, key: Key) -> None:
        """From now on."""
        self._until[key] = self._clock() + self._seconds
        self._until.move_to_end(key)
        self._forget()

    def _forget(self) -> None:
        now = self._clock()
        while self._until and (len(self._until) > RECENT_MAX or next(iter(self._until.values())) < now):
            self._until.popitem(last=False)

    def __len__(self) -> int:
        self._forget()
        return len(self._until)

    def __contains__(self, key: Key) -> bool:
        return self._until.get(key, 0.0) >= self._clock()
