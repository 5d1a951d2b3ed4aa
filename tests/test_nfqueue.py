"""IKE requests are taken out of the kernel's way and put back, and everything else passes by."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from bridge.ike.address import address_text
from bridge.net import firewall, queue_rules
from bridge.net.liveness import Liveness
from bridge.net.nfqueue import READ_AT_ONCE, Interceptor, InterceptUnavailable, Packet
from bridge.net.packet import parse_datagram, udp_datagram
from net_support import FAMILIES, GET_STUB, IKE_AUTH, RESPONSE, Wire, ike, inside, received, run, until, wire

QUEUE = 4511
MARKER = bytes(4)
RULES = queue_rules.rules(QUEUE)

IPV4 = ("192.0.2.2", "192.0.2.1")
IPV6 = ("2001:db8::2", "2001:db8::1")
REQUEST = ike(size=200)
OTHER = ike(IKE_AUTH, size=100)
"""which the queue does not get"""


def ipv4(udp: bytes, *, options: bytes = b"", fragment: int = 0, protocol: int = 17, total: int | None = None) -> bytes:
    """RFC 791 section 3.1."""
    header = 20 + len(options)
    length = header + len(udp) if total is None else total
    src, dst = (socket.inet_aton(address) for address in IPV4)
    return (
        struct.pack("!BBHHHBBH", 0x40 | header // 4, 0, length, 1, fragment, 64, protocol, 0)
        + src
        + dst
        + options
        + udp
    )


def ipv6(udp: bytes, *, extensions: bytes = b"", first: int = 17) -> bytes:
    """RFC 8200 section 3; `first` is the type of the first extension header."""
    src, dst = (socket.inet_pton(socket.AF_INET6, address) for address in IPV6)
    return struct.pack("!IHBB", 6 << 28, len(extensions) + len(udp), first, 64) + src + dst + extensions + udp


def udp(payload: bytes = REQUEST, *, sport: int = 500, dport: int = 500, marker: bool = False) -> bytes:
    return udp_datagram(*IPV4[:1], sport, IPV4[1], dport, payload, marker)


class TestParse:
    def test_ipv4(self) -> None:
        assert parse_datagram(ipv4(udp(sport=1234))) == (*with_ports(IPV4, 1234, 500), REQUEST, False)

    def test_ipv6(self) -> None:
        assert parse_datagram(ipv6(udp(sport=1234))) == (*with_ports(IPV6, 1234, 500), REQUEST, False)

    def test_the_non_esp_marker_is_removed_on_port_4500(self) -> None:
        packet = ipv4(udp(sport=1234, dport=4500, marker=True))
        assert parse_datagram(packet) == (*with_ports(IPV4, 1234, 4500), REQUEST, True)

    def test_ipv4_options_are_skipped(self) -> None:
        parsed = parse_datagram(ipv4(udp(), options=b"\x94\x04\0\0" + bytes(36)))
        assert parsed is not None
        assert parsed.ike == REQUEST

    @pytest.mark.parametrize("kind", [0, 43, 60], ids=["hop by hop", "routing", "destination options"])
    def test_ipv6_extension_headers_are_skipped(self, kind: int) -> None:
        options = bytes([60, 0]) + bytes(6) + bytes([17, 1]) + bytes(14)
        parsed = parse_datagram(ipv6(udp(), extensions=options, first=kind))
        assert parsed is not None
        assert parsed.ike == REQUEST

    def test_a_fragment_header_of_a_whole_packet_is_skipped(self) -> None:
        parsed = parse_datagram(ipv6(udp(), extensions=bytes([17, 0, 0, 0]) + bytes(4), first=44))
        assert parsed is not None
        assert parsed.ike == REQUEST

    def test_octets_behind_the_datagram_are_ignored(self) -> None:
        parsed = parse_datagram(ipv4(udp()) + b"padding")
        assert parsed is not None
        assert parsed.ike == REQUEST

    @pytest.mark.parametrize("port", [501, 4501, 41234])
    def test_on_any_port_but_500_the_non_esp_marker_is_removed(self, port: int) -> None:
        packet = ipv4(udp(sport=1234, dport=port, marker=True))
        assert parse_datagram(packet) == (*with_ports(IPV4, 1234, port), REQUEST, True)

    def test_without_a_marker_is_what_comes_to_another_port_from_500(self) -> None:
        assert parse_datagram(ipv4(udp(sport=500, dport=501))) == (*with_ports(IPV4, 500, 501), REQUEST, False)

    @pytest.mark.parametrize(("port", "marker"), [(500, False), (4500, True), (4501, True)])
    def test_of_an_answer_the_source_port_is_the_gateways(self, port: int, marker: bool) -> None:
        packet = ipv4(udp(sport=port, dport=1234, marker=marker))
        assert parse_datagram(packet, answers=True) == (*with_ports(IPV4, port, 1234), REQUEST, marker)

    @pytest.mark.parametrize(
        "packet",
        [
            pytest.param(b"", id="nothing"),
            pytest.param(ipv4(udp(), protocol=6), id="TCP"),
            pytest.param(ipv4(udp(sport=1234, dport=501)), id="no marker on another port"),
            pytest.param(ipv4(udp(), fragment=0x2000), id="first fragment"),
            pytest.param(ipv4(udp(), fragment=0x0010), id="later fragment"),
            pytest.param(ipv4(udp(), total=500), id="cut packet"),
            pytest.param(ipv4(udp()[:-1]), id="cut datagram"),
            pytest.param(ipv4(udp(REQUEST[:27])), id="less than an IKE header"),
            pytest.param(ipv4(udp(b"\xff", dport=4500)), id="NAT keepalive"),
            pytest.param(ipv4(udp(dport=4500)), id="ESP"),
            pytest.param(b"\x41" + ipv4(udp())[1:], id="IPv4 header length below 20"),
            pytest.param(b"\x50" + ipv4(udp())[1:], id="neither IPv4 nor IPv6"),
            pytest.param(ipv6(udp(), extensions=bytes([17, 0, 0, 1]) + bytes(4), first=44), id="first IPv6 fragment"),
            pytest.param(ipv6(udp(), extensions=bytes([17, 0, 1, 0]) + bytes(4), first=44), id="later IPv6 fragment"),
            pytest.param(ipv6(udp(), extensions=bytes([17, 255]) + bytes(6), first=60), id="extension beyond the end"),
            pytest.param(ipv6(udp(), first=59), id="no next header"),
            pytest.param(ipv6(udp())[:-1], id="cut IPv6 packet"),
        ],
    )
    def test_anything_else_is_none(self, packet: bytes) -> None:
        assert parse_datagram(packet) is None

    @given(st.binary(max_size=200), st.booleans())
    def test_arbitrary_octets_never_raise(self, packet: bytes, answers: bool) -> None:
        parse_datagram(packet, answers=answers)

    @given(
        st.sampled_from([ipv4(udp()), ipv6(udp()), ipv6(udp(), extensions=bytes([17, 0]) + bytes(6), first=60)]),
        st.data(),
    )
    def test_altered_and_cut_packets_never_raise(self, packet: bytes, data: st.DataObject) -> None:
        altered = bytearray(packet)
        for _ in range(data.draw(st.integers(1, 4))):
            altered[data.draw(st.integers(0, 69))] = data.draw(st.integers(0, 255))
        parse_datagram(bytes(altered[: data.draw(st.integers(0, len(altered)))]))

    @given(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)))
    def test_addresses_have_their_canonical_text(self, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
        assert address_text(address.packed) == str(address)

    @pytest.mark.parametrize("text", ["::ffff:192.0.2.1", "::192.0.2.1", "::", "::1", "2001:db8::"])
    def test_addresses_that_are_special_too(self, text: str) -> None:
        address = ipaddress.ip_address(text)
        assert address_text(address.packed) == str(address)


def with_ports(addresses: tuple[str, str], sport: int, dport: int) -> tuple[str, int, str, int]:
    return addresses[0], sport, addresses[1], dport


@pytest.fixture(scope="module")
def cable() -> Iterator[Wire]:
    with wire() as made:
        with inside(made.host.namespace):
            firewall.install(RULES)
        yield made


@pytest.fixture(autouse=True)
def sockets_closed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ports are free again for the next test."""
    yield
    if "cable" in request.fixturenames:
        request.getfixturevalue("cable").close_sockets()


class Seen:
    """A handler that keeps the requests and does with each what it was told."""

    def __init__(self) -> None:
        self.packets: list[Packet] = []
        self.batches: list[int] = []
        self.decide: Callable[[Packet], None] = Packet.accept

    def __call__(self, batch: list[Packet]) -> None:
        self.packets.extend(batch)
        self.batches.append(len(batch))
        for packet in batch:
            self.decide(packet)


@pytest.fixture
def seen() -> Seen:
    return Seen()


@contextlib.contextmanager
def alive(cable: Wire, interceptor: Interceptor) -> Iterator[Liveness]:
    """The kernel is shown that the event loop runs."""
    liveness = Liveness(interceptor.let_go, lambda: None)
    with inside(cable.host.namespace):
        liveness.start(asyncio.get_running_loop(), firewall.Placed("nftables" if nft_took_them() else "iptables"))
    yield liveness
    liveness.stop()


def load(text: str) -> None:
    subprocess.run(["nft", "-f", "-"], input=text, text=True, check=True)


def nft_took_them() -> bool:
    return bool(firewall.look(RULES, firewall.Placed("nftables")).lines)


@pytest_asyncio.fixture
async def interceptor(cable: Wire, seen: Seen) -> AsyncIterator[Interceptor]:
    made = Interceptor(QUEUE, seen, stood_still=lambda: liveness.check())
    with alive(cable, made) as liveness:
        with inside(cable.host.namespace):
            made.start(asyncio.get_running_loop())
        yield made
        made.stop()


def leave_undecided(packet: Packet) -> None:
    """For `Seen.decide`."""


@pytest.mark.lab
@pytest.mark.parametrize("family", FAMILIES)
class TestPackets:
    async def test_an_accepted_request_reaches_charon(
        self, cable: Wire, interceptor: Interceptor, seen: Seen, family: str
    ) -> None:
        charon, client = cable.host.udp(family, 500), cable.peer.udp(family, 500)
        client.sendto(REQUEST, charon.getsockname())
        assert await received(charon) == REQUEST
        (packet,) = seen.packets
        assert (packet.src, packet.sport) == (cable.peer.address(family), 500)
        assert (packet.dst, packet.dport) == (cable.host.address(family), 500)
        assert packet.ike == REQUEST
        assert not packet.marker

    async def test_a_request_on_port_4500_is_shown_without_its_marker(
        self, cable: Wire, interceptor: Interceptor, seen: Seen, family: str
    ) -> None:
        charon, client = cable.host.udp(family, 4500), cable.peer.udp(family, 4500)
        client.sendto(MARKER + REQUEST, charon.getsockname())
        assert await received(charon) == MARKER + REQUEST
        (packet,) = seen.packets
        assert packet.ike == REQUEST
        assert packet.marker

    async def test_a_dropped_request_never_reaches_charon(
        self, cable: Wire, interceptor: Interceptor, seen: Seen, family: str
    ) -> None:
        charon, client = cable.host.udp(family, 500), cable.peer.udp(family, 500)
        seen.decide = lambda packet: packet.drop() if packet.ike == REQUEST else packet.accept()
        after = ike()
        client.sendto(REQUEST, charon.getsockname())
        client.sendto(after, charon.getsockname())
        assert await received(charon) == after

    async def test_a_second_decision_does_nothing(
        self, cable: Wire, interceptor: Interceptor, seen: Seen, family: str
    ) -> None:
        def both(packet: Packet) -> None:
            packet.accept()
            packet.drop()
            packet.accept()

        seen.decide = both
        charon, client = cable.host.udp(family, 500), cable.peer.udp(family, 500)
        client.sendto(REQUEST, charon.getsockname())
        assert await received(charon) == REQUEST

    async def test_a_decision_can_come_later_and_out_of_order(
        self, cable: Wire, interceptor: Interceptor, seen: Seen, family: str
    ) -> None:
        seen.decide = leave_undecided
        charon, client = cable.host.udp(family, 500), cable.peer.udp(family, 500)
        first, second = ike(), ike()
        client.sendto(first, charon.getsockname())
        client.sendto(second, charon.getsockname())
        await until(lambda: len(seen.packets) == 2)
        assert interceptor.stats().held == 2
        for packet in reversed(seen.packets):
            packet.accept()
        assert [await received(charon), await received(charon)] == [second, first]
        assert interceptor.stats().held == 0

    async def test_other_traffic_never_enters_the_queue(
        self, cable: Wire, interceptor: Interceptor, seen: Seen, family: str
    ) -> None:
        for port, payload in [
            (500, ike(IKE_AUTH)),
            (500, ike(flags=RESPONSE)),
            (4500, b"\xff"),
            (4500, b"\xc0\0\0\1" + REQUEST),
            (4500, MARKER + ike(IKE_AUTH)),
        ]:
            charon, client = cable.host.udp(family, port), cable.peer.udp(family, 0)
            client.sendto(payload, charon.getsockname())
            assert await received(charon) == payload
            charon.close()
        assert interceptor.stats().seen == 0

    async def test_a_request_in_ip_fragments_is_shown_whole(
        self, cable: Wire, interceptor: Interceptor, seen: Seen, family: str
    ) -> None:
        charon, client = cable.host.udp(family, 500), cable.peer.udp(family, 500)
        long = ike(size=3000)
        client.sendto(long, charon.getsockname())
        assert await received(charon) == long
        assert [packet.ike for packet in seen.packets] == [long]

    async def test_a_request_too_long_for_the_queue_reaches_charon(
        self, cable: Wire, interceptor: Interceptor, seen: Seen, family: str
    ) -> None:
        charon, client = cable.host.udp(family, 500), cable.peer.udp(family, 500)
        for size in (3400, 3500, 4000, 4096, 9000):
            long = ike(size=size)
            client.sendto(long, charon.getsockname())
            assert await received(charon) == long
        assert interceptor.stats().waiting == 0


@pytest.mark.lab
class TestFailOpen:
    async def test_what_arrives_together_is_one_batch(self, cable: Wire, interceptor: Interceptor, seen: Seen) -> None:
        charon, client = cable.host.udp("ipv4", 500), cable.peer.udp("ipv4", 500)
        for _ in range(100):
            client.sendto(REQUEST, charon.getsockname())
        await until(lambda: len(seen.packets) == 100)
        assert seen.batches == [100]

    async def test_between_the_batches_of_a_flood_others_have_their_turn(
        self, cable: Wire, interceptor: Interceptor, seen: Seen
    ) -> None:
        charon, client = cable.host.udp("ipv4", 500), cable.peer.udp("ipv4", 500)
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        for _ in range(5 * READ_AT_ONCE):
            client.sendto(REQUEST, charon.getsockname())
        task = asyncio.create_task(other())
        await until(lambda: len(seen.packets) == 5 * READ_AT_ONCE)
        task.cancel()
        assert max(seen.batches) == READ_AT_ONCE
        assert turns >= len(seen.batches) - 1
        assert interceptor.stats().waiting == 0

    async def test_a_request_passes_while_no_process_reads(self, cable: Wire) -> None:
        charon, client = cable.host.udp("ipv4", 500), cable.peer.udp("ipv4", 500)
        client.sendto(REQUEST, charon.getsockname())
        assert await received(charon) == REQUEST

    async def test_a_request_passes_while_the_queue_is_full(self, cable: Wire, seen: Seen) -> None:
        interceptor = Interceptor(QUEUE, seen, max_length=10)
        seen.decide = leave_undecided
        with alive(cable, interceptor):
            with inside(cable.host.namespace):
                interceptor.start(asyncio.get_running_loop())
            charon, client = cable.host.udp("ipv4", 500), cable.peer.udp("ipv4", 500)
            messages = [ike() for _ in range(30)]
            for message in messages:
                client.sendto(message, charon.getsockname())
            passed = [await received(charon) for _ in range(20)]
            await until(lambda: len(seen.packets) == 10)
            assert passed == messages[10:]
            assert interceptor.stats().drops == 0
            interceptor.stop()
        assert [await received(charon) for _ in range(10)] == messages[:10]

    async def test_in_a_flood_what_does_not_fit_is_dropped_and_afterwards_passes_again(
        self, cable: Wire, seen: Seen
    ) -> None:
        interceptor = Interceptor(QUEUE, seen, max_length=10)
        seen.decide = leave_undecided
        with alive(cable, interceptor):
            with inside(cable.host.namespace):
                interceptor.start(asyncio.get_running_loop())
            interceptor.fail_open(False)
            charon, client = cable.host.udp("ipv4", 500), cable.peer.udp("ipv4", 500)
            messages = [ike() for _ in range(30)]
            for message in messages:
                client.sendto(message, charon.getsockname())
            await until(lambda: len(seen.packets) == 10)
            assert interceptor.stats().drops == 20
            interceptor.fail_open(True)
            client.sendto(messages[20], charon.getsockname())
            assert await received(charon) == messages[20]
            interceptor.stop()
            assert [await received(charon) for _ in range(10)] == messages[:10]

    async def test_requests_pass_when_the_handler_fails(
        self, cable: Wire, interceptor: Interceptor, seen: Seen
    ) -> None:
        def fail(packet: Packet) -> None:
            raise RuntimeError("a fault of ours")

        seen.decide = fail
        charon, client = cable.host.udp("ipv4", 500), cable.peer.udp("ipv4", 500)
        client.sendto(REQUEST, charon.getsockname())
        assert await received(charon) == REQUEST

    async def test_undecided_requests_reach_charon_at_the_end(
        self, cable: Wire, interceptor: Interceptor, seen: Seen
    ) -> None:
        seen.decide = leave_undecided
        charon, client = cable.host.udp("ipv4", 500), cable.peer.udp("ipv4", 500)
        client.sendto(REQUEST, charon.getsockname())
        await until(lambda: seen.packets)
        unread = ike()
        client.sendto(unread, charon.getsockname())
        interceptor.stop()
        assert {await received(charon), await received(charon)} == {REQUEST, unread}
        seen.packets[0].drop()

    async def test_it_can_start_again(self, cable: Wire, interceptor: Interceptor, seen: Seen) -> None:
        interceptor.stop()
        with inside(cable.host.namespace):
            interceptor.start(asyncio.get_running_loop())
        charon, client = cable.host.udp("ipv4", 500), cable.peer.udp("ipv4", 500)
        client.sendto(REQUEST, charon.getsockname())
        assert await received(charon) == REQUEST
        assert len(seen.packets) == 1

    async def test_a_queue_that_is_taken_is_named(self, cable: Wire, interceptor: Interceptor, seen: Seen) -> None:
        second = Interceptor(QUEUE, seen)
        with (
            inside(cable.host.namespace),
            pytest.raises(InterceptUnavailable, match=rf"queue {QUEUE} is taken .* intercept\.queue"),
        ):
            second.start(asyncio.get_running_loop())
        assert second.stats().waiting == 0


@pytest.mark.lab
@pytest.mark.parametrize("family", FAMILIES)
class TestGate:
    """While segments of charon's change hands."""

    async def test_an_accepted_request_goes_on_once_it_is_open(
        self, cable: Wire, interceptor: Interceptor, seen: Seen, family: str
    ) -> None:
        charon, client = cable.host.udp(family, 500), cable.peer.udp(family, 500)
        interceptor.close_gate()
        requests = [ike(size=200), ike(size=201)]
        for request in requests:
            client.sendto(request, charon.getsockname())
        await until(lambda: len(seen.packets) == 2)
        # decided, though they are not there yet
        assert interceptor.stats().held == 0
        client.sendto(OTHER, charon.getsockname())
        assert await received(charon) == OTHER
        interceptor.open_gate()
        assert [await received(charon) for _ in requests] == requests

    async def test_it_is_open_once_all_that_closed_it_have_opened_it(
        self, cable: Wire, interceptor: Interceptor, seen: Seen, family: str
    ) -> None:
        charon, client = cable.host.udp(family, 500), cable.peer.udp(family, 500)
        interceptor.close_gate()
        interceptor.close_gate()
        client.sendto(REQUEST, charon.getsockname())
        await until(lambda: len(seen.packets) == 1)
        interceptor.open_gate()
        client.sendto(OTHER, charon.getsockname())
        assert await received(charon) == OTHER
        interceptor.open_gate()
        assert await received(charon) == REQUEST

    async def test_what_begins_no_handshake_does_not_wait(
        self, cable: Wire, interceptor: Interceptor, seen: Seen, family: str
    ) -> None:
        charon, client = cable.host.udp(family, 500), cable.peer.udp(family, 500)
        interceptor.close_gate()
        about_an_sa = ike(GET_STUB, size=100)
        client.sendto(about_an_sa, charon.getsockname())
        assert await received(charon) == about_an_sa
        interceptor.open_gate()

    async def test_what_is_not_understood_waits_too(
        self, cable: Wire, interceptor: Interceptor, seen: Seen, family: str
    ) -> None:
        charon, client = cable.host.udp(family, 500), cable.peer.udp(family, 500)
        interceptor.close_gate()
        long = ike(size=5000)
        client.sendto(long, charon.getsockname())
        await until(lambda: interceptor.stats().seen == 1)
        client.sendto(OTHER, charon.getsockname())
        assert await received(charon) == OTHER
        interceptor.open_gate()
        assert await received(charon) == long
        assert seen.packets == []

    async def test_what_is_too_much_to_wait_is_dropped_and_leaves_room_for_others(
        self, cable: Wire, interceptor: Interceptor, seen: Seen, family: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(interceptor._gate, "_most", 2)
        charon, client = cable.host.udp(family, 500), cable.peer.udp(family, 500)
        interceptor.close_gate()
        requests = [ike(size=200 + number) for number in range(4)]
        for request in requests:
            client.sendto(request, charon.getsockname())
        await until(lambda: len(seen.packets) == len(requests))
        assert interceptor.stats().waiting == 2
        interceptor.open_gate()
        assert [await received(charon) for _ in range(2)] == requests[:2]
        client.sendto(OTHER, charon.getsockname())
        assert await received(charon) == OTHER

    @pytest.mark.parametrize("how", ["let_go", "stop"])
    async def test_what_waits_goes_on_when_the_event_loop_stood_still_or_the_queue_ends(
        self, cable: Wire, interceptor: Interceptor, seen: Seen, family: str, how: str
    ) -> None:
        charon, client = cable.host.udp(family, 500), cable.peer.udp(family, 500)
        interceptor.close_gate()
        client.sendto(REQUEST, charon.getsockname())
        await until(lambda: len(seen.packets) == 1)
        getattr(interceptor, how)()
        assert await received(charon) == REQUEST
        interceptor.open_gate()


@pytest.mark.lab
class TestStandingStill:
    """An event loop that is not there for a second: SIGSTOP, a freezer, a library that hangs."""

    async def test_after_a_second_requests_go_to_charon_without_the_queue(
        self, cable: Wire, interceptor: Interceptor, seen: Seen
    ) -> None:
        charon, client = cable.host.udp("ipv4", 500), cable.peer.udp("ipv4", 500)
        deadline = time.monotonic() + 3
        passed_at = None
        while passed_at is None and time.monotonic() < deadline:
            # the event loop does not run here
            client.sendto(REQUEST, charon.getsockname())
            charon.settimeout(0.05)
            with contextlib.suppress(TimeoutError):
                if charon.recv(65535) == REQUEST:
                    passed_at = time.monotonic()
        assert passed_at is not None
        assert deadline - 3 + 0.5 < passed_at < deadline - 3 + 1.5

    async def test_what_was_held_then_goes_to_charon_and_later_requests_are_held_again(
        self, cable: Wire, interceptor: Interceptor, seen: Seen
    ) -> None:
        seen.decide = leave_undecided
        charon, client = cable.host.udp("ipv4", 500), cable.peer.udp("ipv4", 500)
        undecided, unread = ike(), ike()
        client.sendto(undecided, charon.getsockname())
        await until(lambda: seen.packets)
        client.sendto(unread, charon.getsockname())
        time.sleep(1.2)  # noqa: ASYNC251 - this is what is tested
        assert {await received(charon), await received(charon)} == {undecided, unread}
        assert [packet.held for packet in seen.packets] == [False]
        again = ike()
        await asyncio.sleep(0.3)
        client.sendto(again, charon.getsockname())
        await until(lambda: len(seen.packets) == 2)
        assert seen.packets[1].ike == again
        seen.packets[1].accept()

    @pytest.mark.parametrize("backend", ["nftables", "iptables"])
    async def test_a_beat_that_meets_no_rule_is_reported(self, cable: Wire, backend: firewall.Backend) -> None:
        """Both forms, on any kernel: the queue's rule aside."""
        told: list[bool] = []
        liveness = Liveness(lambda: None, lambda: told.append(True))
        with inside(cable.peer.namespace):
            if backend == "nftables":
                text = RULES.nftables.replace(f"queue num {QUEUE} bypass", "counter")
                load(text)
            else:
                firewall.install(RULES, backend="iptables")
            liveness.start(asyncio.get_running_loop(), firewall.Placed(backend))
            liveness.stop()
            assert told == []
            firewall.remove(RULES)
            liveness.start(asyncio.get_running_loop(), firewall.Placed(backend))
            liveness.stop()
            assert told == [True]

    async def test_nftables_count_what_was_for_the_queue_and_hold_it_while_signs_of_life_come(
        self, cable: Wire
    ) -> None:
        """The kernel here may lack nft_queue: a second counter in its place."""
        queued = "counter comment queued"
        text = RULES.nftables.replace(f"queue num {QUEUE} bypass", queued)
        client, charon = cable.host.udp("ipv4", 0), cable.peer.udp("ipv4", 500)
        liveness = Liveness(lambda: None, lambda: None)
        try:
            with inside(cable.peer.namespace):
                load(text)
                client.sendto(REQUEST, charon.getsockname())
                assert await received(charon) == REQUEST
                view = firewall.look(RULES, firewall.Placed("nftables"))
                assert [count for _, count in view.counts] == [1]
                liveness.start(asyncio.get_running_loop(), firewall.Placed("nftables"))
                client.sendto(REQUEST, charon.getsockname())
                assert await received(charon) == REQUEST
                listed = run("nft", "list", "ruleset")
                assert "counter packets 2" in listed
                assert "counter packets 1" in listed
        finally:
            liveness.stop()
            with inside(cable.peer.namespace):
                firewall.remove(RULES)
