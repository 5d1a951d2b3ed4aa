"""ARP and neighbour discovery, octet by octet (bridge.net.neighbour, RFC 826, RFC 4861, RFC 5227)."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network, ip_address
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from bridge.net.neighbour import (
    ALL_NODES,
    ALL_NODES_MAC,
    ARP_REPLY,
    ARP_REQUEST,
    Connected,
    advertisement,
    arp,
    checksum,
    connected_networks,
    gratuitous_arp,
    read_arp_request,
    read_solicitation,
)

MAC, PEER = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")
FOUR, ASKER = ip_address("10.10.1.129").packed, ip_address("10.10.1.10").packed
SIX = ip_address("fd10:10:1::80").packed


def test_a_gratuitous_arp_names_the_address_as_sender_and_target() -> None:
    frame = gratuitous_arp(MAC, FOUR)
    assert (
        frame.hex()
        == "ffffffffffff0200000000010806" + "0001080006040001" + "0200000000010a0a0181" + "000000000000" + "0a0a0181"
    )


def test_an_arp_request_is_read_and_an_announcement_asks_nothing() -> None:
    request = arp(ARP_REQUEST, PEER, ASKER, b"\xff" * 6, FOUR)
    assert read_arp_request(request) == (PEER, ASKER, FOUR)
    assert read_arp_request(gratuitous_arp(MAC, FOUR)) is None
    assert read_arp_request(arp(ARP_REPLY, PEER, ASKER, MAC, FOUR)) is None


def test_an_advertisement_overrides_and_has_a_right_checksum() -> None:
    frame = advertisement(MAC, SIX, ALL_NODES_MAC, ALL_NODES, solicited=False)
    header, body = frame[14:54], frame[54:]
    assert frame[12:14] == b"\x86\xdd"
    assert header[6] == 58
    assert header[7] == 255
    assert body[0] == 136
    assert body[4] == 0xA0
    assert body[8:24] == SIX
    assert body[24:] == b"\x02\x01" + MAC
    pseudo = header[8:40] + len(body).to_bytes(4, "big") + b"\0\0\0\x3a"
    assert checksum(pseudo + body) == 0
    assert advertisement(MAC, SIX, PEER, SIX, solicited=True)[58] == 0xE0


@given(st.binary(max_size=100))
def test_what_others_send_is_read_or_ignored(frame: bytes) -> None:
    for read in (read_arp_request, read_solicitation):
        read(frame)


def test_the_networks_of_the_interfaces_are_those_without_a_gateway_where_neighbours_ask(tmp_path: Path) -> None:
    (tmp_path / "route").write_text(
        "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
        "eth0\t00000000\t0132A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
        "eth0\t0032A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
        "eth1\t0101140A\t00000000\t0005\t0\t0\t0\tFFFFFFFF\t0\t0\t0\n"
        # a route to an XFRM interface
        "ipsec0\t0000140A\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n"
    )
    (tmp_path / "if_inet6").write_text(
        "00000000000000000000000000000001 01 80 10 80       lo\n"
        "fd100010000100000000000000000001 03 40 00 80     eth1\n"
        "fe800000000000000000000000000001 03 40 20 80     eth1\n"
        "fd200000000000000000000000000001 04 40 00 80   ipsec0\n"
    )
    for name, kind in (("eth0", "1"), ("ipsec0", "65534")):
        (tmp_path / "net" / name).mkdir(parents=True)
        (tmp_path / "net" / name / "type").write_text(f"{kind}\n")
    # of eth1 nothing is known: whoever announces there finds out
    assert connected_networks(tmp_path, tmp_path / "net") == [
        Connected("eth0", IPv4Network("192.168.50.0/24")),
        Connected("eth1", IPv6Network("fd10:10:1::/64")),
    ]
    assert connected_networks(tmp_path / "nowhere") == []
