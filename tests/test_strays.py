"""Messages about IKE_SAs that are not here (bridge.gateway.strays)."""

from __future__ import annotations

from typing import cast

from bridge.gateway import strays
from bridge.gateway.metrics import GatewayMetrics
from bridge.gateway.strays import Strays
from bridge.net.interface import Packet
from role_support import Request


def test_more_than_clients_send_are_a_flood_for_a_while() -> None:
    now, metrics = [100.0], GatewayMetrics()
    made = Strays(metrics, clock=lambda: now[0])
    requests = [Request("192.0.2.9", b"") for _ in range(int(strays.RATE) + 1)]
    for request in requests[:-1]:
        made.take(cast(Packet, request))
    assert not made.are_a_flood
    made.take(cast(Packet, requests[-1]))
    assert made.are_a_flood
    assert {tuple(request.fate) for request in requests} == {("dropped",)}
    assert metrics.values()["stray_messages_total"] == len(requests)
    now[0] += strays.HOLD_SECONDS
    assert not made.are_a_flood
