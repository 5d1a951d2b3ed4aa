"""Which CHILD_SAs clients send ESP on, over a cable between two namespaces."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from bridge.net.shared_esp import SharedEsp
from net_support import FAMILIES, Wire, ike, inside, until, wire

pytestmark = pytest.mark.lab

PORTS = (500, 4500)


@pytest.fixture(scope="module")
def cable() -> Iterator[Wire]:
    with wire() as made:
        yield made


@pytest.mark.parametrize("family", FAMILIES)
async def test_spis_of_esp_are_heard_in_udp_and_without(cable: Wire, family: str) -> None:
    # charon's own socket gets all of it too
    cable.host.udp(family, 4500)
    with inside(cable.host.namespace):
        esp = SharedEsp(PORTS)
        esp.open()
    with inside(cable.peer.namespace):
        kind = socket.AF_INET if family == "ipv4" else socket.AF_INET6
        plain = socket.socket(kind, socket.SOCK_RAW, socket.IPPROTO_ESP)
    sender = cable.peer.udp(family, 4500)
    there = cable.host.address(family)
    heard: set[int] = set()

    def both() -> bool:
        # IKE behind its marker, and a NAT-keepalive, are none
        sender.sendto(bytes(4) + ike(), (there, 4500))
        sender.sendto(b"\xff", (there, 4500))
        sender.sendto((0xC1000001).to_bytes(4) + bytes(60), (there, 4500))
        plain.sendto((0xC1000002).to_bytes(4) + bytes(60), (there, 0))
        heard.update(esp.read())
        return len(heard) >= 2

    try:
        await until(both)
        assert heard == {0xC1000001, 0xC1000002}
    finally:
        plain.close()
        esp.close()
        cable.close_sockets()
    assert esp.read() == set()
