"""How far a gateway is with announcing the failure of another one, as it posts it into the bank for `monitor`; and what
several gateways that announce the same failure say together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from bridge.stub import bank_keys
from bridge.stub.types import printable

OCTETS_MAX: Final = 100_000
"""of what a gateway writes; more is not read"""
FAILURES_MAX: Final = 64
"""of one gateway; more are not shown"""
SHOWN_SECONDS: Final = 600.0
"""that a failure is posted after its announcements have ended"""
RUNNING: Final = "running"


class FailoverProgress(msgspec.Struct):
    """One failure, as one gateway sees it. Numbers of sessions."""

    gateway: str
    """the one that failed"""
    state: str
    """running, done, stopped"""
    reason: str
    """why it was stopped"""
    stubs: int
    """of the failed gateway"""
    sessions: int
    """of these, those that this gateway may announce"""
    under_way: int
    announced: int
    resumed: int
    """announced by this gateway, and resumed or ended since"""
    refused: int
    silent: int
    elsewhere: int
    """resumed or ended, and not announced by this gateway"""
    seconds: float

    @property
    def over(self) -> int:
        """Sessions that do not wait for anything any more."""
        return self.resumed + self.elsewhere

    @property
    def left(self) -> int:
        """Sessions that go on once their clients' dead peer detection has noticed."""
        return 0 if self.state == RUNNING else max(self.stubs - self.over, 0)


def encode(failures: Iterable[FailoverProgress]) -> str:
    return msgspec.json.encode(list(failures)).decode()


def decode(text: object) -> list[FailoverProgress]:
    """None where it is not what a gateway writes; text in it is made printable."""
    if not isinstance(text, bytes) or len(text) > OCTETS_MAX:
        return []
    try:
        failures = msgspec.json.decode(text, type=list[FailoverProgress])
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return []
    return [
        msgspec.structs.replace(failure, state=printable(failure.state), reason=printable(failure.reason))
        for failure in failures[:FAILURES_MAX]
        if bank_keys.gateway_name(failure.gateway) is not None
    ]


def together(published: Mapping[str, Iterable[FailoverProgress]]) -> list[FailoverProgress]:
    """What all gateways say, by their address, of each failure. A session is announced by one of them at a time, and
    each of them knows how many are over."""
    merged: dict[str, FailoverProgress] = {}
    for failure in (failure for failures in published.values() for failure in failures):
        before = merged.get(failure.gateway)
        if before is None:
            merged[failure.gateway] = failure
            continue
        resumed = before.resumed + failure.resumed
        over = max(resumed, before.over, failure.over)
        merged[failure.gateway] = FailoverProgress(
            failure.gateway,
            RUNNING if RUNNING in (before.state, failure.state) else max(before.state, failure.state),
            before.reason or failure.reason,
            max(before.stubs, failure.stubs),
            max(before.sessions, failure.sessions),
            before.under_way + failure.under_way,
            before.announced + failure.announced,
            resumed,
            before.refused + failure.refused,
            before.silent + failure.silent,
            over - resumed,
            max(before.seconds, failure.seconds),
        )
    return [merged[gateway] for gateway in sorted(merged)]
