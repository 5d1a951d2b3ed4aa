"""The client's sessions: the IKE_SAs to its configured gateways that are up, or that were lost and can be resumed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from bridge.charon.charon import Charon
from bridge.charon.ike_sa import IkeSa
from bridge.charon.vici_types import SaInfo
from bridge.config import GatewayEntry

LOST_SECONDS = 86_400.0
"""how long an SA that charon gave up can still be resumed from here, unless it expires before"""
ENDED = 64
"""sessions that one of the sides ended, remembered until the HA channel says so too"""


class Sessions:
    """One of each configured connection at most. `clock` gives monotonic seconds, `wall` Unix ones."""

    def __init__(
        self,
        charon: Charon,
        gateways: Sequence[GatewayEntry],
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._charon = charon
        self._names = tuple(dict.fromkeys(gateway.connection for gateway in gateways))
        self._clock = clock
        self._wall = wall
        self._lost: dict[str, tuple[IkeSa, float]] = {}
        self._leaving: set[bytes] = set()
        self._ended: deque[bytes] = deque(maxlen=ENDED)

    def __iter__(self) -> Iterator[IkeSa]:
        """Those that could be resumed now."""
        return iter([sa for name in self._names if (sa := self.find(name)) is not None])

    def configured(self, connection: str) -> bool:
        """Whether a connection leads to one of the configured gateways."""
        return connection in self._names

    def up(self) -> bool:
        """Whether there is an IKE_SA to any of them."""
        return any(sa.connection in self._names for sa in self._charon.tracker.established())

    def default(self) -> str | None:
        """The first configured connection that is up, else the first that was lost, else one that is up and cannot be
        resumed."""
        up = {sa.connection for sa in self._charon.tracker.established() if sa.resumable}
        return (
            next((name for name in self._names if name in up), None)
            or next((name for name in self._names if self.find(name) is not None), None)
            or next((name for name in self._names if self.unresumable(name) is not None), None)
        )

    def find(self, connection: str) -> IkeSa | None:
        """The youngest SA of a connection that is up, or the one that was lost."""
        alive = [sa for sa in self._charon.tracker.established() if sa.connection == connection and sa.resumable]
        if alive:
            return max(alive, key=lambda sa: sa.seen)
        sa, until = self._lost.get(connection, (None, 0.0))
        if sa is not None and (until < self._clock() or (sa.expires and sa.expires < self._wall())):
            self._lost.pop(connection)
            return None
        return sa

    def unresumable(self, connection: str) -> IkeSa | None:
        """The SA of a connection that is up and cannot be resumed by its kind."""
        every = self._charon.tracker.established()
        return next((sa for sa in every if sa.connection == connection and not sa.resumable), None)

    def lost(self) -> str | None:
        """The connection of one that was lost."""
        return next(iter(self._lost), None)

    def lose(self, sa: IkeSa) -> None:
        """It is gone, and can be resumed."""
        self._lost[sa.connection] = (sa, self._clock() + LOST_SECONDS)

    def replaced(self, connection: str) -> None:
        """Nothing of a connection is to be resumed any more."""
        self._lost.pop(connection, None)

    def replaced_all(self) -> None:
        """A session begun anew stands for all that were lost."""
        self._lost.clear()

    # what charon says

    def gone(self, sa: IkeSa) -> None:
        """charon ended an SA. Until VICI says why, it may have to be resumed."""
        spis = sa.id.spis
        if spis not in self._leaving and spis not in self._ended and sa.resumable and self.configured(sa.connection):
            self.lose(sa)

    def ended(self, info: SaInfo) -> None:
        """One of the sides ended it: nothing to resume."""
        self.replaced(info.connection)
        self._ended.append(info.spis)

    @contextmanager
    def leaving(self, sa: IkeSa) -> Iterator[None]:
        """While the sidecar itself takes an SA out of charon, its end is no news."""
        self._leaving.add(sa.id.spis)
        try:
            yield
        finally:
            self._leaving.discard(sa.id.spis)

    def is_leaving(self, spis: bytes) -> bool:
        """Whether the sidecar is taking that SA out of charon just now."""
        return spis in self._leaving
