"""Which policies and routes are taken out of a kernel, and which stay (bridge.net.xfrm): in a network namespace of its
own, without charon. Their ESP SAs are not needed for that."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator

import pytest

from bridge.net import xfrm
from bridge.net.netlink import HEADER, NLMSG_ERROR
from bridge.net.xfrm import EspSa
from net_support import alone, run

pytestmark = pytest.mark.lab

HERE, CLIENT, INNER, VIP = "192.0.2.1", "192.0.2.9", "10.1.0.0/16", "10.3.0.1/32"
TABLE = 220
LOST, LIVING = 0xC1, 0xC2


@pytest.fixture(autouse=True)
def _kernel() -> Iterator[None]:
    with alone():
        yield


def change(verb: str, direction: str, way: tuple[str, str, str, str], spi: int, *more: str) -> None:
    source, destination, of, to = way
    named = ("spi", hex(spi)) if spi else ()
    selector = ("dir", direction, "src", source, "dst", destination, *more)
    template = ("tmpl", "src", of, "dst", to, "proto", "esp", *named, "reqid", "1", "mode", "tunnel")
    run("ip", "xfrm", "policy", verb, *selector, *template)


def child(spi: int, *more: str, back: tuple[str, ...] | None = None, verb: str = "add", vip: str = VIP) -> None:
    """The policies of a CHILD_SA, as charon has them in the kernel; its reqid is 1, as it is again after a restart."""
    change(verb, "out", (INNER, vip, HERE, CLIENT), spi, *more)
    for direction in ("in", "fwd"):
        change(verb, direction, (vip, INNER, CLIENT, HERE), 0, *(more if back is None else back))


def route(*more: str, to: str = VIP) -> None:
    """As one of charon's."""
    run("ip", "route", "add", to, "dev", "lo", "proto", "static", "table", str(TABLE), *more)


def directions(*more: str) -> int:
    """How many policies the kernel has, of those with these words."""
    text = run("ip", "xfrm", "policy", "list")
    return sum(all(word in one for word in more) for one in text.split("\nsrc ") if "dir " in one)


def routes() -> list[str]:
    return run("ip", "route", "show", "table", "all").replace("  ", " ").splitlines()


def remove(spi: int = LOST) -> int:
    return xfrm.remove([EspSa(CLIENT, spi)], [], TABLE)


def in_table() -> list[str]:
    return [one for one in routes() if f"table {TABLE}" in one]


def test_all_directions_and_the_route_of_a_session_go() -> None:
    child(LOST)
    route()
    assert list(xfrm.outbound(TABLE)) == [EspSa(CLIENT, LOST)]
    assert remove() == 3
    assert directions() == 0
    assert in_table() == []


def test_a_session_that_has_the_virtual_ip_now_keeps_its_policies_and_its_route() -> None:
    child(LOST)
    child(LIVING, verb="update")
    route()
    assert remove() == 0
    assert directions() == 3
    assert len(in_table()) == 1


@pytest.mark.parametrize("other", [("if_id", "7"), ("mark", "7", "mask", "0xff")], ids=["interface", "mark"])
def test_a_session_of_the_same_selectors_with_another_mark_or_interface_keeps_its_policies(
    other: tuple[str, ...],
) -> None:
    child(LOST)
    child(LIVING, *other)
    assert remove() == 3
    assert directions(other[0]) == 3


def test_a_session_for_another_protocol_keeps_its_policies() -> None:
    child(LOST, "proto", "tcp")
    child(LIVING, "proto", "udp")
    assert remove() == 3
    assert directions("proto udp") == 3


def test_a_session_for_other_ports_keeps_its_policies() -> None:
    child(LOST, "proto", "tcp", "dport", "80", back=("proto", "tcp", "sport", "80"))
    child(LIVING, "proto", "tcp", "dport", "443", back=("proto", "tcp", "sport", "443"))
    assert remove() == 3
    assert directions("port 443") == 3


def test_policies_go_whose_directions_have_different_marks() -> None:
    child(LOST, "mark", "1", back=("mark", "2"))
    assert remove() == 3
    assert directions() == 0


def test_a_policy_that_charon_replaces_while_the_list_is_read_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    child(LOST)
    route()
    whole = xfrm._policies
    listed: list[list[xfrm._Policy]] = []

    def slowly(sock: socket.socket) -> list[xfrm._Policy]:
        found = list(whole(sock))
        if not listed:
            child(LIVING, verb="update")
        listed.append(found)
        return found

    monkeypatch.setattr(xfrm, "_policies", slowly)
    assert remove() == 0
    assert directions() == 3
    assert len(in_table()) == 1


def test_a_session_that_comes_while_another_is_removed_keeps_its_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy of its own for the same virtual IP."""
    child(LOST, "proto", "tcp")
    route()
    delete = xfrm._delete_sas

    def and_then(*given: object) -> None:
        delete(*given)  # type: ignore[arg-type]
        child(LIVING)

    monkeypatch.setattr(xfrm, "_delete_sas", and_then)
    assert remove() == 3
    assert len(in_table()) == 1


def test_routes_that_charon_does_not_make_stay() -> None:
    """One that blocks, of a guard, and one that was set by hand."""
    child(LOST)
    run("ip", "route", "add", "unreachable", VIP, "proto", "static", "metric", "9", "table", str(TABLE))
    run("ip", "route", "add", VIP, "dev", "lo", "metric", "5", "proto", "boot", "table", str(TABLE))
    # of none of them it follows that charon has set up an SA
    assert xfrm.outbound(TABLE) == {}
    route()
    assert remove() == 3
    assert len(in_table()) == 2


@pytest.mark.parametrize("kind", ["unreachable", "blackhole"])
def test_an_ipv6_route_that_blocks_stays(kind: str) -> None:
    way = ("2001:db8:1::/64", "2001:db8:3::1/128", HERE, CLIENT)
    change("add", "out", way, LOST)
    route(to=way[1])
    run("ip", "-6", "route", "add", kind, way[1], "proto", "static", "metric", "4096", "table", str(TABLE))
    assert remove() == 1
    left = run("ip", "-6", "route", "show", "table", str(TABLE)).splitlines()
    assert len(left) == 1
    assert left[0].startswith(kind)


def test_traps_and_shunts_stay() -> None:
    child(LOST)
    change("add", "out", (INNER, "10.4.0.0/16", HERE, CLIENT), 0)
    run("ip", "xfrm", "policy", "add", "dir", "out", "src", INNER, "dst", VIP, "proto", "icmp", "action", "block")
    assert remove() == 3
    assert directions() == 2
    # a trap has an SPI of 0
    assert remove(0) == 0
    assert directions() == 2


class Answers:
    """A socket that gets these datagrams from a kernel."""

    def __init__(self, *datagrams: bytes) -> None:
        self._datagrams = list(datagrams)
        self.requests = 0

    def send(self, _: bytes) -> None:
        self.requests += 1

    def recv(self, _: int) -> bytes:
        return self._datagrams.pop(0)


ITEM, DONE, INTERRUPTED = 0x13, 3, 0x10


def message(kind: int, body: bytes = bytes(4), flags: int = 2) -> bytes:
    return HEADER.pack(HEADER.size + len(body), kind, flags, 1, 0) + body


def dump(sock: Answers) -> list[bytes]:
    return list(xfrm._dump(sock, 0x15, b"", ITEM))  # type: ignore[arg-type]


def test_a_list_that_changed_meanwhile_is_read_again() -> None:
    first = message(ITEM, b"aaaa") + message(DONE, flags=2 | INTERRUPTED)
    sock = Answers(first, message(ITEM, b"bbbb"), message(DONE))
    assert dump(sock) == [b"bbbb"]
    assert sock.requests == 2


@pytest.mark.parametrize(
    "datagram",
    [
        message(ITEM) + message(DONE, struct.pack("=i", -errno.ENOBUFS)),
        message(ITEM) + message(NLMSG_ERROR, struct.pack("=i", -errno.EPERM)),
        message(ITEM)[:-2],
        message(ITEM) + bytes(8),
    ],
    ids=["an error at its end", "an error", "cut short", "of nothing"],
)
def test_a_list_that_is_not_whole_is_an_error(datagram: bytes) -> None:
    with pytest.raises(OSError, match="kernel"):
        dump(Answers(datagram, message(DONE)))
