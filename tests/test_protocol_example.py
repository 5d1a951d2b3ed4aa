"""The worked example of docs/protocol.md: keys and proofs recomputed without this project's code, messages with it."""

from __future__ import annotations

import hashlib
import hmac
import re

from bridge.ike.keys import derive_keys, skeyseed_resume
from bridge.ike.sync_exchange import (
    SyncResponse,
    build_request,
    build_response,
    parse_request,
    parse_response,
    verify_request,
    verify_response,
)
from bridge.ike.transforms import Suite
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


def without_proof(message: bytes) -> bytes:
    """PROOF, of 32 octets, is the end of both."""
    return message[:-32] + bytes(32)


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
        "SKEYSEED": 32,
        **dict.fromkeys(("SK_d", "SK_ai", "SK_ar", "SK_pi", "SK_pr"), 32),
        **dict.fromkeys(("SK_ei", "SK_er"), 16),
        "KEYMAT_0": 40,
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
    assert v["request"][-32:] == prf(prf(v["SK_d_old"], b"IKE_SA_SYNC initiator"), asked)
    assert v["answer"][-32:] == prf(prf(v["SK_d_old"], b"IKE_SA_SYNC responder"), asked + answered)


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
    seed = skeyseed_resume(SUITE.prf, v["SK_d_old"], v["Ni"], v["Nr"])
    keys = derive_keys(SUITE, seed, v["Ni"], v["Nr"], v["SPIi"], v["SPIr"])
    assert tuple(keys) == tuple(v[name] for name in ("SK_d", "SK_ai", "SK_ar", "SK_ei", "SK_er", "SK_pi", "SK_pr"))
