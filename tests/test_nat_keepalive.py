"""Keepalives to the gateways that a client does not use (bridge.client.nat_keepalive)."""

from __future__ import annotations

import asyncio

import pytest

from bridge.charon.ha_message import IkeId
from bridge.charon.ike_sa import Condition, IkeSa
from bridge.client.nat_keepalive import NatKeepalive
from bridge.config import Keepalive
from bridge.ike.transforms import Suite
from bridge.service.tasks import end, spawn
from bridge.stub.types import Endpoint

HERE, OTHER, OTHER6 = "192.0.2.1", "192.0.2.2", "2001:db8::2"


class Wire:
    def __init__(self) -> None:
        self.sent: list[tuple[str, int, str, int, bytes, bool]] = []

    def send(self, src: str, sport: int, dst: str, dport: int, payload: bytes, marker: bool) -> None:
        self.sent.append((src, sport, dst, dport, payload, marker))


def an_sa(conditions: int, local: str = "10.0.0.2") -> IkeSa:
    return IkeSa(
        IkeId.of(b"initiate", b"responds", True),
        Suite(12, 128, 12, 5, 31),
        b"d" * 32,
        up=True,
        local=Endpoint(local, 4500),
        remote=Endpoint(HERE, 4500),
        connection="home",
        conditions=(conditions,),
    )


BEHIND = int(Condition.NAT_ANY | Condition.NAT_HERE)


@pytest.mark.parametrize(
    ("policy", "conditions", "routed", "sent"),
    [
        ("auto", BEHIND, False, True),
        ("auto", 0, True, True),
        ("auto", 0, False, False),
        ("always", 0, False, True),
        ("off", BEHIND, True, False),
    ],
)
async def test_keepalives_are_sent_where_a_nat_or_a_filter_may_be(
    policy: Keepalive, conditions: int, routed: bool, sent: bool
) -> None:
    wire = Wire()
    keepalive = NatKeepalive(
        wire,
        policy,
        lambda: [an_sa(conditions)],
        lambda _: {HERE, OTHER, OTHER6},
        through_router=lambda local, remote: routed,
    )
    task = spawn("keepalive", keepalive.run())
    await asyncio.sleep(0)
    await end(task)
    expected = [("10.0.0.2", 4500, OTHER, 4500, b"\xff", False)] if sent else []
    assert wire.sent == expected


async def test_over_ipv6_they_are_sent_without_a_nat() -> None:
    wire = Wire()
    keepalive = NatKeepalive(wire, "auto", lambda: [an_sa(0, "2001:db8::10")], lambda _: {HERE, OTHER, OTHER6})
    task = spawn("keepalive", keepalive.run())
    await asyncio.sleep(0)
    await end(task)
    assert wire.sent == [("2001:db8::10", 4500, OTHER6, 4500, b"\xff", False)]
