"""Whether charon has read what it received (bridge.charon.ike_sockets), with real sockets in its place."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest

from bridge.charon import ike_sockets
from bridge.charon.ike_sockets import SHORT, IkeSockets
from net_support import alone

PORTS = (500, 4500)
ALL = {socket.AF_INET: ("0.0.0.0", "127.0.0.1"), socket.AF_INET6: ("::", "::1")}


@pytest.fixture(name="alone")
def _alone() -> Iterator[None]:
    with alone():
        yield


@pytest.fixture
def charon(alone: None) -> Iterator[dict[tuple[socket.AddressFamily, int], socket.socket]]:
    """Its four sockets, bound to all addresses."""
    made = {}
    for family, (everywhere, _) in ALL.items():
        for port in PORTS:
            sock = made[family, port] = socket.socket(family, socket.SOCK_DGRAM)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((everywhere, port))
            sock.setblocking(False)
    yield made
    for sock in made.values():
        sock.close()


Charon = dict[tuple[socket.AddressFamily, int], socket.socket]


def send(family: socket.AddressFamily, port: int) -> None:
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"request", (ALL[family][1], port))


async def test_without_sockets_there_is_nothing_to_read(alone: None) -> None:
    sockets = IkeSockets(PORTS)
    assert await sockets.read()
    sockets.close()


async def test_a_last_datagram_that_charon_ignores_has_to_be_read_too(charon: Charon) -> None:
    sockets = IkeSockets(PORTS)
    reading = asyncio.create_task(sockets.read())
    loop = asyncio.get_running_loop()
    assert await loop.sock_recv(charon[socket.AF_INET, 500], 100) == SHORT
    assert await reading
    sockets.close()


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("family", ALL)
async def test_what_waits_in_a_socket_of_charons_is_waited_for(
    charon: Charon, family: socket.AddressFamily, port: int
) -> None:
    sockets = IkeSockets(PORTS)
    send(family, port)
    reading = asyncio.create_task(sockets.read())
    loop = asyncio.get_running_loop()
    # it is not read until here
    await asyncio.wait([reading], timeout=0.05)
    assert not reading.done()
    assert await loop.sock_recv(charon[family, port], 100) == b"request"
    assert await loop.sock_recv(charon[socket.AF_INET, 500], 100) == SHORT
    assert await reading
    sockets.close()


async def test_a_charon_that_does_not_read_is_not_waited_for_long(
    charon: Charon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ike_sockets, "READ_SECONDS", 0.05)
    sockets = IkeSockets(PORTS)
    send(socket.AF_INET6, 4500)
    assert not await sockets.read()
    sockets.close()
