"""No handshake begins in charon while a segment of its ha plugin changes hands.

From strongSwan 6.0.1 on an activation ends the IKE_SAs in state CONNECTING of its segment; 6.0.1 itself crashes then.
So a segment is chosen that has none, as VICI says. A request that charon receives after VICI's answer and before the
activation would begin one in it. Therefore:

    requests that may begin a handshake are held back, by the packet filter and the sidecar
    charon reads what it has received before (bridge.charon.ike_sockets)
    VICI names the handshakes in progress; charon counts requests that it has yet to process, which are waited for
    a segment without any is activated, and what was held back goes on to charon

All of it takes a few milliseconds; a client repeats its request after seconds. Requests also wait, for longer,
for a charon that was just started (bridge.gateway.address_keeper).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from typing import Final, Protocol

UNREAD_SECONDS: Final = 10.0
"""a charon that has not read all that it received for so long is flooded, perhaps with what it ignores: an activation
may then end a handshake, but does not wait any longer"""
Holds = Callable[[], bool]
"""whether no handshake can have begun since, nor begins within a moment"""


class Hold(Protocol):
    """Holds requests back."""

    def can_hold(self) -> bool:
        """Whether it can."""

    def holding(self) -> AbstractContextManager[Holds]:
        """Holds what may begin a handshake back meanwhile."""

    async def read(self) -> bool:
        """Wait until charon has read what came before; whether it has."""


class NoHold:
    """Where nothing can be held back."""

    def can_hold(self) -> bool:
        return False

    @contextlib.contextmanager
    def holding(self) -> Iterator[Holds]:
        yield lambda: True

    async def read(self) -> bool:
        return True


class Handshakes:
    """Those of one charon. `look` asks VICI which are in progress, `look_surely` the same once charon has processed
    what it has read, and returns whether it has."""

    def __init__(
        self,
        look: Callable[[], Awaitable[None]],
        look_surely: Callable[[], Awaitable[bool]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.hold: Hold = NoHold()
        self.ends = False
        """whether an activation ends handshakes in progress of this release, in whatever way"""
        self.crashes = False
        """whether it crashes then"""
        self._look = look
        self._look_surely = look_surely
        self._clock = clock
        self._unread_since: float | None = None
        """since when charon has not once read all that it received"""

    def can_hold(self) -> bool:
        """Whether requests are held back during activations."""
        return self.ends and self.hold.can_hold()

    @contextlib.asynccontextmanager
    async def known(self) -> AsyncIterator[Holds]:
        """Meanwhile those in progress are known, and no other begins, as long as what is given returns True; to be
        asked immediately before an activation."""
        if not self.can_hold():
            await self._look()
            # requests that are held back from now on were not before
            yield lambda: not self.can_hold()
            return
        with self.hold.holding() as holds:
            if not holds():
                yield lambda: False
                return
            sure = await self._read() and await self._look_surely()
            yield lambda: sure and holds()

    async def _read(self) -> bool:
        if await self.hold.read():
            self._unread_since = None
            return True
        now = self._clock()
        if self._unread_since is None:
            self._unread_since = now
        return not self.crashes and now - self._unread_since > UNREAD_SECONDS
