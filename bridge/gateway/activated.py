"""What is left to do for rebuilt IKE_SAs that charon has active: little, for they are thousands in a storm. No I/O;
times are those of the caller's clock, in seconds."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Final, NamedTuple

from bridge.ike.client_requests import Answered
from bridge.net.interface import Packet
from bridge.stub.types import Endpoint

REPEAT_SECONDS: Final = 30.0
"""for so long after the activation the last answer of the sidecar is sent again to the same request"""


class Way(NamedTuple):
    """Between which ends the messages of an IKE_SA travel."""

    local: Endpoint
    remote: Endpoint

    def is_of(self, packet: Packet) -> bool:
        """Whether a client's packet takes it; from elsewhere charon decides what it means."""
        ends = (packet.src, packet.sport, packet.dst, packet.dport)
        return ends == (self.remote.address, self.remote.port, self.local.address, self.local.port)


class Activated:
    """The IKE_SAs that became active within REPEAT_SECONDS, by both SPIs."""

    def __init__(self) -> None:
        self._since: dict[bytes, float] = {}
        """the oldest first"""
        self._answered: dict[bytes, tuple[Way, Answered]] = {}
        """of these, those on which the sidecar has answered a request"""
        self._unproven: dict[bytes, Hashable] = {}
        """of these, those of which a request that charon verifies proves something, and what"""

    def __contains__(self, spis: bytes) -> bool:
        return spis in self._since

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._since)

    def add(self, spis: bytes, now: float) -> None:
        """One that is active now."""
        self._since[spis] = now

    def answered(self, spis: bytes, way: Way, last: Answered) -> None:
        """The sidecar's last answer on one."""
        self._answered[spis] = way, last

    def prove(self, spis: bytes, kind: Hashable) -> None:
        """A request on one that charon verifies will prove `kind`."""
        self._unproven[spis] = kind

    def proven(self, spis: bytes) -> Hashable | None:
        """What is proven by a request on one that verified, if anything; once."""
        return self._unproven.pop(spis, None)

    def repeated(self, spis: bytes, request: bytes) -> tuple[Way, bytes] | None:
        """The answer that a request got, octet for octet the same as before, and the way of the SA."""
        found = self._answered.get(spis)
        return (found[0], found[1].answer) if found is not None and found[1].request == request else None

    def end(self, spis: bytes) -> None:
        """One is gone."""
        self._since.pop(spis, None)
        self._answered.pop(spis, None)
        self._unproven.pop(spis, None)

    def forget_old(self, now: float) -> None:
        """Forget those for which nothing is left to do."""
        for spis, since in list(self._since.items()):
            if since + REPEAT_SECONDS > now:
                break
            self.end(spis)
