"""The one round trip of a resumption: bridge.ike.resumption_request, bridge.ike.resumption_answer."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.ike.keys import prf
from bridge.ike.message import Flag, MalformedMessage, NotifyType, PayloadType, build, encode_notify, parse
from bridge.ike.nat_detection import nat_hash
from bridge.ike.resumption_answer import build_refusal, build_response, parse_response, verify_refusal, verify_response
from bridge.ike.resumption_request import build_request, parse_request, sync_comes_first, verify_request
from bridge.ike.sync_messages import CookieChallenge, OrdinaryResponse, SyncRefusal, SyncRequest, SyncResponse
from bridge.ike.sync_payload import SyncPayload
from bridge.ike.transforms import PRF_OUTPUT, Prf, Suite
from wire_support import proof_range

RECORDED = Path(__file__).parent / "messages"
SUITE = Suite(12, 128, 12, 5, 31)
SK_D = b"d" * 32
NI, NR = b"i" * 32, b"r" * 32
SPI_I, SPI_R = b"I" * 8, b"R" * 8
INDEX = ("192.0.2.1", b"O" * 8)
NAT = ("192.0.2.10", 4500, "192.0.2.2", 4500)


def request(**changes: Any) -> bytes:
    values: dict[str, Any] = {
        "spi_i": SPI_I,
        "suite": SUITE,
        "ke_value": b"k" * 32,
        "nonce": NI,
        "sync_index": INDEX,
        "prf": SUITE.prf,
        "sk_d_old": SK_D,
        "nat": NAT,
    }
    return build_request(**(values | changes))


def parsed(octets: bytes) -> SyncRequest:
    found = parse_request(octets)
    assert found is not None
    return found


def response(to: bytes, **changes: Any) -> bytes:
    values: dict[str, Any] = {
        "spi_r": SPI_R,
        "nonce": NR,
        "prf": SUITE.prf,
        "sk_d_old": SK_D,
        "lifetime": 3600,
        "nat": NAT[2:] + NAT[:2],
    }
    return build_response(parsed(to), **(values | changes))


def accepted(octets: bytes, to: bytes) -> SyncResponse:
    found = parse_response(octets, to)
    assert isinstance(found, SyncResponse)
    return found


def init(payloads: list[tuple[int, bytes]], flags: int = Flag.INITIATOR, **changes: Any) -> bytes:
    values: dict[str, Any] = {"spi_i": SPI_I, "spi_r": bytes(8), "exchange": 34, "flags": flags, "message_id": 0}
    return build(**(values | changes), payloads=payloads)


# the request


def test_a_request_carries_first_the_index_then_proposal_public_value_and_nonce() -> None:
    message = parse(request())
    assert [p.type for p in message.payloads] == [
        PayloadType.SYNC,
        PayloadType.SA,
        PayloadType.KE,
        PayloadType.NONCE,
        PayloadType.NOTIFY,
        PayloadType.NOTIFY,
    ]
    assert message.header[:2] == (SPI_I, bytes(8))
    assert (message.header.exchange, message.header.flags, message.header.message_id) == (34, Flag.INITIATOR, 0)
    assert not any(p.critical for p in message.payloads)


def test_a_request_is_read_as_it_was_built() -> None:
    found = parsed(request(children=[(0, 0xC0000001)], sealed_stub=b"sealed", cookie=b"crumb"))
    assert (found.spi_i, found.nonce) == (SPI_I, NI)
    assert (found.sync.gateway, found.sync.spi) == INDEX
    assert found.sync.children == ((0, 0xC0000001),)
    assert found.sealed_stub == b"sealed"
    assert found.cookie == b"crumb"
    assert found.nat_source == (nat_hash(SPI_I, bytes(8), *NAT[:2]),)
    assert found.nat_destination == (nat_hash(SPI_I, bytes(8), *NAT[2:]),)


def test_a_cookie_comes_first_and_the_index_right_after_it() -> None:
    octets = request(cookie=b"crumb")
    assert [p.type for p in parse(octets).payloads][:2] == [PayloadType.NOTIFY, PayloadType.SYNC]
    assert sync_comes_first(octets)


def test_where_the_packet_filter_finds_the_index_is_known() -> None:
    assert sync_comes_first(request())
    assert not sync_comes_first(request(sk_d_old=None))
    assert not sync_comes_first(request(sk_d_old=None, cookie=b"crumb"))


@pytest.mark.parametrize("algorithm", PRF_OUTPUT)
def test_a_request_proves_itself_under_the_old_sk_d_alone(algorithm: Prf) -> None:
    found = parsed(request(prf=algorithm))
    assert verify_request(found, algorithm, SK_D)
    assert not verify_request(found, algorithm, b"e" * 32)


def test_the_proof_is_over_the_whole_message_with_its_own_octets_zero() -> None:
    octets = request(cookie=b"crumb")
    key = prf(SUITE.prf, SK_D, b"IKE_SA_SYNC initiator")
    at = proof_range(octets)
    assert octets[at] == prf(SUITE.prf, key, octets[: at.start] + bytes(32) + octets[at.stop :])


@given(st.integers(0, len(request()) - 1), st.integers(1, 255))
def test_a_request_with_any_octet_altered_proves_nothing(position: int, change: int) -> None:
    octets = bytearray(request())
    octets[position] ^= change
    with suppress(MalformedMessage):
        found = parse_request(bytes(octets))
        assert found is None or not verify_request(found, SUITE.prf, SK_D)


def test_a_client_says_that_it_accepts_a_notification_of_a_refusal() -> None:
    assert parsed(request(refusable=True)).refusable
    assert not parsed(request()).refusable
    assert not parsed(request(sk_d_old=None)).refusable


def test_the_plain_draft_form_has_no_attributes_and_proves_nothing() -> None:
    found = parsed(request(sk_d_old=None))
    assert found.sync.attributes == ()
    assert not verify_request(found, SUITE.prf, SK_D)


@given(st.binary(max_size=200))
def test_arbitrary_octets_raise_nothing_but_malformed_message(octets: bytes) -> None:
    for data in (octets, request()[:28] + octets):
        with suppress(MalformedMessage):
            parse_request(data)
        with suppress(MalformedMessage):
            parse_response(data, request())


@pytest.mark.parametrize(
    "octets",
    [
        b"",
        init([(PayloadType.NONCE, NI)]),
        init([(PayloadType.NONCE, NI)], flags=Flag.RESPONSE),
        request()[:18] + b"\x23" + request()[19:],
        init([(PayloadType.NONCE, bytes([PayloadType.SYNC]) * 32)]),
    ],
    ids=["nothing", "ordinary", "response", "IKE_AUTH", "the payload's number in a nonce"],
)
def test_any_other_message_is_none_of_our_business(octets: bytes) -> None:
    assert parse_request(octets) is None


def _sync_body(octets: bytes) -> bytes:
    return parse(octets).payloads[0].body


FIRST = [(PayloadType.SA, SUITE.proposal()), (PayloadType.KE, bytes(36)), (PayloadType.NONCE, NI)]
SYNC = (PayloadType.SYNC, _sync_body(request()))
COOKIE = (PayloadType.NOTIFY, encode_notify(NotifyType.COOKIE, b"crumb"))


def test_payloads_of_other_makers_change_nothing() -> None:
    found = parsed(init([(PayloadType.VENDOR_ID, b"other"), *FIRST, SYNC, (201, b"unknown, and not critical")]))
    assert (found.sync.gateway, found.sync.spi) == INDEX


@pytest.mark.parametrize(
    "octets",
    [
        init([*FIRST, SYNC] * 2),
        init([*FIRST, SYNC, SYNC]),
        init([*FIRST, FIRST[0], SYNC]),
        init([*FIRST, FIRST[1], SYNC]),
        init([*FIRST[1:], SYNC]),
        init([FIRST[0], FIRST[2], SYNC]),
        init([*FIRST[:2], SYNC]),
        init([COOKIE, COOKIE, *FIRST, SYNC]),
        init([*FIRST, (201, b""), SYNC]).replace(b"\xc8\x00\x00\x04", b"\xc8\x80\x00\x04"),
        init([*FIRST[:2], (PayloadType.NONCE, NI[:15]), SYNC]),
        init([*FIRST[:2], (PayloadType.NONCE, bytes(257)), SYNC]),
        init([*FIRST, (PayloadType.SYNC, b"\x80" + _sync_body(request())[1:])]),
        init([*FIRST, SYNC], spi_i=bytes(8)),
        init([*FIRST, SYNC], spi_r=SPI_R),
        init([*FIRST, SYNC], message_id=1),
        init([*FIRST, SYNC], flags=0),
        init([(PayloadType.NOTIFY, b"\0"), *FIRST, SYNC]),
        request()[:-1],
        request() + b"\0",
    ],
    ids=[
        "payloads twice",
        "IKE_SA_SYNC twice",
        "SAi1 twice",
        "KEi twice",
        "no SAi1",
        "no KEi",
        "no nonce",
        "two cookies",
        "unknown critical payload",
        "short nonce",
        "long nonce",
        "from a gateway",
        "no SPIi",
        "an SPIr",
        "message ID 1",
        "no flag I",
        "notification cut",
        "cut",
        "octets left over",
    ],
)
def test_a_request_that_breaks_a_rule_is_malformed(octets: bytes) -> None:
    with pytest.raises(MalformedMessage):
        parse_request(octets)


# the response


def test_the_answer_is_read_and_proved() -> None:
    asked = request()
    answer = accepted(response(asked), asked)
    assert (answer.spi_r, answer.nonce, answer.lifetime) == (SPI_R, NR, 3600)
    assert answer.nat_source == (nat_hash(SPI_I, SPI_R, *NAT[2:]),)
    assert verify_response(answer, asked, SUITE.prf, SK_D)


def test_the_answers_proof_covers_request_and_response_with_both_proofs_zero() -> None:
    asked = request()
    octets = response(asked)
    key = prf(SUITE.prf, SK_D, b"IKE_SA_SYNC responder")
    blank = parsed(asked).blank + octets[:-32] + bytes(32)
    assert octets[-32:] == prf(SUITE.prf, key, blank)


def test_the_answer_says_until_when_the_client_is_authenticated() -> None:
    asked = request()
    octets = response(asked, auth_lifetime=1234)
    answer = accepted(octets, asked)
    assert answer.auth_lifetime == 1234
    assert verify_response(answer, asked, SUITE.prf, SK_D)
    assert accepted(response(asked), asked).auth_lifetime is None
    # it is covered by the proof
    forged = accepted(octets.replace((1234).to_bytes(4), (9999).to_bytes(4)), asked)
    assert forged.auth_lifetime == 9999
    assert not verify_response(forged, asked, SUITE.prf, SK_D)


@pytest.mark.parametrize("values", [[bytes(3)], [bytes(5)], [bytes(4), bytes(4)]])
def test_an_answer_with_another_auth_lifetime_than_one_of_4_octets_is_malformed(values: list[bytes]) -> None:
    notified = [(PayloadType.NOTIFY, encode_notify(NotifyType.AUTH_LIFETIME, value)) for value in values]
    octets = init([(PayloadType.NONCE, NR), *notified], flags=Flag.RESPONSE, spi_r=SPI_R)
    with pytest.raises(MalformedMessage):
        parse_response(octets, request())


@given(st.integers(0, len(response(request())) - 1), st.integers(1, 255))
def test_an_answer_with_any_octet_altered_proves_nothing(position: int, change: int) -> None:
    asked = request()
    octets = bytearray(response(asked))
    octets[position] ^= change
    with suppress(MalformedMessage):
        answer = parse_response(bytes(octets), asked)
        assert not isinstance(answer, SyncResponse) or not verify_response(answer, asked, SUITE.prf, SK_D)


@pytest.mark.parametrize("algorithm", PRF_OUTPUT)
def test_an_answer_whose_nonce_is_too_short_for_the_prf_proves_nothing(algorithm: Prf) -> None:
    asked = request(prf=algorithm)
    least = max(PRF_OUTPUT[algorithm] // 2, 16)
    for octets, proven in ((least, True), (least - 1, False)):
        try:
            answer = parse_response(response(asked, nonce=NR[:octets], prf=algorithm), asked)
        except MalformedMessage:
            # no prf has shorter ones
            assert octets < 16
            continue
        assert isinstance(answer, SyncResponse)
        assert verify_response(answer, asked, algorithm, SK_D) == proven


@pytest.mark.parametrize("octets", [15, 257])
def test_an_answer_whose_nonce_has_less_than_16_or_more_than_256_octets_is_malformed(octets: int) -> None:
    with pytest.raises(MalformedMessage):
        parse_response(response(request(), nonce=bytes(octets)), request())


def test_an_answer_about_another_index_proves_nothing() -> None:
    asked = request()
    elsewhere = msgspec.structs.replace(parsed(asked), sync=SyncPayload(False, INDEX[0], b"other SA", ((1, b""),)))
    answer = accepted(build_response(elsewhere, spi_r=SPI_R, nonce=NR, prf=SUITE.prf, sk_d_old=SK_D), asked)
    assert answer.sync is not None
    assert answer.sync.spi == b"other SA"
    assert not verify_response(answer, asked, SUITE.prf, SK_D)


def test_an_answer_that_resumes_without_an_spir_is_malformed() -> None:
    with pytest.raises(MalformedMessage):
        parse_response(response(request(), spi_r=bytes(8)), request())


def test_an_answer_to_another_request_proves_nothing() -> None:
    asked, other = request(), request(nonce=b"j" * 32)
    answer = accepted(response(other), asked)
    assert not verify_response(answer, asked, SUITE.prf, SK_D)


def test_a_request_reflected_is_no_answer() -> None:
    with pytest.raises(MalformedMessage):
        parse_response(request(), request())


def test_a_plain_request_gets_the_plain_answer() -> None:
    asked = request(sk_d_old=None, nat=None)
    octets = response(asked)
    assert [p.type for p in parse(octets).payloads] == [PayloadType.NONCE]
    answer = accepted(octets, asked)
    assert answer.sync is None
    assert not verify_response(answer, asked, SUITE.prf, SK_D)


def test_nat_detection_is_answered_only_where_it_was_asked_for() -> None:
    asked = request(nat=None)
    assert accepted(response(asked), asked).nat_source == ()


def test_children_and_a_sealed_stub_come_back() -> None:
    asked = request(children=[(0, 1)])
    answer = accepted(response(asked, children=[(0, 2)], sealed_stub=b"fresh"), asked)
    assert answer.sync is not None
    assert answer.sync.children == ((0, 2),)
    assert answer.sync.first(3) == b"fresh"


def test_a_normal_response_is_distinguished_from_one_that_resumes() -> None:
    ordinary = init(
        [(PayloadType.SA, SUITE.proposal()), (PayloadType.KE, bytes(36)), (PayloadType.NONCE, NR)],
        flags=Flag.RESPONSE,
        spi_r=SPI_R,
    )
    assert parse_response(ordinary, request()) == OrdinaryResponse(None)


def test_an_error_notification_is_a_normal_response() -> None:
    status = (PayloadType.NOTIFY, encode_notify(NotifyType.NAT_DETECTION_SOURCE_IP, bytes(20)))
    error = init([status, (PayloadType.NOTIFY, encode_notify(NotifyType.NO_PROPOSAL_CHOSEN))], flags=Flag.RESPONSE)
    assert parse_response(error, request()) == OrdinaryResponse(NotifyType.NO_PROPOSAL_CHOSEN)


def test_a_cookie_is_asked_back() -> None:
    challenge = init([(PayloadType.NOTIFY, encode_notify(NotifyType.COOKIE, b"crumb"))], flags=Flag.RESPONSE)
    assert parse_response(challenge, request()) == CookieChallenge(b"crumb")


@pytest.mark.parametrize("octets", [0, 65])
def test_a_cookie_has_1_to_64_octets(octets: int) -> None:
    challenge = init([(PayloadType.NOTIFY, encode_notify(NotifyType.COOKIE, bytes(octets)))], flags=Flag.RESPONSE)
    with pytest.raises(MalformedMessage):
        parse_response(challenge, request())


@pytest.mark.parametrize(
    "changes",
    [{"spi_i": b"X" * 8}, {"message_id": 1}, {"exchange": 35}, {"flags": Flag.RESPONSE | Flag.INITIATOR}, {"flags": 0}],
)
def test_what_does_not_answer_this_request_is_malformed(changes: dict[str, Any]) -> None:
    values: dict[str, Any] = {"flags": Flag.RESPONSE, "spi_r": SPI_R}
    octets = init([(PayloadType.NONCE, NR)], **(values | changes))
    with pytest.raises(MalformedMessage):
        parse_response(octets, request())


def test_nat_detection_hashes_as_rfc_7296_says() -> None:
    expected = hashlib.sha1(SPI_I + SPI_R + bytes((192, 0, 2, 10)) + bytes((0x11, 0x94))).digest()
    assert nat_hash(SPI_I, SPI_R, "192.0.2.10", 4500) == expected


def test_no_octets_show_in_the_text_of_a_request() -> None:
    assert "raw" not in repr(parsed(request()))


# a refusal


def refused(to: bytes, *, sk_d: bytes = SK_D, reason: str = "connection-missing") -> SyncRefusal:
    found = parse_response(build_refusal(parsed(to), reason, prf=SUITE.prf, sk_d_old=sk_d), to)
    assert isinstance(found, SyncRefusal)
    return found


def test_a_refusal_is_an_error_notification_without_an_spir() -> None:
    octets = build_refusal(parsed(request()))
    message = parse(octets)
    assert [p.type for p in message.payloads] == [PayloadType.NOTIFY]
    assert message.header.spi_r == bytes(8)
    assert message.header.flags == Flag.RESPONSE
    assert parse_response(octets, request()) == OrdinaryResponse(NotifyType.RESUMPTION_REFUSED)


def test_a_proven_refusal_has_its_reason_and_is_about_this_request_alone() -> None:
    asked = request()
    found = refused(asked)
    assert found.reason == "connection-missing"
    assert verify_refusal(found, asked, SUITE.prf, SK_D)
    assert not verify_refusal(found, request(nonce=b"j" * 32), SUITE.prf, SK_D)
    assert not verify_refusal(found, asked, SUITE.prf, b"e" * 32)


def test_a_refusal_about_another_index_proves_nothing() -> None:
    asked = request()
    other = refused(request(sync_index=("192.0.2.7", b"O" * 8)))
    assert not verify_refusal(other, asked, SUITE.prf, SK_D)


@given(
    st.integers(0, len(build_refusal(parsed(request()), "r", prf=SUITE.prf, sk_d_old=SK_D)) - 1), st.integers(1, 255)
)
def test_a_refusal_with_any_octet_altered_proves_nothing(position: int, change: int) -> None:
    octets = bytearray(build_refusal(parsed(request()), "r", prf=SUITE.prf, sk_d_old=SK_D))
    octets[position] ^= change
    with suppress(MalformedMessage):
        found = parse_response(bytes(octets), request())
        assert not isinstance(found, SyncRefusal) or not verify_refusal(found, request(), SUITE.prf, SK_D)


def test_a_reason_is_printable_and_short_whatever_was_sent() -> None:
    assert refused(request(), reason="x\x1b[31m\n" + "y" * 100).reason == "x[31m" + "y" * 57


def test_a_refusal_is_shorter_than_the_request() -> None:
    asked = request(nat=None)
    longest = build_refusal(parsed(asked), "r" * 30, prf=SUITE.prf, sk_d_old=SK_D)
    assert len(longest) < len(asked)


# messages of release 0.1, as they were recorded


def test_a_request_and_an_answer_of_release_0_1_are_read_and_proved() -> None:
    """SYN was last in the request, and there was no REFUSAL."""
    recorded = json.loads((RECORDED / "release-0.1.json").read_text())
    asked, answered, sk_d = (bytes.fromhex(recorded[name]) for name in ("request", "answer", "sk_d_old"))
    found = parsed(asked)
    assert not sync_comes_first(asked)
    assert not found.refusable
    assert verify_request(found, SUITE.prf, sk_d)
    assert verify_response(accepted(answered, asked), asked, SUITE.prf, sk_d)


def test_an_answer_to_a_client_of_release_0_1_has_what_that_client_knows() -> None:
    recorded = json.loads((RECORDED / "release-0.1.json").read_text())
    asked, answered, sk_d = (bytes.fromhex(recorded[name]) for name in ("request", "answer", "sk_d_old"))
    made = build_response(
        parsed(asked),
        spi_r=answered[8:16],
        nonce=bytes.fromhex(recorded["nonce_r"]),
        prf=SUITE.prf,
        sk_d_old=sk_d,
        lifetime=14400,
        children=[(0, 0x40000002)],
        nat=("192.0.2.2", 4500, "192.0.2.10", 4500),
    )
    assert made == answered
