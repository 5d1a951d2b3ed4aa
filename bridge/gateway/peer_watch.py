"""Which of the other gateways have failed, by their heartbeats in the bank. No I/O; times are monotonic seconds.

A heartbeat expires `detect` seconds after it was written. That says something about its gateway only if the bank
worked meanwhile, and for this gateway too: of a bank that stood still, was away, refused writes or has just come back
all heartbeats expire. So a gateway whose heartbeat expired is SUSPECT until this gateway's own heartbeats went through,
each within `detect` / 3, for `CALM` times `detect`; if its heartbeat is still missing then, it is FAILED.

    ALIVE --expired, bank calm----> FAILED --heartbeat--> ALIVE
      '----expired---> SUSPECT --bank calm, still missing--'
                          '--heartbeat--> ALIVE
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from enum import StrEnum
from typing import Final

SAID_ITSELF: Final = "it says so itself: its charon or its uplink is gone, or it was shut down"
"""the reason of a failure after which the gateway has lost its sessions, also if it is back at once"""
CALM: Final = 2.0
"""how many times `detect` the bank has to have worked"""


class PeerState(StrEnum):
    """What is known of another gateway."""

    ALIVE = "alive"
    SUSPECT = "suspect"
    FAILED = "failed"


class Sign(StrEnum):
    """What the bank says of it."""

    HEARTBEAT = "heartbeat"
    EXPIRED = "expired"
    EXPIRED_CALM = "expired-calm"
    """expired, and the bank was calm"""
    DELETED = "deleted"
    """the gateway itself has said that it cannot serve: its charon or its uplink is gone, or it was shut down"""


TRANSITIONS: Final[dict[tuple[PeerState, Sign], PeerState]] = {
    (PeerState.ALIVE, Sign.HEARTBEAT): PeerState.ALIVE,
    (PeerState.ALIVE, Sign.EXPIRED): PeerState.SUSPECT,
    (PeerState.ALIVE, Sign.EXPIRED_CALM): PeerState.FAILED,
    (PeerState.ALIVE, Sign.DELETED): PeerState.FAILED,
    (PeerState.SUSPECT, Sign.HEARTBEAT): PeerState.ALIVE,
    (PeerState.SUSPECT, Sign.EXPIRED): PeerState.SUSPECT,
    (PeerState.SUSPECT, Sign.EXPIRED_CALM): PeerState.FAILED,
    (PeerState.SUSPECT, Sign.DELETED): PeerState.FAILED,
    (PeerState.FAILED, Sign.HEARTBEAT): PeerState.ALIVE,
    (PeerState.FAILED, Sign.EXPIRED): PeerState.FAILED,
    (PeerState.FAILED, Sign.EXPIRED_CALM): PeerState.FAILED,
    (PeerState.FAILED, Sign.DELETED): PeerState.FAILED,
}


class PeerWatch:
    """The states of the other gateways. `failed` is called with a gateway and the reason when it is found to have
    failed, `back` when a failed one has a heartbeat again. `detect` in seconds."""

    def __init__(
        self, detect: float, failed: Callable[[str, str], None], back: Callable[[str], None], now: float
    ) -> None:
        self._detect = detect
        self._failed = failed
        self._back = back
        self._states: dict[str, PeerState] = {}
        self._calm_since = now

    @property
    def suspects(self) -> list[str]:
        """The gateways whose state waits for a calm bank."""
        return [gateway for gateway, state in self._states.items() if state is PeerState.SUSPECT]

    def state(self, gateway: str) -> PeerState:
        """ALIVE for a gateway that nothing is known of."""
        return self._states.get(gateway, PeerState.ALIVE)

    def own_heartbeat(self, written: bool, seconds: float, now: float) -> None:
        """This gateway's heartbeat was written or not, in so many seconds."""
        if not written or seconds > self._detect / 3:
            self._calm_since = now

    def disturbed(self, now: float) -> None:
        """The bank did not answer for a while, or is another one than before."""
        self._calm_since = now

    def calm(self, now: float) -> bool:
        """Whether an expired heartbeat says something about its gateway."""
        return now - self._calm_since >= CALM * self._detect

    def heartbeat(self, gateway: str) -> None:
        """A gateway has written its heartbeat."""
        self._sign(gateway, Sign.HEARTBEAT, "")

    def expired(self, gateway: str, now: float) -> None:
        """A heartbeat has expired."""
        calm = self.calm(now)
        self._sign(gateway, Sign.EXPIRED_CALM if calm else Sign.EXPIRED, "its heartbeat in the bank has expired")

    def deleted(self, gateway: str) -> None:
        """A gateway has taken its heartbeat away itself."""
        self._sign(gateway, Sign.DELETED, SAID_ITSELF)

    def forget(self, gateway: str) -> None:
        """Nothing is known of a gateway any more."""
        self._states.pop(gateway, None)

    def look(self, alive: Collection[str], now: float) -> None:
        """`alive` are the gateways whose heartbeats are in the bank now: decide about the suspects if it is calm."""
        for gateway in self.suspects:
            if gateway in alive:
                self.heartbeat(gateway)
            else:
                self.expired(gateway, now)

    def _sign(self, gateway: str, sign: Sign, reason: str) -> None:
        before = self.state(gateway)
        after = self._states[gateway] = TRANSITIONS[before, sign]
        if after is PeerState.FAILED and before is not after:
            self._failed(gateway, reason)
        elif before is PeerState.FAILED and after is PeerState.ALIVE:
            self._back(gateway)
