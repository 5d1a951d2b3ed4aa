"""What takes an IKE_SA over as it is: where its keys come from, its message IDs, and which gateway owns it. No I/O.

Only stubs of IKE_SAs at an address that gateways share (`takeover.addresses`) have one. It is extension 3 of the
encoding of stubs (bridge.stub.codec), a MessagePack array.
"""

from __future__ import annotations

import re
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from bridge.ike.keys import IkeKeys, derive_keys, skeyseed_initial, skeyseed_rekey
from bridge.ike.transforms import Suite

_MessageId = Annotated[int, Meta(ge=0, lt=2**32)]
_Epoch = Annotated[int, Meta(ge=0, lt=2**31)]
NONCE_MAX: Final = 256
"""octets (RFC 7296 section 3.9)"""
_Nonce = Annotated[bytes, Meta(min_length=16, max_length=NONCE_MAX)]
_Owner = Annotated[str, Meta(max_length=45)]
_ADDRESS: Final = re.compile("[0-9a-f:.]*")


class Derivation(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """The last key derivation of an IKE_SA (RFC 7296 sections 2.14 and 2.18, RFC 9370), and what goes with it."""

    nonce_i: _Nonce
    nonce_r: _Nonce
    secret: bytes
    """g^ir; empty where the IKE_SA was resumed without forward secrecy"""
    additional: bytes
    """the further shared secrets of a rekeying with several key exchanges"""
    sk_d_old: bytes
    """SK_d of the IKE_SA that was rekeyed or resumed; empty for the first one"""
    prf_old: int
    """its prf; 0 for the first one"""
    next_request: _MessageId = 0
    """the message ID of the gateway's next request"""
    next_expected: _MessageId = 0
    """that of the peer's next request when the stub was made; the peer's next request tells the true one"""
    owner: _Owner = ""
    """the gateway whose session it is"""
    epoch: _Epoch = 1
    """grows with each takeover; the bank refuses writes of an older one"""
    unkeyed: bool = False
    """its CHILD_SAs have keys that no host knows: its owner has yet to rekey them"""

    def __repr__(self) -> str:
        return f"Derivation(owner={self.owner!r}, epoch={self.epoch})"

    def keys(self, suite: Suite, spi_i: bytes, spi_r: bytes) -> IkeKeys:
        """All keys of the IKE_SA, as charon has them. Raises UnsupportedSuite."""
        if self.sk_d_old:
            prf = self.prf_old or suite.prf
            seed = skeyseed_rekey(prf, self.sk_d_old, self.secret, self.nonce_i, self.nonce_r, self.additional)
        else:
            prf = suite.prf
            seed = skeyseed_initial(prf, self.secret, self.nonce_i, self.nonce_r)
        return derive_keys(suite, seed, self.nonce_i, self.nonce_r, spi_i, spi_r, algorithm=prf)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Derivation)


def pack(derivation: Derivation) -> bytes:
    """As octets, secrets in the clear: for bridge.stub.codec only. Raises ValueError for what `unpack` refuses."""
    octets = _encoder.encode(derivation)
    unpack(octets)
    return octets


def unpack(octets: bytes) -> Derivation:
    """What `pack` packed. Raises ValueError."""
    try:
        derivation = _decoder.decode(octets)
    except msgspec.MsgspecError as error:
        # the text names places and types, never values
        raise ValueError(f"not a derivation: {error}") from None
    if not _ADDRESS.fullmatch(derivation.owner):
        raise ValueError("the owner of a session is an IP address")
    return derivation
