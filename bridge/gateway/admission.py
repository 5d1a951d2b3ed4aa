"""Who is served (protocol rule 4): cookies past a number of unconfirmed SAs or a rate of requests, and limits on each
source. No I/O.

A source is an IPv4 address, or the /64 network of an IPv6 address, which one host can have all of. What an address that
has not proved itself does can cost the true owner a cookie, never its turn: the rate that a source is refused
for counts requests with a valid cookie only.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from socket import AF_INET6, inet_pton

from bridge.config import SyncConfig
from bridge.gateway.rate_limit import Rate, SourceRates
from bridge.ike.cookie import Cookies, Glance

HOLD_SECONDS = 5.0
"""once they were asked for, cookies are asked for at least so long"""


class Demand(StrEnum):
    """Why a request must carry a cookie."""

    UNCONFIRMED = "unconfirmed"
    RATE = "rate"
    SOURCE_RATE = "source-rate"
    SOURCE_UNCONFIRMED = "source-unconfirmed"


class Verdict(StrEnum):
    """What becomes of a request, unless it is a Demand."""

    SERVE = "serve"
    REFUSE = "refuse"


Source = str | bytes


def source_of(address: str) -> Source:
    """What the limits count an address as."""
    return inet_pton(AF_INET6, address)[:8] if ":" in address else address


class Admission:
    """Decides on requests before anything is known of them but their address, SPIi, nonce and cookie. `unconfirmed`
    returns how many unconfirmed SAs a source has."""

    def __init__(self, sync: SyncConfig, cookies: Cookies, unconfirmed: Callable[[Source], int]) -> None:
        self._sync = sync
        self._cookies = cookies
        self._rate = Rate(sync.cookie_rate)
        self._busy_until = float("-inf")
        self._busy = Demand.RATE
        """why"""
        self._unproved = SourceRates(sync.source_rate)
        self._proved = SourceRates(sync.source_rate)
        self._unconfirmed = unconfirmed

    def judge(self, seen: Glance, address: str, port: int, load: int, now: float) -> Verdict | Demand:
        """What becomes of a request. `load`: SAs unconfirmed, and requests that wait to become one.

        Nothing is kept of a request that has to come again with a cookie.
        """
        if seen.cookie is not None and self._cookies.valid(seen, address, port, now):
            return Verdict.SERVE if self._proved.take(source_of(address), now) else Verdict.REFUSE
        # a client that was asked comes back with its cookie; its retransmission must not be served before
        if not self._rate.take(now):
            self._busy_until, self._busy = now + HOLD_SECONDS, Demand.RATE
        if load >= self._sync.cookie_threshold:
            self._busy_until, self._busy = now + HOLD_SECONDS, Demand.UNCONFIRMED
        if now < self._busy_until:
            return self._busy
        source = source_of(address)
        if 2 * self._unconfirmed(source) >= self._sync.max_unconfirmed_per_source:
            return Demand.SOURCE_UNCONFIRMED
        if not self._unproved.take(source, now):
            return Demand.SOURCE_RATE
        return Verdict.SERVE

    def challenge(self, seen: Glance, address: str, port: int, now: float) -> bytes:
        """The answer to a request that has to come again with a cookie."""
        return self._cookies.challenge(seen, address, port, now)

    def demanding(self, load: int, now: float) -> bool:
        """Whether every request must carry a cookie now."""
        return load >= self._sync.cookie_threshold or now < self._busy_until

    def full(self, address: str) -> bool:
        """Whether this source has as many unconfirmed SAs as one may have."""
        return self._unconfirmed(source_of(address)) >= self._sync.max_unconfirmed_per_source
