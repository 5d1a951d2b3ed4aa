"""What a client is told whose request is refused (bridge.gateway.refusal)."""

from __future__ import annotations

import pytest

from bank_support import stub_of
from bridge.gateway.refusal import FINAL, Refusal, notification
from bridge.ike.message import NotifyType
from bridge.ike.resumption_answer import parse_response, verify_refusal
from bridge.ike.resumption_request import build_request, parse_request
from bridge.ike.sync_messages import OrdinaryResponse, SyncRefusal

STUB = stub_of()


def asked(sk_d: bytes = STUB.sk_d) -> bytes:
    return build_request(
        spi_i=b"I" * 8,
        suite=STUB.suite,
        ke_value=bytes(32),
        nonce=b"n" * 32,
        sync_index=(STUB.index.gateway, STUB.index.spi),
        prf=STUB.suite.prf,
        sk_d_old=sk_d,
        refusable=True,
    )


def test_a_refusal_is_proven_to_a_sender_that_proved_itself_alone() -> None:
    octets = asked()
    request = parse_request(octets)
    assert request is not None
    answer = parse_response(notification(request, Refusal.CONNECTION_MISSING, STUB), octets)
    assert isinstance(answer, SyncRefusal)
    assert answer.reason == "connection-missing"
    assert verify_refusal(answer, octets, STUB.suite.prf, STUB.sk_d)

    octets = asked(bytes(32))
    request = parse_request(octets)
    assert request is not None
    answer = parse_response(notification(request, Refusal.PROOF_WRONG, STUB), octets)
    assert answer == OrdinaryResponse(NotifyType.RESUMPTION_REFUSED)


@pytest.mark.parametrize("reason", [reason for reason in Refusal if reason not in FINAL])
def test_a_refusal_that_another_attempt_may_cause_is_plain(reason: Refusal) -> None:
    """The client listens on for the answer to that one."""
    octets = asked()
    request = parse_request(octets)
    assert request is not None
    assert parse_response(notification(request, reason, STUB), octets) == OrdinaryResponse(
        NotifyType.RESUMPTION_REFUSED
    )


def test_without_a_stub_a_refusal_is_plain() -> None:
    octets = asked()
    request = parse_request(octets)
    assert request is not None
    answer = parse_response(notification(request, Refusal.NO_STUB, None), octets)
    assert answer == OrdinaryResponse(NotifyType.RESUMPTION_REFUSED)
