"""Requests are held back while segments of charon's change hands (bridge.gateway.interception), with the kernel's
rules and queue."""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from bridge.config import InterceptConfig
from bridge.gateway.interception import Interception
from bridge.net import queue_rules
from bridge.net.nfqueue import Packet
from net_support import FAMILIES, IKE_AUTH, RESPONSE, SA, Wire, ike, inside, received, until, wire

pytestmark = [pytest.mark.lab, pytest.mark.parametrize("family", FAMILIES)]

QUEUE = 4512
HANDSHAKE, ANOTHER = ike(size=200, first=SA), ike(size=201, first=SA)
LATER = ike(IKE_AUTH, size=100)
DESTINATION_OPTIONS = bytes([0, 0, 1, 4, 0, 0, 0, 0])
"""padding (RFC 8200 section 4.2)"""
ROUTER_ALERT = bytes([0x94, 4, 0, 0])


@pytest.fixture(scope="module")
def cable() -> Iterator[Wire]:
    with wire() as made:
        yield made


@pytest.fixture
def sockets(cable: Wire, family: str) -> Iterator[tuple[socket.socket, socket.socket]]:
    """charon's, and a client's."""
    yield cable.host.udp(family, 500), cable.peer.udp(family, 500)
    cable.close_sockets()


@pytest.fixture
def seen() -> list[Packet]:
    """What came to the sidecar, which has it go on to charon."""
    return []


@pytest_asyncio.fixture
async def interception(cable: Wire, seen: list[Packet]) -> AsyncIterator[Interception]:
    def pass_on(batch: list[Packet]) -> None:
        seen.extend(batch)
        for packet in batch:
            packet.accept()

    made = Interception(InterceptConfig(queue=QUEUE), pass_on, lambda: False, lambda: False, tag=b"\x01\x02")
    with inside(cable.host.namespace):
        await made.start()
        yield made
        await made.close()


async def test_a_request_for_a_full_handshake_waits_as_long_as_it_is_held_back(
    interception: Interception, sockets: tuple[socket.socket, socket.socket], seen: list[Packet]
) -> None:
    charon, client = sockets
    assert interception.can_hold()
    with interception.holding() as holds:
        assert holds()
        began = time.monotonic()
        client.sendto(HANDSHAKE, charon.getsockname())
        # longer than the kernel remembers it by itself
        await until(lambda: time.monotonic() > began + 1.2 * queue_rules.HOLD_SECONDS)
        assert holds()
        client.sendto(ANOTHER, charon.getsockname())
        await until(lambda: len(seen) == 2)
        # what belongs to a handshake in progress passes
        client.sendto(LATER, charon.getsockname())
        assert await received(charon) == LATER
    assert [await received(charon) for _ in range(2)] == [HANDSHAKE, ANOTHER]


@pytest.mark.parametrize("exchange", [2, 4], ids=["Main Mode", "Aggressive Mode"])
async def test_of_ikev1_every_first_message_is_held_back_whatever_its_flags(
    interception: Interception, sockets: tuple[socket.socket, socket.socket], exchange: int
) -> None:
    """charon does not look at what is IKEv2's response flag."""
    charon, client = sockets
    first = ike(exchange, flags=RESPONSE, size=100, first=SA)
    with interception.holding() as holds:
        assert holds()
        for message in (first, LATER):
            client.sendto(message, charon.getsockname())
        assert await received(charon) == LATER
    assert await received(charon) == first


async def test_no_request_behind_options_of_the_ip_header_reaches_charon_meanwhile(
    interception: Interception,
    sockets: tuple[socket.socket, socket.socket],
    cable: Wire,
    family: str,
) -> None:
    charon, client = sockets
    other = cable.peer.udp(family, 0)
    if family == "ipv6":
        client.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_DSTOPTS, DESTINATION_OPTIONS)
    else:
        client.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, ROUTER_ALERT)
    with interception.holding() as holds:
        assert holds()
        client.sendto(HANDSHAKE, charon.getsockname())
        other.sendto(LATER, charon.getsockname())
        assert await received(charon) == LATER
    assert interception._watch is not None
    if (family, interception._watch.placed.backend) != ("ipv6", "iptables"):
        assert await received(charon) == HANDSHAKE
    # ip6tables cannot look behind extension headers: that one is lost, and its client sends it again
    other.sendto(ANOTHER, charon.getsockname())
    assert await received(charon) == ANOTHER


async def test_once_the_rules_are_gone_nothing_is_held_back_and_that_is_known(
    interception: Interception, sockets: tuple[socket.socket, socket.socket], cable: Wire
) -> None:
    charon, client = sockets
    with interception.holding() as holds:
        assert holds()
        cable.host.run("nft", "flush", "ruleset")
        for tool in ("iptables", "ip6tables"):
            for kind in ("legacy", "nft"):
                cable.host.run(f"{tool}-{kind}", "-t", "security", "-F")
        assert not holds()
        client.sendto(HANDSHAKE, charon.getsockname())
        assert await received(charon) == HANDSHAKE
    # they are put back as soon as that is noticed
    await until(lambda: held_again(interception))


def held_again(interception: Interception) -> bool:
    with interception.holding() as holds:
        return holds()


async def test_after_its_end_nothing_can_be_held_back(
    interception: Interception, sockets: tuple[socket.socket, socket.socket]
) -> None:
    with interception.holding() as holds:
        await interception.close()
        assert not holds()
    assert not interception.can_hold()
    await interception.start()
