"""The worked example of docs/protocol.md: keys and proofs recomputed without this project's code, messages with it."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from bridge.config import canonical_address
from bridge.ike.keys import derive_keys, skeyseed_resume
from bridge.ike.resumption_answer import build_refusal, build_response, parse_response, verify_response
from bridge.ike.resumption_request import build_request, parse_request, verify_request
from bridge.ike.stub_exchange import MoveStatus, StubSa, build_move, build_moving, move_message_id, parse_stub_message
from bridge.ike.sync_messages import SyncResponse
from bridge.ike.transforms import Suite
from bridge.stub.codec import decode, encode
from bridge.stub.stub import Index
from bridge.stub.types import Endpoint
from docs_support import DOCS

SUITE = Suite(12, 128, 12, 5, 31)
CLIENT, OLD, TARGET = "192.0.2.10", "192.0.2.1", "192.0.2.2"
SPI_CLIENT, SPI_GATEWAY, SPI_OLD = 0x40000001, 0x40000002, 0xC0A1B2C3


def example() -> dict[str, bytes]:
    """The values by name; a line without a name goes on with the one before."""
    found: dict[str, str] = {}
    name = ""
    for said, digits in re.findall(r"^    (\S.{10}\S*|\s{12})\s*([0-9a-f]+)$", section(), re.MULTILINE):
        name = said.strip() or name
        found[name] = found.get(name, "") + digits
    return {key: bytes.fromhex(value) for key, value in found.items()}


def section() -> str:
    return (DOCS / "protocol.md").read_text().partition("\n## Worked example\n")[2]


VALUES = example()


def prf(key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, "sha256")


def prf_plus(key: bytes, seed: bytes, length: int) -> bytes:
    output = last = b""
    for number in range(1, 20):
        last = prf(key, last + seed + bytes((number,)))
        output += last
    return output[:length]


def split(message: bytes) -> tuple[bytes, bytes]:
    """The message with PROOF zero, and PROOF, of 32 octets: the end of SYN, which is the first payload of the request,
    else the last."""
    end = 28 + int.from_bytes(message[30:32]) if message[16] == 200 else len(message)
    return message[: end - 32] + bytes(32) + message[end:], message[end - 32 : end]


def without_proof(message: bytes) -> bytes:
    return split(message)[0]


def test_every_value_is_there() -> None:
    assert {name: len(value) for name, value in VALUES.items()} == {
        "SK_d_old": 32,
        "SPIi": 8,
        "SPIr": 8,
        "old SPI": 8,
        "KEi": 32,
        "Ni": 32,
        "Nr": 32,
        "request": int.from_bytes(VALUES["request"][24:28]),
        "answer": int.from_bytes(VALUES["answer"][24:28]),
        "refusal": int.from_bytes(VALUES["refusal"][24:28]),
        "SKEYSEED": 32,
        **dict.fromkeys(("SK_d", "SK_ai", "SK_ar", "SK_pi", "SK_pr"), 32),
        **dict.fromkeys(("SK_ei", "SK_er"), 16),
        "KEYMAT_0": 40,
        **dict.fromkeys(("private i", "private r", "FS KEi", "FS KEr", "g^ir", "FS SKEYSEED", "FS SK_d"), 32),
        "FS request": int.from_bytes(VALUES["FS request"][24:28]),
        "FS answer": int.from_bytes(VALUES["FS answer"][24:28]),
        "stub": 197,
        "bank key": 32,
        "key id": 4,
        "seal nonce": 12,
        "sealed": 197 + 32,
        "Move": int.from_bytes(VALUES["Move"][24:28]),
        "Moving": int.from_bytes(VALUES["Moving"][24:28]),
    }


def test_the_keys_follow_from_the_formulas_alone() -> None:
    v = VALUES
    assert prf(v["SK_d_old"], v["Ni"] + v["Nr"]) == v["SKEYSEED"]
    names = ("SK_d", "SK_ai", "SK_ar", "SK_ei", "SK_er", "SK_pi", "SK_pr")
    keys = prf_plus(v["SKEYSEED"], v["Ni"] + v["Nr"] + v["SPIi"] + v["SPIr"], 32 * 5 + 16 * 2)
    assert keys == b"".join(v[name] for name in names)
    nonces = v["Ni"] + SPI_CLIENT.to_bytes(4) + v["Nr"] + SPI_GATEWAY.to_bytes(4)
    assert prf_plus(v["SK_d"], nonces, 40) == v["KEYMAT_0"]


def test_the_proofs_follow_from_the_formulas_alone() -> None:
    v = VALUES
    asked, answered = without_proof(v["request"]), without_proof(v["answer"])
    assert split(v["request"])[1] == prf(prf(v["SK_d_old"], b"IKE_SA_SYNC initiator"), asked)
    assert v["answer"][-32:] == prf(prf(v["SK_d_old"], b"IKE_SA_SYNC responder"), asked + answered)
    refused = without_proof(v["refusal"])
    assert v["refusal"][-32:] == prf(prf(v["SK_d_old"], b"IKE_SA_SYNC responder"), asked + refused)


def test_nat_detection_follows_from_rfc_7296_alone() -> None:
    for name, spi_r, (source, destination) in (
        ("request", bytes(8), (CLIENT, TARGET)),
        ("answer", VALUES["SPIr"], (TARGET, CLIENT)),
    ):
        for address in (source, destination):
            octets = bytes(map(int, address.split("."))) + (4500).to_bytes(2)
            assert hashlib.sha1(VALUES["SPIi"] + spi_r + octets).digest() in VALUES[name]


def test_this_project_makes_the_same_messages_and_keys() -> None:
    v = VALUES
    asked = build_request(
        spi_i=v["SPIi"],
        suite=SUITE,
        ke_value=v["KEi"],
        nonce=v["Ni"],
        sync_index=(OLD, v["old SPI"]),
        prf=SUITE.prf,
        sk_d_old=v["SK_d_old"],
        children=[(0, SPI_CLIENT)],
        old_children=[SPI_OLD],
        refusable=True,
        nat=(CLIENT, 4500, TARGET, 4500),
    )
    assert asked == v["request"]
    request = parse_request(asked)
    assert request is not None
    assert verify_request(request, SUITE.prf, v["SK_d_old"])
    answered = build_response(
        request,
        spi_r=v["SPIr"],
        nonce=v["Nr"],
        prf=SUITE.prf,
        sk_d_old=v["SK_d_old"],
        lifetime=14400,
        children=[(0, SPI_GATEWAY)],
        nat=(TARGET, 4500, CLIENT, 4500),
    )
    assert answered == v["answer"]
    answer = parse_response(answered, asked)
    assert isinstance(answer, SyncResponse)
    assert verify_response(answer, asked, SUITE.prf, v["SK_d_old"])
    assert build_refusal(request, "connection-missing", prf=SUITE.prf, sk_d_old=v["SK_d_old"]) == v["refusal"]
    seed = skeyseed_resume(SUITE.prf, v["SK_d_old"], v["Ni"], v["Nr"])
    keys = derive_keys(SUITE, seed, v["Ni"], v["Nr"], v["SPIi"], v["SPIr"])
    assert tuple(keys) == tuple(v[name] for name in ("SK_d", "SK_ai", "SK_ar", "SK_ei", "SK_er", "SK_pi", "SK_pr"))


def test_forward_secrecy_follows_from_x25519_and_the_formulas_alone() -> None:
    v = VALUES
    ours, theirs = (X25519PrivateKey.from_private_bytes(v[name]) for name in ("private i", "private r"))
    assert ours.public_key().public_bytes_raw() == v["FS KEi"]
    assert theirs.public_key().public_bytes_raw() == v["FS KEr"]
    assert ours.exchange(theirs.public_key()) == v["g^ir"]
    assert prf(v["SK_d_old"], v["g^ir"] + v["Ni"] + v["Nr"]) == v["FS SKEYSEED"]
    assert prf_plus(v["FS SKEYSEED"], v["Ni"] + v["Nr"] + v["SPIi"] + v["SPIr"], 32) == v["FS SK_d"]
    asked, answered = without_proof(v["FS request"]), without_proof(v["FS answer"])
    assert split(v["FS request"])[1] == prf(prf(v["SK_d_old"], b"IKE_SA_SYNC initiator"), asked)
    assert v["FS answer"][-32:] == prf(prf(v["SK_d_old"], b"IKE_SA_SYNC responder"), asked + answered)


def test_this_project_makes_the_same_messages_with_forward_secrecy() -> None:
    v = VALUES
    asked = build_request(
        spi_i=v["SPIi"],
        suite=SUITE,
        ke_value=v["FS KEi"],
        nonce=v["Ni"],
        sync_index=(OLD, v["old SPI"]),
        prf=SUITE.prf,
        sk_d_old=v["SK_d_old"],
        children=[(0, SPI_CLIENT)],
        old_children=[SPI_OLD],
        refusable=True,
        forward_secrecy=True,
        nat=(CLIENT, 4500, TARGET, 4500),
    )
    assert asked == v["FS request"]
    request = parse_request(asked)
    assert request is not None
    answered = build_response(
        request,
        spi_r=v["SPIr"],
        nonce=v["Nr"],
        prf=SUITE.prf,
        sk_d_old=v["SK_d_old"],
        lifetime=14400,
        children=[(0, SPI_GATEWAY)],
        key_exchange=(SUITE.group, v["FS KEr"]),
        nat=(TARGET, 4500, CLIENT, 4500),
    )
    assert answered == v["FS answer"]
    answer = parse_response(answered, asked)
    assert isinstance(answer, SyncResponse)
    assert answer.key_exchange == (SUITE.group, v["FS KEr"])
    assert skeyseed_resume(SUITE.prf, v["SK_d_old"], v["Ni"], v["Nr"], v["g^ir"]) == v["FS SKEYSEED"]


ESTABLISHED = 1795910400
KEY = f"ike:stub:{{{OLD}/cd}}:cddb1f1df6a1b967"


def test_the_stub_is_the_pages_table_of_elements_in_messagepack() -> None:
    assert VALUES["stub"][0] == 1
    elements: list[Any] = msgspec.msgpack.decode(VALUES["stub"][1:])
    old, client = bytes((192, 0, 2, 1)) + (4500).to_bytes(2), bytes((192, 0, 2, 10)) + (4500).to_bytes(2)
    spis = bytes.fromhex("5a1e2f3d4c5b6a79") + VALUES["old SPI"]
    assert elements[:6] == [None, spis, False, b"\x02vpn.example.org", b"\x03client@example.org", None]
    assert elements[6:12] == [[12, 128, 12, 5, 31], VALUES["SK_d_old"], None, old, client, "gw"]
    assert elements[12:14] == [[], [bytes((10, 20, 1, 1))]]
    assert elements[16] is None
    # the gateway's network is a range (8), the client's virtual IP dynamic (2)
    inner = b"\x08" + bytes((10, 10, 0, 0, 10, 10, 255, 255))
    outer = b"\x02" + bytes((10, 20, 1, 1))
    spi_pair = SPI_OLD.to_bytes(4) + bytes.fromhex("c4d5e6f7")
    assert elements[17] == [["net", False, 2, 0, 20, 128, 0, 0, [], spi_pair, inner, outer]]
    assert elements[18:] == [ESTABLISHED, 14400, None, 15840, 250, 2]


def test_the_sealed_stub_opens_with_the_line_of_the_key_file_at_its_place_alone() -> None:
    key_id, _, key = section().partition("the line of the key file `")[2].partition("`")[0].partition(" ")
    assert bytes.fromhex(key_id) == VALUES["key id"]
    assert base64.b64decode(key) == VALUES["bank key"]
    sealed = VALUES["sealed"]
    assert sealed[:16] == VALUES["key id"] + VALUES["seal nonce"]
    assert AESGCM(VALUES["bank key"]).decrypt(VALUES["seal nonce"], sealed[16:], KEY.encode()) == VALUES["stub"]


def test_the_proofs_of_move_and_moving_have_the_label_of_their_sender() -> None:
    sk_d, move, moving = VALUES["SK_d_old"], without_proof(VALUES["Move"]), without_proof(VALUES["Moving"])
    assert VALUES["Move"][-32:] == prf(prf(sk_d, b"IKE_SA_SYNC responder"), move)
    assert VALUES["Moving"][-32:] == prf(prf(sk_d, b"IKE_SA_SYNC initiator"), move + moving)


def test_this_project_makes_the_same_stub_move_and_moving() -> None:
    stub = decode(VALUES["stub"])
    assert encode(stub) == VALUES["stub"]
    assert (stub.index.key, stub.remote) == (KEY, Endpoint(CLIENT, 4500))
    sa = StubSa(stub.spi_i, stub.spi_r, False, stub.index, SUITE.prf, stub.sk_d)
    move = build_move(sa, TARGET, move_message_id(ESTABLISHED + 60))
    assert move == VALUES["Move"]
    client = StubSa(stub.spi_i, stub.spi_r, True, stub.index, SUITE.prf, stub.sk_d)
    assert build_moving(client, parse_stub_message(move), MoveStatus.MOVING, b"\xaa" * 32) == VALUES["Moving"]


def test_a_key_has_its_gateway_in_canonical_text() -> None:
    index = Index(canonical_address("2001:0DB8:0:0::1"), bytes.fromhex("0123456789abcdef"))
    assert index.key == "ike:stub:{2001:db8::1/01}:0123456789abcdef"
    assert index.bucket == "ike:stubs:{2001:db8::1/01}"
    assert index.gone == "ike:gone:{2001:db8::1/01}"
