"""Messages sent from charon's own address and port, and answers overheard."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from bridge.net.packet import udp_datagram
from bridge.net.raw_socket import Datagram, RawUdp, ResponseListener
from net_support import FAMILIES, GET_STUB, IKE_AUTH, RESPONSE, Wire, ike, inside, received, until, wire

MARKER = bytes(4)
ANSWER = ike(flags=RESPONSE, size=150)
PORTS = st.integers(1, 65535)


def word_sum(octets: bytes) -> int:
    """The ones' complement sum of 16-bit words, as RFC 1071 section 4.1 computes it."""
    total: int = sum(word for (word,) in struct.iter_unpack("!H", octets + bytes(len(octets) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


class TestDatagram:
    @given(st.ip_addresses(v=4), st.ip_addresses(v=4), PORTS, PORTS, st.binary(max_size=300), st.booleans())
    def test_ipv4_checksum_verifies(
        self, src: object, dst: object, sport: int, dport: int, payload: bytes, marker: bool
    ) -> None:
        udp = udp_datagram(str(src), sport, str(dst), dport, payload, marker)
        pseudo = socket.inet_aton(str(src)) + socket.inet_aton(str(dst)) + struct.pack("!xBH", 17, len(udp))
        assert word_sum(pseudo + udp) == 0xFFFF
        assert udp[6:8] != b"\0\0"

    @given(st.ip_addresses(v=6), st.ip_addresses(v=6), PORTS, PORTS, st.binary(max_size=300), st.booleans())
    def test_ipv6_checksum_verifies(
        self, src: object, dst: object, sport: int, dport: int, payload: bytes, marker: bool
    ) -> None:
        udp = udp_datagram(str(src), sport, str(dst), dport, payload, marker)
        addresses = b"".join(socket.inet_pton(socket.AF_INET6, str(address)) for address in (src, dst))
        assert word_sum(addresses + struct.pack("!I3xB", len(udp), 17) + udp) == 0xFFFF
        assert udp[6:8] != b"\0\0"

    def test_a_checksum_of_zero_is_sent_as_all_ones(self) -> None:
        for word in range(0x10000):
            udp = udp_datagram("192.0.2.1", 500, "192.0.2.2", 500, word.to_bytes(2), False)
            assert udp[6:8] != b"\0\0"

    def test_the_layout_is_that_of_rfc_768(self) -> None:
        udp = udp_datagram("192.0.2.1", 500, "192.0.2.2", 1234, b"abc", False)
        assert struct.unpack("!HHH", udp[:6]) == (500, 1234, 11)
        assert udp[8:] == b"abc"

    def test_the_marker_comes_first(self) -> None:
        udp = udp_datagram("192.0.2.1", 4500, "192.0.2.2", 4500, b"abc", True)
        assert udp[8:] == MARKER + b"abc"

    def test_what_is_too_long_is_refused(self) -> None:
        with pytest.raises(OSError, match="too long"):
            udp_datagram("192.0.2.1", 500, "192.0.2.2", 500, bytes(65528), False)


@pytest.fixture(scope="module")
def cable() -> Iterator[Wire]:
    with wire() as made:
        yield made


@pytest.fixture(autouse=True)
def sockets_closed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ports are free again for the next test."""
    yield
    if "cable" in request.fixturenames:
        request.getfixturevalue("cable").close_sockets()


@pytest.fixture
def raw(cable: Wire) -> Iterator[RawUdp]:
    with inside(cable.host.namespace):
        made = RawUdp()
    yield made
    made.close()


@pytest.mark.lab
@pytest.mark.parametrize("family", FAMILIES)
class TestSend:
    def test_an_answer_comes_from_the_port_that_charon_holds(self, cable: Wire, raw: RawUdp, family: str) -> None:
        cable.host.udp(family, 500)
        client = cable.peer.udp(family, 0)
        here, there = cable.host.address(family), cable.peer.address(family)
        raw.send(here, 500, there, client.getsockname()[1], ANSWER, False)
        answer, source = client.recvfrom(65535)
        assert answer == ANSWER
        assert source[:2] == (here, 500)

    def test_the_marker_is_added(self, cable: Wire, raw: RawUdp, family: str) -> None:
        client = cable.peer.udp(family, 4500)
        raw.send(cable.host.address(family), 4500, cable.peer.address(family), 4500, ANSWER, True)
        assert client.recv(65535) == MARKER + ANSWER

    def test_the_source_address_is_kept_where_there_are_several(self, cable: Wire, raw: RawUdp, family: str) -> None:
        second = "192.0.2.77" if family == "ipv4" else "2001:db8::77"
        prefix, extra = ("/24", ()) if family == "ipv4" else ("/64", ("nodad",))
        cable.host.run("ip", "address", "add", f"{second}{prefix}", "dev", "eth0", *extra)
        client = cable.peer.udp(family, 0)
        raw.send(second, 500, cable.peer.address(family), client.getsockname()[1], ANSWER, False)
        assert client.recvfrom(65535)[1][0] == second

    def test_what_the_path_cannot_take_is_fragmented(self, cable: Wire, raw: RawUdp, family: str) -> None:
        client, long = cable.peer.udp(family, 500), ike(size=4001)
        raw.send(cable.host.address(family), 500, cable.peer.address(family), 500, long, False)
        assert client.recv(65535) == long

    def test_a_foreign_source_address_is_an_error(self, cable: Wire, raw: RawUdp, family: str) -> None:
        foreign = "198.51.100.1" if family == "ipv4" else "2001:db8:1::1"
        with pytest.raises(OSError, match=r"Invalid argument|unreachable"):
            raw.send(foreign, 500, cable.peer.address(family), 500, ANSWER, False)

    def test_ipsec_policies_leave_it_alone(self, cable: Wire, raw: RawUdp, family: str) -> None:
        here, there = cable.host.address(family), cable.peer.address(family)
        policy = ("src", here, "dst", there, "dir", "out")
        cable.host.run("ip", "xfrm", "policy", "add", *policy, "action", "block")
        try:
            client, ordinary = cable.peer.udp(family, 500), cable.host.udp(family, 0)
            with pytest.raises(PermissionError):
                ordinary.sendto(ANSWER, (there, 500))
            raw.send(here, 500, there, 500, ANSWER, False)
            assert client.recv(65535) == ANSWER
        finally:
            cable.host.run("ip", "xfrm", "policy", "delete", *policy)


@pytest.mark.lab
def test_sending_goes_without_a_loopback_interface(cable: Wire) -> None:
    cable.host.run("ip", "link", "set", "lo", "down")
    try:
        with inside(cable.host.namespace):
            raw = RawUdp()
        client = cable.peer.udp("ipv4", 500)
        raw.send("192.0.2.1", 500, "192.0.2.2", 500, ANSWER, False)
        assert client.recv(65535) == ANSWER
        raw.close()
    finally:
        cable.host.run("ip", "link", "set", "lo", "up")


class Overheard:
    def __init__(self) -> None:
        self.datagrams: list[Datagram] = []

    def __call__(self, batch: list[Datagram]) -> None:
        self.datagrams.extend(batch)


@pytest_asyncio.fixture
async def overheard(cable: Wire) -> AsyncIterator[Overheard]:
    handler = Overheard()
    listener = ResponseListener(asyncio.get_running_loop(), handler)
    with inside(cable.host.namespace):
        listener.start()
    yield handler
    listener.stop()


@pytest.mark.lab
@pytest.mark.parametrize("family", FAMILIES)
class TestListen:
    async def test_an_answer_is_overheard_and_charon_gets_it_too(
        self, cable: Wire, overheard: Overheard, family: str
    ) -> None:
        charon, gateway = cable.host.udp(family, 500), cable.peer.udp(family, 500)
        gateway.sendto(ANSWER, charon.getsockname())
        assert await received(charon) == ANSWER
        await until(lambda: overheard.datagrams)
        here, there = cable.host.address(family), cable.peer.address(family)
        assert overheard.datagrams == [Datagram(there, 500, here, 500, ANSWER, False)]

    async def test_an_answer_on_port_4500_comes_without_its_marker(
        self, cable: Wire, overheard: Overheard, family: str
    ) -> None:
        charon, gateway = cable.host.udp(family, 1234), cable.peer.udp(family, 4500)
        gateway.sendto(MARKER + ANSWER, charon.getsockname())
        await until(lambda: overheard.datagrams)
        here, there = cable.host.address(family), cable.peer.address(family)
        assert overheard.datagrams == [Datagram(there, 4500, here, 1234, ANSWER, True)]

    async def test_an_answer_to_a_get_stub_request_is_overheard(
        self, cable: Wire, overheard: Overheard, family: str
    ) -> None:
        charon, gateway = cable.host.udp(family, 500), cable.peer.udp(family, 500)
        gateway.sendto(ike(GET_STUB, flags=RESPONSE), charon.getsockname())
        await until(lambda: overheard.datagrams)

    async def test_a_long_answer_is_put_together(self, cable: Wire, overheard: Overheard, family: str) -> None:
        charon, gateway = cable.host.udp(family, 500), cable.peer.udp(family, 500)
        long = ike(flags=RESPONSE, size=5000)
        gateway.sendto(long, charon.getsockname())
        await until(lambda: overheard.datagrams)
        assert overheard.datagrams[0].ike == long

    async def test_nothing_else_is_overheard(self, cable: Wire, overheard: Overheard, family: str) -> None:
        for port, payload in [
            (500, ike()),
            (500, ike(IKE_AUTH, flags=RESPONSE)),
            (500, b""),
            (500, ANSWER[:27]),
            (4500, b"\xff"),
            (4500, ANSWER),
            (4500, MARKER + ike(IKE_AUTH, flags=RESPONSE)),
        ]:
            charon, gateway = cable.host.udp(family, 500), cable.peer.udp(family, port)
            gateway.sendto(payload, charon.getsockname())
            assert await received(charon) == payload
            charon.close()
            gateway.close()
        assert overheard.datagrams == []

    async def test_an_answer_from_another_port_of_a_gateways_charon_is_overheard(
        self, cable: Wire, overheard: Overheard, family: str
    ) -> None:
        charon, gateway = cable.host.udp(family, 500), cable.peer.udp(family, 501)
        gateway.sendto(ANSWER, charon.getsockname())
        await until(lambda: len(overheard.datagrams) == 1)
        assert (overheard.datagrams[0].sport, overheard.datagrams[0].ike) == (501, ANSWER)
        charon.close()
        gateway.close()

    async def test_more_than_fit_into_one_reading_all_arrive(
        self, cable: Wire, overheard: Overheard, family: str
    ) -> None:
        charon, gateway = cable.host.udp(family, 500), cable.peer.udp(family, 500)
        for _ in range(600):
            gateway.sendto(ANSWER, charon.getsockname())
        await until(lambda: len(overheard.datagrams) == 600)
