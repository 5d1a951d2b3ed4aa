"""The Encrypted payload: what one side protects the other reads, and nobody else can alter it."""

from __future__ import annotations

import os

import pytest

from bridge.ike.encrypted_payload import NotAuthentic, Protection, protect, unprotect
from bridge.ike.keys import derive_keys
from bridge.ike.message import ExchangeType, Flag, MalformedMessage, NotifyType, PayloadType, encode_notify
from bridge.ike.transforms import Encr, Group, Integ, Prf, Suite, UnsupportedSuite

SUITES = [
    Suite(Encr.AES_CBC, 128, Integ.HMAC_SHA2_256_128, Prf.HMAC_SHA2_256, Group.CURVE_25519),
    Suite(Encr.AES_CBC, 256, Integ.HMAC_SHA2_512_256, Prf.HMAC_SHA2_512, Group.ECP_384),
    Suite(Encr.AES_CBC, 192, Integ.HMAC_SHA2_384_192, Prf.HMAC_SHA2_384, Group.ECP_256),
    Suite(Encr.AES_CBC, 128, Integ.HMAC_SHA1_96, Prf.HMAC_SHA1, Group.MODP_2048),
    Suite(Encr.AES_CBC, 128, Integ.AES_XCBC_96, Prf.AES128_XCBC, Group.MODP_2048),
    Suite(Encr.AES_CTR, 256, Integ.AES_CMAC_96, Prf.AES128_CMAC, Group.MODP_2048),
    Suite(Encr.AES_GCM_16, 128, 0, Prf.HMAC_SHA2_256, Group.CURVE_25519),
    Suite(Encr.AES_GCM_12, 192, 0, Prf.HMAC_SHA2_256, Group.CURVE_25519),
    Suite(Encr.AES_GCM_8, 256, 0, Prf.HMAC_SHA2_384, Group.CURVE_25519),
    Suite(Encr.AES_CCM_16, 128, 0, Prf.HMAC_SHA2_256, Group.CURVE_25519),
    Suite(Encr.AES_CCM_8, 256, 0, Prf.HMAC_SHA2_256, Group.CURVE_25519),
    Suite(Encr.CHACHA20_POLY1305, 0, 0, Prf.HMAC_SHA2_256, Group.CURVE_25519),
]
PAYLOADS = [
    (PayloadType.NOTIFY, encode_notify(NotifyType.COOKIE, b"of some length")),
    (PayloadType.NONCE, bytes(range(32))),
]


def protection(suite: Suite, *, initiator: bool = True, seed: bytes = b"seed") -> Protection:
    keys = derive_keys(suite, seed * 8, b"i" * 32, b"r" * 32, b"I" * 8, b"R" * 8)
    return Protection.of(suite, keys, initiator=initiator)


def message(way: Protection, payloads: list[tuple[PayloadType, bytes]] = PAYLOADS) -> bytes:
    return protect(
        way,
        spi_i=b"I" * 8,
        spi_r=b"R" * 8,
        exchange=ExchangeType.INFORMATIONAL,
        flags=Flag.INITIATOR,
        message_id=1,
        payloads=payloads,
        iv=os.urandom(way.iv_length),
    )


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)
def test_what_is_protected_comes_back(suite: Suite) -> None:
    way = protection(suite)
    header, payloads = unprotect(way, message(way))
    assert (header.exchange, header.message_id) == (ExchangeType.INFORMATIONAL, 1)
    assert [(payload.type, payload.body) for payload in payloads] == PAYLOADS


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)
def test_a_message_without_payloads_is_a_message_too(suite: Suite) -> None:
    way = protection(suite)
    assert unprotect(way, message(way, []))[1] == ()


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)
def test_no_octet_can_be_altered(suite: Suite) -> None:
    way = protection(suite)
    octets = message(way)
    for position in (0, 15, 23, 33, 40, len(octets) - 1):
        altered = bytearray(octets)
        altered[position] ^= 1
        with pytest.raises(NotAuthentic):
            unprotect(way, bytes(altered))


def test_each_direction_has_keys_of_its_own() -> None:
    with pytest.raises(NotAuthentic):
        unprotect(protection(SUITES[0], initiator=False), message(protection(SUITES[0])))


def test_the_text_of_a_key_holder_shows_no_key() -> None:
    way = protection(SUITES[0])
    assert repr(way) == f"Protection({SUITES[0].name})"


def test_a_message_in_the_clear_is_refused() -> None:
    from bridge.ike.message import build

    plain = build(
        spi_i=b"I" * 8, spi_r=b"R" * 8, exchange=37, flags=8, message_id=1, payloads=[(PayloadType.NONCE, bytes(32))]
    )
    with pytest.raises(MalformedMessage):
        unprotect(protection(SUITES[0]), plain)


def test_a_cut_encrypted_payload_is_refused() -> None:
    from bridge.ike.message import build

    cut = build(spi_i=b"I" * 8, spi_r=b"R" * 8, exchange=37, flags=8, message_id=1, payloads=[(PayloadType.SK, b"1")])
    with pytest.raises(MalformedMessage):
        unprotect(protection(SUITES[0]), cut)


def test_a_cipher_that_is_not_there_is_named() -> None:
    suite = Suite(Encr.CAST, 128, Integ.HMAC_SHA1_96, Prf.HMAC_SHA1, Group.MODP_2048)
    with pytest.raises(UnsupportedSuite, match="CAST"):
        _ = Protection(suite, b"", b"").iv_length
