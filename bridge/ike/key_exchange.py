"""Public values for KE payloads, and Diffie-Hellman with them.

The request carries a public value so that a gateway which knows nothing of IKE_SA_SYNC can answer with a normal
response (draft-xu-ike-sa-sync-01 section 3.1). Without forward secrecy nothing else is done with it, and its private
half is thrown away (`fresh_public_value`). With it both sides have a `KeyExchange`, on a curve: `cryptography` is about
to drop MODP groups, and Python's own arithmetic would hold the event loop for milliseconds.
"""

from __future__ import annotations

import os
import secrets
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, x448, x25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from bridge.ike.transforms import Group

_CURVES: Final[dict[int, type[ec.EllipticCurve]]] = {
    Group.ECP_192: ec.SECP192R1,
    Group.ECP_224: ec.SECP224R1,
    Group.ECP_256: ec.SECP256R1,
    Group.ECP_384: ec.SECP384R1,
    Group.ECP_521: ec.SECP521R1,
    Group.ECP_256_BP: ec.BrainpoolP256R1,
    Group.ECP_384_BP: ec.BrainpoolP384R1,
    Group.ECP_512_BP: ec.BrainpoolP512R1,
}

# Groups that `cryptography` lacks, all of them or in its older releases, get a random value of the form that a
# responder accepts; its private half is not known to anyone. Any number below a MODP prime is a member of its group or
# of its subgroup's coset; the top bit is cleared, for the primes begin with 64 ones, those of RFC 5114 with one at
# least. These are octets of a public value:
_RANDOM: Final[dict[int, int]] = {
    Group.MODP_768: 96,
    Group.MODP_1024: 128,
    Group.MODP_1536: 192,
    Group.MODP_2048: 256,
    Group.MODP_3072: 384,
    Group.MODP_4096: 512,
    Group.MODP_6144: 768,
    Group.MODP_8192: 1024,
    Group.MODP_1024_160: 128,
    Group.MODP_2048_224: 256,
    Group.MODP_2048_256: 256,
}
_UNKNOWN: Final = 32

# brainpoolP224r1 (RFC 5639 section 3.3): a responder verifies that the value is a point of the curve.
_P: Final = 0xD7C134AA264366862A18302575D1D787B09F075797DA89F57EC8C0FF
_A: Final = 0x68A5E62CA9CE6C1C299803A6C1530B514E182AD8B0042A59CAD29F43
_B: Final = 0x2580F63CCFE44138870713B1A92369E33E2135D266DBB372386C400B

_ML_KEM_RANKS: Final[dict[int, int]] = {Group.ML_KEM_512: 2, Group.ML_KEM_768: 3, Group.ML_KEM_1024: 4}
_ML_KEM_Q: Final = 3329


class UnsupportedGroup(ValueError):
    """A key exchange method that cannot be carried out here."""


class KeyExchange:
    """One side of a Diffie-Hellman exchange on a curve, with a fresh private key. Raises UnsupportedGroup."""

    def __init__(self, group: int) -> None:
        self.group = group
        try:
            self._private = _generate(group)
        except UnsupportedAlgorithm as error:
            raise UnsupportedGroup(str(error)) from None
        self.public = _public_octets(self._private)
        """as the KE payload carries it"""

    def __repr__(self) -> str:
        return f"KeyExchange({self.group})"

    def shared(self, peer: bytes) -> bytes:
        """g^ir with the peer's public value, as SKEYSEED takes it (RFC 7296 section 2.14, RFC 5903 section 7). Raises
        ValueError for a value that is none of the group."""
        private = self._private
        if isinstance(private, x25519.X25519PrivateKey):
            return private.exchange(x25519.X25519PublicKey.from_public_bytes(peer))
        if isinstance(private, x448.X448PrivateKey):
            return private.exchange(x448.X448PublicKey.from_public_bytes(peer))
        return private.exchange(ec.ECDH(), ec.EllipticCurvePublicKey.from_encoded_point(private.curve, b"\4" + peer))


_Private = x25519.X25519PrivateKey | x448.X448PrivateKey | ec.EllipticCurvePrivateKey


def can_exchange(group: int) -> bool:
    """Whether `KeyExchange` has this group."""
    return group in (Group.CURVE_25519, Group.CURVE_448) or group in _CURVES


def _generate(group: int) -> _Private:
    if group == Group.CURVE_25519:
        return x25519.X25519PrivateKey.generate()
    if group == Group.CURVE_448:
        return x448.X448PrivateKey.generate()
    if group in _CURVES:
        return ec.generate_private_key(_CURVES[group]())
    raise UnsupportedGroup(f"the key exchange method with number {group} is not implemented")


def _public_octets(private: _Private) -> bytes:
    if isinstance(private, (x25519.X25519PrivateKey, x448.X448PrivateKey)):
        return private.public_key().public_bytes_raw()
    # both coordinates, without the octet that says so
    return private.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)[1:]


def fresh_public_value(group: int) -> bytes:
    """A fresh public value of a key exchange method, in the form of its KE payload (RFC 7296, 5903, 6954, 8031)."""
    if group in (Group.CURVE_25519, Group.CURVE_448) or group in _CURVES:
        return KeyExchange(group).public
    if group == Group.ECP_224_BP:
        return _point_of_brainpool_p224r1()
    rank = _ML_KEM_RANKS.get(group)
    if rank is not None:
        return _ml_kem_key(rank)
    value = bytearray(os.urandom(_RANDOM.get(group, _UNKNOWN)))
    value[0] &= 0x7F
    return bytes(value)


def _point_of_brainpool_p224r1() -> bytes:
    """A random point: both coordinates, 28 octets each."""
    while True:
        x = secrets.randbelow(_P)
        square = (x**3 + _A * x + _B) % _P
        # the prime is 3 modulo 4: this is the root, if there is one
        y = pow(square, (_P + 1) // 4, _P)
        if y * y % _P == square:
            return x.to_bytes(28) + y.to_bytes(28)


def _ml_kem_key(rank: int) -> bytes:
    """A random encapsulation key: 256 coefficients of 12 bits for each rank, all below q, which a responder verifies
    (FIPS 203 section 7.2), and a seed of 32 octets."""
    pairs = (secrets.randbelow(_ML_KEM_Q) | secrets.randbelow(_ML_KEM_Q) << 12 for _ in range(rank * 128))
    return b"".join(pair.to_bytes(3, "little") for pair in pairs) + os.urandom(32)
