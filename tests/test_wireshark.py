"""Requests and answers as tshark reads them: a decoder that nobody here wrote, and the dissector that ships."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from bridge.ike.exchange import build_request, build_response, nat_hash, parse_request
from bridge.ike.groups import fresh_public_value
from bridge.ike.stubexchange import StubSa, build_download, build_get, build_move, parse_stub_message
from bridge.ike.transforms import Suite
from bridge.net.datagram import MARKER, udp_datagram

DISSECTOR = Path(__file__).parent.parent / "wireshark/ike_sa_sync.lua"
SUITE = Suite(12, 128, 12, 5, 31)
AEAD = Suite(20, 256, 0, 7, 20)
SPI_I, SPI_R, OLD = bytes.fromhex("1122334455667788"), bytes.fromhex("99aabbccddeeff00"), bytes(range(8))
NI, NR = bytes(range(32)), bytes(range(32, 64))
SK_D = b"d" * 64
CLIENT, GATEWAY = "192.0.2.10", "192.0.2.2"
RAW_IP = 101
"""link type LINKTYPE_RAW: each packet begins with its IP header"""


def ask(suite: Suite = SUITE, port: int = 500, **changes: Any) -> bytes:
    values: dict[str, Any] = {
        "spi_i": SPI_I,
        "suite": suite,
        "ke_value": fresh_public_value(suite.group),
        "nonce": NI,
        "sync_index": ("192.0.2.1", OLD),
        "prf": suite.prf,
        "sk_d_old": SK_D,
        "nat": (CLIENT, port, GATEWAY, port),
    }
    return build_request(**(values | changes))


def answer(to: bytes, suite: Suite = SUITE) -> bytes:
    request = parse_request(to)
    assert request is not None
    return build_response(
        request,
        spi_r=SPI_R,
        nonce=NR,
        prf=suite.prf,
        sk_d_old=SK_D,
        lifetime=14400,
        nat=(GATEWAY, 500, CLIENT, 500),
    )


def packet(message: bytes, port: int = 500) -> bytes:
    """An IPv4 packet with an IKE message."""
    udp = udp_datagram(CLIENT, port, GATEWAY, port, message, port == 4500)
    addresses = ip_address(CLIENT).packed + ip_address(GATEWAY).packed
    return struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0) + addresses + udp


def decoded(folder: Path, *packets: bytes) -> list[dict[str, Any]]:
    """Every packet's layers as `tshark -T json` gives them."""
    if shutil.which("tshark") is None:
        pytest.fail("tshark is missing: make setup installs it")
    capture = folder / "capture.pcap"
    octets = struct.pack("=IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, RAW_IP)
    for number, data in enumerate(packets):
        octets += struct.pack("=IIII", number, 0, len(data), len(data)) + data
    capture.write_bytes(octets)
    command = ["tshark", "-X", f"lua_script:{DISSECTOR}", "-r", str(capture), "-T", "json", "--no-duplicate-keys"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return [entry["_source"]["layers"] for entry in json.loads(done.stdout)]


def values(layers: Any, name: str) -> list[str]:
    """All values of a field, wherever in the tree."""
    found: list[str] = []
    if isinstance(layers, dict):
        for key, value in layers.items():
            if key == name:
                found += value if isinstance(value, list) else [value]
            else:
                found += values(value, name)
    elif isinstance(layers, list):
        for value in layers:
            found += values(value, name)
    return found


def from_hex(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def test_a_request_reads_the_same_in_tshark(tmp_path: Path) -> None:
    message = ask()
    [layers] = decoded(tmp_path, packet(message))
    ike = layers["isakmp"]
    assert [from_hex(text) for text in values(ike, "isakmp.ispi")] == [SPI_I]
    assert [from_hex(text) for text in values(ike, "isakmp.rspi")] == [bytes(8)]
    assert values(ike, "isakmp.exchangetype") == ["34"]
    assert values(ike, "isakmp.messageid") == ["0x00000000"]
    assert values(ike, "isakmp.length") == [str(len(message))]
    assert values(ike, "isakmp.nonce") == [NI.hex(":")]
    assert values(ike, "isakmp.key_exchange.dh_group") == [str(SUITE.group)]
    assert values(ike, "isakmp.tf.id.encr") == [str(SUITE.encr)]
    assert values(ike, "isakmp.tf.id.prf") == [str(SUITE.prf)]
    assert values(ike, "isakmp.tf.id.integ") == [str(SUITE.integ)]
    assert values(ike, "isakmp.tf.id.dh") == [str(SUITE.group)]
    assert values(ike, "isakmp.notify.msgtype") == ["16388", "16389"]
    hashes = [from_hex(text) for text in values(ike, "isakmp.notify.data")]
    assert hashes == [nat_hash(SPI_I, bytes(8), CLIENT, 500), nat_hash(SPI_I, bytes(8), GATEWAY, 500)]
    assert not values(layers, "_ws.malformed")


def test_the_flags_of_request_and_answer_are_rfc_7296s(tmp_path: Path) -> None:
    asked = ask()
    request, response = decoded(tmp_path, packet(asked), packet(answer(asked)))
    assert values(request, "isakmp.flags") == ["0x08"]
    assert values(response, "isakmp.flags") == ["0x20"]


def test_the_dissector_shows_index_and_proof_of_a_request(tmp_path: Path) -> None:
    message = ask(children=[(0, 0xA0000001), (1, 0xA0000002)])
    [layers] = decoded(tmp_path, packet(message))
    sync = layers["ike_sa_sync"]
    assert values(sync, "ike_sa_sync.direction") == ["0"]
    assert values(sync, "ike_sa_sync.version") == ["0"]
    assert values(sync, "ike_sa_sync.family") == ["4"]
    assert values(sync, "ike_sa_sync.gateway") == ["192.0.2.1"]
    assert [from_hex(text) for text in values(sync, "ike_sa_sync.spi")] == [OLD]
    assert values(sync, "ike_sa_sync.child.number") == ["0", "1"]
    assert values(sync, "ike_sa_sync.child.spi") == ["0xa0000001", "0xa0000002"]
    assert [from_hex(text) for text in values(sync, "ike_sa_sync.proof")] == [message[-32:]]


def test_the_dissector_shows_lifetime_and_proof_of_an_answer(tmp_path: Path) -> None:
    message = answer(ask())
    [layers] = decoded(tmp_path, packet(message))
    sync = layers["ike_sa_sync"]
    assert values(sync, "ike_sa_sync.direction") == ["1"]
    assert values(sync, "ike_sa_sync.lifetime") == ["14400"]
    assert [from_hex(text) for text in values(sync, "ike_sa_sync.proof")] == [message[-32:]]
    assert [from_hex(text) for text in values(layers["isakmp"], "isakmp.rspi")] == [SPI_R]


def test_the_dissector_shows_a_stub_handed_to_its_client_and_where_a_client_is_sent(tmp_path: Path) -> None:
    sa = StubSa(SPI_I, SPI_R, False, ("192.0.2.1", SPI_R), SUITE.prf, SK_D)
    download = build_download(sa, parse_stub_message(build_get(sa, NI)), b"sealed", 3600)
    handed, sent = decoded(tmp_path, packet(download), packet(build_move(sa, "192.0.2.2", 1 << 31 | 7)))
    assert values(handed["isakmp"], "isakmp.exchangetype") == values(sent["isakmp"], "isakmp.exchangetype") == ["240"]
    assert [from_hex(text) for text in values(handed["ike_sa_sync"], "ike_sa_sync.sealed_stub")] == [b"sealed"]
    assert values(handed["ike_sa_sync"], "ike_sa_sync.lifetime") == ["3600"]
    assert values(sent["ike_sa_sync"], "ike_sa_sync.move.status") == ["0"]
    assert values(sent["ike_sa_sync"], "ike_sa_sync.move.target") == ["192.0.2.2"]


def test_it_is_found_behind_a_non_esp_marker_too(tmp_path: Path) -> None:
    data = packet(ask(port=4500), 4500)
    assert MARKER in data
    [layers] = decoded(tmp_path, data)
    assert values(layers["ike_sa_sync"], "ike_sa_sync.gateway") == ["192.0.2.1"]


def test_an_ipv6_gateway_is_shown(tmp_path: Path) -> None:
    [layers] = decoded(tmp_path, packet(ask(sync_index=("2001:db8::1", OLD))))
    assert values(layers["ike_sa_sync"], "ike_sa_sync.gateway6") == ["2001:db8::1"]


def test_an_aead_proposal_reads_the_same_in_tshark(tmp_path: Path) -> None:
    [layers] = decoded(tmp_path, packet(ask(AEAD)))
    ike = layers["isakmp"]
    assert values(ike, "isakmp.tf.id.encr") == ["20"]
    assert values(ike, "isakmp.ike2.attr.key_length") == ["256"]
    assert values(ike, "isakmp.tf.id.integ") == []


def test_other_ike_messages_get_no_such_tree(tmp_path: Path) -> None:
    [layers] = decoded(tmp_path, packet(ask(sk_d_old=None)[:-20].replace(b"\xc8\x00", b"\x00\x00", 1)))
    assert "ike_sa_sync" not in layers
