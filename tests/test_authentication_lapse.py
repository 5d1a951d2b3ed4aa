"""What a gateway ends, and when, because its client did not authenticate again (bridge.gateway.authentication_end)."""

from __future__ import annotations

from typing import Any, cast

from bridge.charon.charon import Charon
from bridge.charon.ha_channel import ChannelError
from bridge.charon.ha_message import IkeId
from bridge.charon.ike_sa import IkeSa, Trait
from bridge.charon.sa_tracker import SaTracker
from bridge.gateway.authentication_end import AuthenticationEnd
from bridge.gateway.metrics import GatewayMetrics
from bridge.ike.transforms import Suite

NOW = 1_800_000_000


class FakeCharon:
    """Ends SAs at once, unless it cannot."""

    def __init__(self) -> None:
        self.tracker = SaTracker(cast(Any, None), wall=lambda: NOW, clock=lambda: 0.0)
        self.ended: list[bytes] = []
        self.able = True

    async def end_surely(self, sa: IkeSa) -> None:
        if not self.able:
            raise ChannelError("nobody is there")
        self.ended.append(sa.id.spis)
        self.tracker.forget(sa.id)


class Gateway:
    def __init__(self) -> None:
        self.now = NOW
        self.charon = FakeCharon()
        self.watcher = AuthenticationEnd(cast(Charon, self.charon), GatewayMetrics(), wall=lambda: self.now)

    def resumed(self, until: int, reauth_at: int = 0) -> IkeSa:
        sa = IkeSa(IkeId.of(b"I" * 8, b"R" * 8, False), Suite(12, 128, 12, 5, 31), b"d" * 32, up=True)
        sa.authenticated_until, sa.reauth_at, sa.traits = until, reauth_at, Trait.AUTHENTICATION_INHERITED
        self.charon.tracker.adopt(sa)
        self.watcher.watch(sa)
        return sa

    async def ends(self, after: int) -> bool:
        self.now = NOW + after
        await self.watcher.look()
        return bool(self.charon.ended)


async def test_an_ike_sa_is_ended_when_its_authentication_is() -> None:
    gateway = Gateway()
    gateway.resumed(NOW + 600, NOW + 3600)
    assert not await gateway.ends(599)
    assert await gateway.ends(600)


async def test_one_that_charon_reauthenticates_or_ends_in_time_is_left_to_it() -> None:
    gateway = Gateway()
    gateway.resumed(NOW + 600, NOW + 600)
    assert not await gateway.ends(3600)


async def test_one_without_an_end_lives() -> None:
    gateway = Gateway()
    gateway.resumed(0)
    assert not await gateway.ends(10**8)


async def test_an_end_that_came_nearer_counts() -> None:
    gateway = Gateway()
    sa = gateway.resumed(NOW + 600)
    sa.authenticated_until = NOW + 60
    gateway.watcher.watch(sa)
    assert await gateway.ends(60)


async def test_what_cannot_be_ended_now_is_ended_later() -> None:
    gateway = Gateway()
    gateway.resumed(NOW + 600)
    gateway.charon.able = False
    assert not await gateway.ends(600)
    gateway.charon.able = True
    assert await gateway.ends(602)
