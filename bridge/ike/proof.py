"""PROOF: what a message with IKE_SA_SYNC shows that its sender holds SK_d of the old SA (docs/protocol.md).

It is computed over whole IKE messages in which the octets of its own value are zero:

    from the client     prf(prf(SK_d_old, "IKE_SA_SYNC initiator"), messages)
    from the gateway    prf(prf(SK_d_old, "IKE_SA_SYNC responder"), messages)

`messages` is the message itself, after the one that it answers.
"""

from __future__ import annotations

import hmac
from typing import Final

from bridge.ike.keys import prf as prf_of
from bridge.ike.sync_payload import Attribute, SyncPayload, proof_offset
from bridge.ike.transforms import PRF_OUTPUT, UnsupportedSuite

_LABELS: Final = {False: b"IKE_SA_SYNC initiator", True: b"IKE_SA_SYNC responder"}
"""by whether the gateway sends"""


def empty_proof(algorithm: int) -> tuple[int, bytes]:
    """PROOF with a value of zeros, of the prf's length. Raises UnsupportedSuite."""
    length = PRF_OUTPUT.get(algorithm)  # type: ignore[call-overload]
    if length is None:
        raise UnsupportedSuite(f"the prf with number {algorithm} is not implemented")
    return Attribute.PROOF, bytes(length)


def prove(
    message: bytes, algorithm: int, sk_d_old: bytes, *, from_gateway: bool, before: bytes = b"", end: int | None = None
) -> bytes:
    """`message` with the proof in its empty PROOF, whose value ends at offset `end`, or where the message does."""
    proof = _compute(algorithm, sk_d_old, from_gateway, before + message)
    stop = len(message) if end is None else end
    return message[: stop - len(proof)] + proof + message[stop:]


def blank(message: bytes, offset: int, body: bytes) -> bytes:
    """The message with the octets of PROOF zero; `body` is that of its IKE_SA_SYNC payload, at `offset`."""
    within = proof_offset(body)
    if within is None:
        return message
    start = offset + within
    length = int.from_bytes(body[within - 2 : within])
    return message[:start] + bytes(length) + message[start + length :]


def proves(sync: SyncPayload, message: bytes, algorithm: int, sk_d_old: bytes, *, before: bytes = b"") -> bool:
    """Whether the PROOF in `sync` is that of `message`, which is blank, after `before`. Constant time; False without
    PROOF."""
    proof = sync.first(Attribute.PROOF)
    if proof is None:
        return False
    return hmac.compare_digest(_compute(algorithm, sk_d_old, sync.from_gateway, before + message), proof)


def _compute(algorithm: int, sk_d_old: bytes, from_gateway: bool, messages: bytes) -> bytes:
    return prf_of(algorithm, prf_of(algorithm, sk_d_old, _LABELS[from_gateway]), messages)
