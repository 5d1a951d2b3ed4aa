"""Requests and answers as tshark reads them: a decoder that nobody here wrote, and the dissector that ships."""

from __future__ import annotations

import json
import struct
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from bridge.ike.cookie import Cookies, glance
from bridge.ike.key_exchange import fresh_public_value
from bridge.ike.nat_detection import nat_hash
from bridge.ike.resumption_answer import build_refusal, build_response
from bridge.ike.resumption_request import build_request, parse_request
from bridge.ike.stub_exchange import (
    MoveStatus,
    StubSa,
    build_download,
    build_get,
    build_move,
    build_moving,
    parse_stub_message,
)
from bridge.ike.sync_messages import SyncRequest
from bridge.ike.transforms import Suite
from bridge.net.packet import MARKER, udp_datagram
from wire_support import as_codec_reads, as_tshark_reads, dissect, from_hex, proof_range, values

SUITE = Suite(12, 128, 12, 5, 31)
AEAD = Suite(20, 256, 0, 7, 20)
SEVERAL = Suite(20, 256, 0, 7, 31, (36, 0, 37))
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


def answer(to: bytes, suite: Suite = SUITE, key_exchange: tuple[int, bytes] | None = None) -> bytes:
    request = parse_request(to)
    assert request is not None
    return build_response(
        request,
        spi_r=SPI_R,
        nonce=NR,
        prf=suite.prf,
        sk_d_old=SK_D,
        lifetime=14400,
        key_exchange=key_exchange,
        nat=(GATEWAY, 500, CLIENT, 500),
    )


def packet(message: bytes, port: int = 500) -> bytes:
    """An IPv4 packet with an IKE message."""
    udp = udp_datagram(CLIENT, port, GATEWAY, port, message, port == 4500)
    addresses = ip_address(CLIENT).packed + ip_address(GATEWAY).packed
    return struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0) + addresses + udp


def decoded(folder: Path, *packets: bytes) -> list[dict[str, Any]]:
    """Every packet's layers as `tshark -T json` gives them."""
    capture = folder / "capture.pcap"
    octets = struct.pack("=IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, RAW_IP)
    for number, data in enumerate(packets):
        octets += struct.pack("=IIII", number, 0, len(data), len(data)) + data
    capture.write_bytes(octets)
    return dissect(capture)


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


SA = StubSa(SPI_I, SPI_R, False, ("192.0.2.1", SPI_R), SUITE.prf, SK_D)
GET, MOVE = build_get(SA, NI), build_move(SA, "2001:db8::2", 1 << 31 | 7)
OLD_SPIS = [0xC0000001, 0xC0ABCDEF]
CHILDREN = [(0, 0xA0000001), (1, 0xFFFFFFFF)]


def read(message: bytes) -> SyncRequest:
    found = parse_request(message)
    assert found is not None
    return found


def of_release_0_1() -> bytes:
    recorded = json.loads((Path(__file__).parent / "messages/release-0.1.json").read_text())
    return bytes.fromhex(recorded["request"])


def challenge(to: bytes) -> bytes:
    seen = glance(to)
    assert seen is not None
    return Cookies().challenge(seen, CLIENT, 500, 0.0)


MESSAGES = {
    "a request": ask(),
    "a plain draft request": ask(sk_d_old=None),
    "a request with children": ask(children=CHILDREN),
    "a request with children by their old SPIs": ask(children=CHILDREN, old_children=OLD_SPIS),
    "a request with one old SPI": ask(children=CHILDREN[:1], old_children=OLD_SPIS[:1]),
    "a request with a stub and a cookie": ask(sealed_stub=bytes(range(200)), cookie=b"c" * 64),
    "a request with an IPv6 index": ask(sync_index=("2001:db8::1", OLD)),
    "a request of an AEAD": ask(AEAD),
    "a request of release 0.1": of_release_0_1(),
    "a request whose sender wants to be told of a refusal": ask(refusable=True),
    "a refusal": build_refusal(read(ask(refusable=True))),
    "a refusal with a proof": build_refusal(read(ask(refusable=True)), "no-stub", prf=SUITE.prf, sk_d_old=SK_D),
    "a request for forward secrecy": ask(forward_secrecy=True),
    "an answer with KEr": answer(ask(forward_secrecy=True), key_exchange=(31, bytes(range(32)))),
    "an answer": answer(ask()),
    "a plain draft answer": answer(ask(sk_d_old=None)),
    "an answer to a request with an IPv6 index": answer(ask(sync_index=("2001:db8::1", OLD))),
    "a cookie": challenge(ask()),
    "GET Stub": GET,
    "Download Stub": build_download(SA, parse_stub_message(GET), b"sealed", 3600),
    "Download Stub that names gateways": build_download(
        SA, parse_stub_message(GET), None, 0, ["192.0.2.2", "2001:db8::2"]
    ),
    "Move": MOVE,
    "Moving": build_moving(SA, parse_stub_message(MOVE), MoveStatus.MOVING, NI),
}


def test_codec_and_tshark_read_every_field_of_every_message_the_same(tmp_path: Path) -> None:
    shown = decoded(tmp_path, *(packet(message) for message in MESSAGES.values()))
    for (name, message), layers in zip(MESSAGES.items(), shown, strict=True):
        assert as_tshark_reads(layers) == as_codec_reads(message), name
        assert not values(layers, "_ws.malformed"), name


def test_tshark_reads_further_key_exchanges_as_rfc_9370s(tmp_path: Path) -> None:
    [layers] = decoded(tmp_path, packet(ask(SEVERAL)))
    assert values(layers["isakmp"], "isakmp.prop.transforms") == ["5"]
    assert values(layers["isakmp"], "isakmp.tf.type")[-2:] == ["6", "8"]
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
    assert [from_hex(text) for text in values(sync, "ike_sa_sync.proof")] == [message[proof_range(message)]]


def test_the_dissector_shows_what_the_old_gateway_received_on(tmp_path: Path) -> None:
    [layers] = decoded(tmp_path, packet(MESSAGES["a request with children by their old SPIs"]))
    sync = layers["ike_sa_sync"]
    assert values(sync, "ike_sa_sync.old_child.spi") == ["0xc0000001", "0xc0abcdef"]
    assert values(sync, "ike_sa_sync.attribute") == ["2", "2", "6", "1"]


def test_old_spis_that_are_cut_are_shown_as_octets(tmp_path: Path) -> None:
    message = MESSAGES["a request with one old SPI"]
    one = bytes.fromhex("00060004c0000001")
    cut = message.replace(one, bytes.fromhex("00060003c00000") + bytes.fromhex("03e70000"))
    # three octets more, in an attribute of an unknown type without a value
    cut = cut[:24] + len(cut).to_bytes(4) + cut[28:]
    at = cut.index(bytes((0, 4, 0, 0)) + OLD) - 2
    cut = cut[:at] + (int.from_bytes(cut[at : at + 2]) + 3).to_bytes(2) + cut[at + 2 :]
    [layers] = decoded(tmp_path, packet(cut))
    assert values(layers, "ike_sa_sync.old_child.spi") == []
    assert values(layers, "ike_sa_sync.attribute.value") == ["c0:00:00"]


def test_the_dissector_shows_lifetime_and_proof_of_an_answer(tmp_path: Path) -> None:
    message = answer(ask())
    [layers] = decoded(tmp_path, packet(message))
    sync = layers["ike_sa_sync"]
    assert values(sync, "ike_sa_sync.direction") == ["1"]
    assert values(sync, "ike_sa_sync.lifetime") == ["14400"]
    assert [from_hex(text) for text in values(sync, "ike_sa_sync.proof")] == [message[-32:]]
    assert [from_hex(text) for text in values(layers["isakmp"], "isakmp.rspi")] == [SPI_R]


def test_the_dissector_shows_a_stub_handed_to_its_client_and_where_a_client_is_sent(tmp_path: Path) -> None:
    download = MESSAGES["Download Stub"]
    handed, sent = decoded(tmp_path, packet(download), packet(build_move(SA, "192.0.2.2", 1 << 31 | 7)))
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


@pytest.mark.parametrize("family", [0, 5])
def test_a_payload_that_breaks_the_layout_is_shown_as_malformed(tmp_path: Path, family: int) -> None:
    message = ask(nat=None)
    body = message.index(bytes((0, 4, 0, 0)) + OLD)
    altered = message[: body + 1] + bytes((family,)) + message[body + 2 :]
    [layers] = decoded(tmp_path, packet(altered))
    assert "ike_sa_sync.malformed" in layers["ike_sa_sync"]["_ws.expert"]
