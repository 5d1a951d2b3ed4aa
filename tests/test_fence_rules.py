"""The rules of the fence, by nftables and by iptables, on real packets of both families (bridge.net.fence_rules)."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Literal

import pytest

from bridge.net import fence_rules, firewall
from net_support import FAMILIES, Wire, inside, wire

pytestmark = pytest.mark.lab

PORTS = (500, 4500)


@pytest.fixture(scope="module")
def cable() -> Iterator[Wire]:
    with wire() as made:
        yield made


@pytest.fixture(autouse=True)
def _closed(cable: Wire) -> Iterator[None]:
    yield
    cable.close_sockets()


def leaves(cable: Wire, family: str, port: int | None) -> bool:
    """Whether UDP from a port of the host leaves it, or ESP (None)."""
    there = cable.peer.address(family)
    if port is None:
        kind = socket.AF_INET if family == "ipv4" else socket.AF_INET6
        with inside(cable.host.namespace):
            sock = socket.socket(kind, socket.SOCK_RAW, socket.IPPROTO_ESP)
        cable.host.sockets.append(sock)
    else:
        sock = cable.host.udp(family, port)
    with contextlib.suppress(PermissionError):
        sock.sendto(bytes(64), (there, 4500 if port else 0))
        return True
    return False


@pytest.mark.parametrize("backend", ["nftables", "iptables"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ike_and_esp_of_an_address_do_not_leave(
    cable: Wire, family: str, backend: Literal["nftables", "iptables"]
) -> None:
    rules = fence_rules.rules({cable.host.address(family)}, PORTS)
    other = "ipv6" if family == "ipv4" else "ipv4"
    with inside(cable.host.namespace):
        placed = firewall.install(rules, backend=backend)
    try:
        for port in (*PORTS, None):
            assert not leaves(cable, family, port)
            assert leaves(cable, other, port)
        # what is not charon's
        assert leaves(cable, family, 53)
        with inside(cable.host.namespace):
            assert fence_rules.dropped(firewall.look(rules, placed)) == 3
    finally:
        with inside(cable.host.namespace):
            firewall.remove(rules)
    cable.close_sockets()
    assert leaves(cable, family, 4500)
