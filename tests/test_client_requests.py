"""What a client's requests on a rebuilt IKE_SA are (bridge.ike.client_requests)."""

from __future__ import annotations

import os
from typing import Any

import pytest

from bridge.ike.client_requests import ClientRequests, Kind
from bridge.ike.encrypted_payload import Protection, protect, unprotect
from bridge.ike.key_confirmation import Confirmation
from bridge.ike.keys import Resumption
from bridge.ike.message import ExchangeType, Flag, PayloadType
from bridge.ike.transforms import Encr, Group, Integ, Prf, Suite

SUITES = [
    Suite(Encr.AES_CBC, 128, Integ.HMAC_SHA2_256_128, Prf.HMAC_SHA2_256, Group.CURVE_25519),
    Suite(Encr.AES_CBC, 256, Integ.HMAC_SHA2_512_256, Prf.HMAC_SHA2_512, Group.ECP_384),
    Suite(Encr.AES_CBC, 128, Integ.AES_XCBC_96, Prf.AES128_XCBC, Group.MODP_2048),
    Suite(Encr.AES_CTR, 256, Integ.AES_CMAC_96, Prf.AES128_CMAC, Group.MODP_2048),
    Suite(Encr.AES_GCM_16, 256, 0, Prf.HMAC_SHA2_384, Group.ECP_384),
    Suite(Encr.AES_CCM_8, 128, 0, Prf.HMAC_SHA2_256, Group.CURVE_25519),
    Suite(Encr.CHACHA20_POLY1305, 0, 0, Prf.HMAC_SHA2_256, Group.CURVE_25519),
]
each_suite = pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)
SPI_I, SPI_R = b"initiate", b"responds"
DELETE_IKE_SA = (PayloadType.DELETE, bytes((1, 0, 0, 0)))


def resumption(suite: Suite, g_ir: bytes = b"") -> Resumption:
    return Resumption(suite, b"d" * suite.prf_length, b"i" * 32, b"r" * 32, SPI_I, SPI_R, g_ir)


def requests(suite: Suite = SUITES[0]) -> ClientRequests:
    return ClientRequests(resumption(suite), random=os.urandom)


def request(suite: Suite = SUITES[0], *, payloads: Any = (), initiator: bool = True, **changes: Any) -> bytes:
    protection = Protection.of(suite, resumption(suite).keys(), initiator=initiator)
    values: dict[str, Any] = {
        "spi_i": SPI_I,
        "spi_r": SPI_R,
        "exchange": int(ExchangeType.INFORMATIONAL),
        "flags": int(Flag.INITIATOR),
        "message_id": 1,
    }
    return protect(protection, payloads=payloads, iv=os.urandom(protection.iv_length), **(values | changes))


@each_suite
def test_a_liveness_check_is_answered_as_its_client_expects(suite: Suite) -> None:
    confirmation = Confirmation(suite, resumption(suite).keys(), SPI_I, SPI_R, random=os.urandom)
    ours = requests(suite)
    assert ours.kind(confirmation.request) is Kind.LIVENESS
    answer = ours.answer(confirmation.request)
    assert confirmation.is_answered_by(answer)
    header, payloads = unprotect(Protection.of(suite, resumption(suite).keys(), initiator=False), answer)
    assert (header.spi_i, header.spi_r, header.exchange) == (SPI_I, SPI_R, ExchangeType.INFORMATIONAL)
    assert (header.flags, header.message_id, payloads) == (Flag.RESPONSE, 1, ())


@each_suite
def test_the_last_request_gets_the_same_octets_again_and_no_other_one(suite: Suite) -> None:
    ours, first = requests(suite), request(suite)
    answer = ours.answer(first)
    assert ours.kind(first) is Kind.REPEATED
    assert ours.last is not None
    assert ours.last.answer == answer
    # under the same Message ID, but not the same octets
    assert ours.kind(request(suite)) is Kind.NOTHING
    second = request(suite, message_id=2)
    assert ours.kind(second) is Kind.LIVENESS
    assert ours.answer(second) != answer
    assert ours.kind(first) is Kind.NOTHING
    assert ours.expected == 3


@each_suite
def test_what_only_charon_can_answer_is_told_from_a_liveness_check(suite: Suite) -> None:
    others = {
        "DELETE": request(suite, payloads=[DELETE_IKE_SA]),
        "CREATE_CHILD_SA": request(
            suite, exchange=int(ExchangeType.CREATE_CHILD_SA), payloads=[(PayloadType.NONCE, bytes(32))]
        ),
        "a notification": request(suite, payloads=[(PayloadType.NOTIFY, bytes(4))]),
    }
    ours = requests(suite)
    assert {name: ours.kind(octets) for name, octets in others.items()} == dict.fromkeys(others, Kind.OTHER)
    assert ours.expected == 1


@each_suite
def test_nothing_else_is_answered(suite: Suite) -> None:
    right = request(suite)
    child = request(suite, exchange=int(ExchangeType.CREATE_CHILD_SA))
    other_keys = resumption(suite)._replace(sk_d_old=b"x" * suite.prf_length).keys()
    stranger = Protection.of(suite, other_keys, initiator=True)
    wrong = {
        "under other keys": protect(
            stranger,
            spi_i=SPI_I,
            spi_r=SPI_R,
            exchange=37,
            flags=8,
            message_id=1,
            payloads=(),
            iv=os.urandom(stranger.iv_length),
        ),
        "under the gateway's own keys": request(suite, initiator=False),
        "an answer": request(suite, flags=int(Flag.INITIATOR | Flag.RESPONSE)),
        "of the original responder": request(suite, flags=0),
        "the next but one": request(suite, message_id=2),
        "the one before": request(suite, message_id=0),
        "another exchange": request(suite, exchange=35),
        "another SA": request(suite, spi_r=b"another!"),
        "altered": right[:-1] + bytes((right[-1] ^ 1,)),
        "CREATE_CHILD_SA, altered": child[:-1] + bytes((child[-1] ^ 1,)),
        "cut": right[:-1],
        "nothing": b"",
    }
    ours = requests(suite)
    assert [name for name, octets in wrong.items() if ours.kind(octets) is not Kind.NOTHING] == []


def test_with_forward_secrecy_the_keys_are_others() -> None:
    suite = SUITES[0]
    ours = ClientRequests(resumption(suite, b"shared"), random=os.urandom)
    assert ours.kind(request(suite)) is Kind.NOTHING


def test_no_key_is_shown() -> None:
    assert repr(requests()) == "ClientRequests(expected=1)"
