"""Why a request is not served."""

from __future__ import annotations

from enum import StrEnum


class Refusal(StrEnum):
    """Why a request with IKE_SA_SYNC went on to charon."""

    NO_STUB = "no-stub"
    STUB_EXPIRED = "stub-expired"
    PROOF_MISSING = "proof-missing"
    PROOF_WRONG = "proof-wrong"
    NONCE_SHORT = "nonce-short"
    BANK_UNAVAILABLE = "bank-unavailable"
    CHARON_UNAVAILABLE = "charon-unavailable"
    CONNECTION_MISSING = "connection-missing"
    ADDRESS_TAKEN = "address-taken"
    """an SA of another session has its virtual IP here"""
    TOO_MANY_UNCONFIRMED = "too-many-unconfirmed"
    SOURCE_UNCONFIRMED = "source-unconfirmed"
    SOURCE_RATE = "source-rate"
