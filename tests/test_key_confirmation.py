"""The first protected exchange on a rebuilt IKE_SA (bridge.ike.key_confirmation)."""

from __future__ import annotations

import os

import pytest

from bridge.ike.encrypted_payload import NotAuthentic, Protection, protect, unprotect
from bridge.ike.key_confirmation import MESSAGE_ID, Confirmation, possible
from bridge.ike.keys import IkeKeys, derive_keys
from bridge.ike.message import ExchangeType, Flag
from bridge.ike.transforms import Encr, Integ, Prf, Suite

CBC = Suite(Encr.AES_CBC, 128, Integ.HMAC_SHA2_256_128, Prf.HMAC_SHA2_256, 31)
GCM = Suite(Encr.AES_GCM_16, 256, 0, Prf.HMAC_SHA2_384, 20)
SPI_I, SPI_R = b"initiate", b"responds"
both = pytest.mark.parametrize("suite", [CBC, GCM], ids=["CBC", "GCM"])


def keys_of(suite: Suite, seed: bytes = b"seed") -> IkeKeys:
    return derive_keys(suite, seed, bytes(32), bytes(32), SPI_I, SPI_R)


def confirmation(suite: Suite) -> Confirmation:
    return Confirmation(suite, keys_of(suite), SPI_I, SPI_R, random=os.urandom)


def answer(suite: Suite, keys: IkeKeys, *, initiator: bool = False, **changes: int) -> bytes:
    protection = Protection.of(suite, keys, initiator=initiator)
    values = {"exchange": int(ExchangeType.INFORMATIONAL), "flags": int(Flag.RESPONSE), "message_id": MESSAGE_ID}
    return protect(
        protection, spi_i=SPI_I, spi_r=SPI_R, payloads=(), iv=os.urandom(protection.iv_length), **(values | changes)
    )


@both
def test_the_request_is_an_empty_one_of_the_initiators_with_message_id_1(suite: Suite) -> None:
    request = confirmation(suite).request
    header, payloads = unprotect(Protection.of(suite, keys_of(suite), initiator=True), request)
    assert (header.spi_i, header.spi_r, header.exchange) == (SPI_I, SPI_R, ExchangeType.INFORMATIONAL)
    assert (header.flags, header.message_id, payloads) == (Flag.INITIATOR, 1, ())
    with pytest.raises(NotAuthentic):
        unprotect(Protection.of(suite, keys_of(suite, b"another"), initiator=True), request)


@both
def test_the_gateways_answer_under_the_new_keys_confirms(suite: Suite) -> None:
    assert confirmation(suite).is_answered_by(answer(suite, keys_of(suite)))


@both
def test_nothing_else_confirms(suite: Suite) -> None:
    keys = keys_of(suite)
    right = answer(suite, keys)
    wrong = {
        "under other keys": answer(suite, keys_of(suite, b"another")),
        "under the client's own keys": answer(suite, keys, initiator=True),
        "a request": answer(suite, keys, flags=0),
        "another message ID": answer(suite, keys, message_id=2),
        "another exchange": answer(suite, keys, exchange=36),
        "altered": right[:-1] + bytes((right[-1] ^ 1,)),
        "cut": right[:-1],
        "nothing": b"",
    }
    assert [name for name, octets in wrong.items() if confirmation(suite).is_answered_by(octets)] == []


def test_ciphers_that_this_program_lacks_are_known_beforehand() -> None:
    assert possible(CBC)
    assert possible(GCM)
    assert not possible(Suite(Encr.CAMELLIA_CBC, 128, Integ.HMAC_SHA2_256_128, Prf.HMAC_SHA2_256, 31))
