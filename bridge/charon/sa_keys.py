"""The keys of an IKE_SA, from the secrets in charon's IKE_ADD."""

from __future__ import annotations

from bridge.charon.ha_message import Attr, HaMessage, IkeId
from bridge.charon.ike_sa import IkeSa
from bridge.ike.keys import derive_sk_d, skeyseed_initial, skeyseed_rekey
from bridge.ike.transforms import Suite
from bridge.stub.derivation import Derivation


def derived_keys(ike_id: IkeId, suite: Suite, known: IkeSa | None, message: HaMessage) -> tuple[bytes, bytes | None]:
    """SK_d and the shared secret, that of all key exchanges one after the other; `known` is the SA as it was before a
    further key exchange. Raises ValueError, UnsupportedSuite.

    RFC 7296 sections 2.14 and 2.18, RFC 9370 sections 2.2.2 and 2.2.4.
    """
    ni, nr = message.first(Attr.NONCE_I), message.first(Attr.NONCE_R)
    secret: bytes = message.first(Attr.SECRET, b"")
    additional: bytes = message.first(Attr.ADD_SECRET, b"")
    old_sk_d: bytes | None = message.first(Attr.OLD_SKD)
    prf: int = suite.prf
    earlier = b""
    if ni is None or nr is None:
        raise ValueError("charon sent no nonces")
    if old_sk_d is not None:
        prf = message.first(Attr.ALG_OLD_PRF, prf)
    elif known is not None and message.first(Attr.ALG_PRF) is None:
        old_sk_d, earlier = known.sk_d, known.shared_secret or b""
    if old_sk_d is None:
        seed = skeyseed_initial(prf, secret, ni, nr)
    else:
        seed = skeyseed_rekey(prf, old_sk_d, secret, ni, nr, additional)
    sk_d = derive_sk_d(suite, seed, ni, nr, ike_id.spi_i, ike_id.spi_r, algorithm=prf)
    return sk_d, earlier + secret + additional or None


def derivation_of(suite: Suite, known: IkeSa | None, message: HaMessage, owner: str) -> Derivation:
    """Where the keys come from that `derived_keys` derives, for another gateway to derive them again; `owner` is this
    gateway."""
    old_sk_d: bytes = message.first(Attr.OLD_SKD, b"")
    prf: int = message.first(Attr.ALG_OLD_PRF, suite.prf) if old_sk_d else 0
    if not old_sk_d and known is not None and message.first(Attr.ALG_PRF) is None:
        # RFC 9370 section 2.2.2: as of a rekeying
        old_sk_d, prf = known.sk_d, known.suite.prf
    before = None if known is None else known.derivation
    return Derivation(
        message.first(Attr.NONCE_I, b""),
        message.first(Attr.NONCE_R, b""),
        message.first(Attr.SECRET, b""),
        message.first(Attr.ADD_SECRET, b""),
        old_sk_d,
        prf,
        before.next_request if before is not None else 0,
        before.next_expected if before is not None else 0,
        owner,
    )
