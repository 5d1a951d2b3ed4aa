"""Why a request is not served, and what is answered then."""

from __future__ import annotations

from enum import StrEnum

from bridge.ike.resumption_answer import build_refusal
from bridge.ike.resumption_request import verify_request
from bridge.ike.sync_messages import SyncRequest
from bridge.stub.stub import Stub


class Refusal(StrEnum):
    """Why a request with IKE_SA_SYNC was refused."""

    NO_STUB = "no-stub"
    REVOKED = "revoked"
    """the identity is locked out (`ike-sa-sync revoke`)"""
    FORWARD_SECRECY_MISSING = "forward-secrecy-missing"
    """`sync.forward_secrecy` is required, and the client does not ask for it or its group is no curve"""
    PUBLIC_VALUE_WRONG = "public-value-wrong"
    """the client asks for forward secrecy with a public value that is none of the old SA's group"""
    STUB_EXPIRED = "stub-expired"
    AUTHENTICATION_ENDED = "authentication-ended"
    """the client has to authenticate again (`reauth_time`, Session-Timeout)"""
    PROOF_MISSING = "proof-missing"
    PROOF_WRONG = "proof-wrong"
    PROPOSAL_DIFFERS = "proposal-differs"
    """SAi1 is not the proposal of the old SA, or KEi not of its group"""
    NONCE_SHORT = "nonce-short"
    BANK_UNAVAILABLE = "bank-unavailable"
    CHARON_UNAVAILABLE = "charon-unavailable"
    CONNECTION_MISSING = "connection-missing"
    ADDRESS_TAKEN = "address-taken"
    """an SA of another session has its virtual IP here"""
    NOT_UNIQUE = "not-unique"
    """the peer has another session here, and the connection says `unique = keep`"""
    TOO_MANY_UNCONFIRMED = "too-many-unconfirmed"
    SOURCE_UNCONFIRMED = "source-unconfirmed"
    SOURCE_RATE = "source-rate"


FINAL = frozenset(
    {
        Refusal.REVOKED,
        Refusal.STUB_EXPIRED,
        Refusal.NONCE_SHORT,
        Refusal.CONNECTION_MISSING,
        Refusal.ADDRESS_TAKEN,
        Refusal.CHARON_UNAVAILABLE,
    }
)
"""what holds for every attempt of this session here, the last one for now. Of the others, an attacker can cause some:
with forged cookies that the client sends back, for instance, more attempts than one stub may have, while one of them is
being answered"""


def notification(request: SyncRequest, reason: Refusal, stub: Stub | None) -> bytes:
    """The answer to a request that gets one. A proof, which ends the client's attempt immediately, is for final
    reasons, and for those only who have proved themselves."""
    if stub is None or reason not in FINAL or not verify_request(request, stub.suite.prf, stub.sk_d):
        return build_refusal(request)
    return build_refusal(request, reason, prf=stub.suite.prf, sk_d_old=stub.sk_d)
