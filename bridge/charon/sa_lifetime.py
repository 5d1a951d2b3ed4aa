"""How long an IKE_SA lives, by what VICI reports and what its connection is configured to. No I/O."""

from __future__ import annotations

from typing import Final

from bridge.charon.ike_sa import SAME_SECONDS, IkeSa
from bridge.charon.vici_types import ConnectionInfo, SaInfo, expiry

NO_EXPIRY_SECONDS: Final = 86_400
"""how long the stub of an SA without rekey and reauth time lives; reconciliation renews it"""


def assume(sa: IkeSa, connection: ConnectionInfo | None, now: int) -> None:
    """Until VICI says better: what the connection is configured to, which jitter can only shorten."""
    lifetime = connection.lifetime if connection else 0
    sa.rekey_at = now + connection.rekey_time if connection and connection.rekey_time else 0
    sa.expires = now + (lifetime or NO_EXPIRY_SECONDS)


def take(sa: IkeSa, info: SaInfo, connection: ConnectionInfo | None, now: float) -> bool:
    """Take what VICI said at `now` (Unix seconds); whether that changed the lifetime by more than a second of
    jitter."""
    rekey_at, reauth_at, expires = expiry(info, connection, now)
    if not expires:
        # lives for ever: its stub is renewed in good time, not at every look
        left = sa.expires - now
        expires = sa.expires if left > NO_EXPIRY_SECONDS / 2 else int(now) + NO_EXPIRY_SECONDS
    until = _earlier(sa.authenticated_until, reauth_at) if sa.authentication_inherited else reauth_at
    moved = (
        abs(sa.expires - expires) > SAME_SECONDS
        or abs(sa.rekey_at - rekey_at) > SAME_SECONDS
        or abs(sa.reauth_at - reauth_at) > SAME_SECONDS
        or abs(sa.authenticated_until - until) > SAME_SECONDS
    )
    if moved:
        sa.rekey_at, sa.reauth_at, sa.expires = rekey_at, reauth_at, expires
        sa.authenticated_until = until
    sa.established = int(now) - info.established
    return moved


def _earlier(one: int, other: int) -> int:
    """The earlier of two times, 0 being never."""
    return min(filter(None, (one, other)), default=0)
