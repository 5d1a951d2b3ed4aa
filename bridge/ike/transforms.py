"""IKEv2 transforms (IANA "Internet Key Exchange Version 2 (IKEv2) Parameters") and the suite of an IKE_SA."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

from msgspec import Struct


class TransformType(IntEnum):
    """RFC 7296 section 3.3.2; 6 to 12 are RFC 9370."""

    ENCR = 1
    PRF = 2
    INTEG = 3
    KE = 4
    ESN = 5
    ADDKE1 = 6


class Encr(IntEnum):
    """Transform type 1."""

    DES_3 = 3
    CAST = 6
    BLOWFISH_CBC = 7
    NULL = 11
    AES_CBC = 12
    AES_CTR = 13
    AES_CCM_8 = 14
    AES_CCM_12 = 15
    AES_CCM_16 = 16
    AES_GCM_8 = 18
    AES_GCM_12 = 19
    AES_GCM_16 = 20
    CAMELLIA_CBC = 23
    CAMELLIA_CTR = 24
    CAMELLIA_CCM_8 = 25
    CAMELLIA_CCM_12 = 26
    CAMELLIA_CCM_16 = 27
    CHACHA20_POLY1305 = 28


class Prf(IntEnum):
    """Transform type 2."""

    HMAC_MD5 = 1
    HMAC_SHA1 = 2
    AES128_XCBC = 4
    HMAC_SHA2_256 = 5
    HMAC_SHA2_384 = 6
    HMAC_SHA2_512 = 7
    AES128_CMAC = 8


class Integ(IntEnum):
    """Transform type 3."""

    NONE = 0
    HMAC_MD5_96 = 1
    HMAC_SHA1_96 = 2
    AES_XCBC_96 = 5
    HMAC_SHA1_160 = 7
    AES_CMAC_96 = 8
    HMAC_SHA2_256_128 = 12
    HMAC_SHA2_384_192 = 13
    HMAC_SHA2_512_256 = 14


class Group(IntEnum):
    """Transform type 4, "Key Exchange Method"."""

    NONE = 0
    MODP_768 = 1
    MODP_1024 = 2
    MODP_1536 = 5
    MODP_2048 = 14
    MODP_3072 = 15
    MODP_4096 = 16
    MODP_6144 = 17
    MODP_8192 = 18
    ECP_256 = 19
    ECP_384 = 20
    ECP_521 = 21
    MODP_1024_160 = 22
    MODP_2048_224 = 23
    MODP_2048_256 = 24
    ECP_192 = 25
    ECP_224 = 26
    ECP_224_BP = 27
    ECP_256_BP = 28
    ECP_384_BP = 29
    ECP_512_BP = 30
    CURVE_25519 = 31
    CURVE_448 = 32
    ML_KEM_512 = 35
    ML_KEM_768 = 36
    ML_KEM_1024 = 37


class UnsupportedSuite(ValueError):
    """An algorithm with which an IKE_SA cannot be resumed; the text names it."""


PRF_OUTPUT: Final = {
    Prf.HMAC_SHA1: 20,
    Prf.AES128_XCBC: 16,
    Prf.HMAC_SHA2_256: 32,
    Prf.HMAC_SHA2_384: 48,
    Prf.HMAC_SHA2_512: 64,
    Prf.AES128_CMAC: 16,
}
"""output, which is the preferred key size too, in octets (RFC 7296 section 2.13)"""


def least_nonce(prf: int) -> int:
    """Half of what a prf prefers as its key, in octets: a nonce has no less (RFC 7296 section 2.10), and no less than
    MIN_NONCE."""
    return PRF_OUTPUT[Prf(prf)] // 2


FIXED_SIZE_PRFS: Final = frozenset({Prf.AES128_XCBC, Prf.AES128_CMAC})
"""prfs that take 16 octets of key: SKEYSEED's key is then 8 octets of each nonce (RFC 7296 section 2.14)"""

_AEAD_TAGS: Final = {
    Encr.AES_CCM_8: 8,
    Encr.AES_CCM_12: 12,
    Encr.AES_CCM_16: 16,
    Encr.AES_GCM_8: 8,
    Encr.AES_GCM_12: 12,
    Encr.AES_GCM_16: 16,
    Encr.CAMELLIA_CCM_8: 8,
    Encr.CAMELLIA_CCM_12: 12,
    Encr.CAMELLIA_CCM_16: 16,
    Encr.CHACHA20_POLY1305: 16,
}

_SALTS: Final = {
    Encr.AES_CTR: 4,
    Encr.CAMELLIA_CTR: 4,
    Encr.AES_CCM_8: 3,
    Encr.AES_CCM_12: 3,
    Encr.AES_CCM_16: 3,
    Encr.AES_GCM_8: 4,
    Encr.AES_GCM_12: 4,
    Encr.AES_GCM_16: 4,
    Encr.CAMELLIA_CCM_8: 3,
    Encr.CAMELLIA_CCM_12: 3,
    Encr.CAMELLIA_CCM_16: 3,
    Encr.CHACHA20_POLY1305: 4,
}
"""octets of salt that follow the key in SK_e (RFC 4106, 4309, 5282, 5529, 5930, 7634)"""

_FIXED_KEYS: Final = {Encr.DES_3: 24, Encr.CHACHA20_POLY1305: 32, Encr.NULL: 0}

INTEG_KEYS: Final = {
    Integ.NONE: 0,
    Integ.HMAC_MD5_96: 16,
    Integ.HMAC_SHA1_96: 20,
    Integ.AES_XCBC_96: 16,
    Integ.HMAC_SHA1_160: 20,
    Integ.AES_CMAC_96: 16,
    Integ.HMAC_SHA2_256_128: 32,
    Integ.HMAC_SHA2_384_192: 48,
    Integ.HMAC_SHA2_512_256: 64,
}
"""key size in octets (RFC 4868 and others)"""

PROTOCOL_IKE: Final = 1
_KEY_LENGTH: Final = 0x800E
"""attribute Key Length, in the short form (RFC 7296 section 3.3.5)"""
_LAST, _MORE_TRANSFORMS = 0, 3
_PROPOSAL: Final = struct.Struct("!BBHBBBB")
"""last or more, reserved, length, number, protocol, SPI size, number of transforms"""
_LEAST_TRANSFORM: Final = 8
"""octets of one without attributes"""


class Suite(Struct, frozen=True, gc=False):
    """The algorithms of an IKE_SA, as IANA numbers.

    `encr_len` is in bits, 0 where the cipher has one key size; `integ` is 0 with an AEAD; `additional` are the further
    key exchanges of RFC 9370, in order.
    """

    encr: int
    encr_len: int
    integ: int
    prf: int
    group: int
    additional: tuple[int, ...] = ()

    @property
    def is_aead(self) -> bool:
        """Whether the cipher authenticates (RFC 5282)."""
        return self.encr in _AEAD_TAGS

    @property
    def prf_length(self) -> int:
        """Octets of the prf's output, and of SK_d and SK_p. Raises UnsupportedSuite."""
        length = PRF_OUTPUT.get(self.prf)  # type: ignore[call-overload]
        if length is None:
            raise UnsupportedSuite(f"the prf {_name(Prf, self.prf)} is not implemented")
        return int(length)

    @property
    def encr_key_length(self) -> int:
        """Octets of SK_e, the salt of AEAD and counter modes included."""
        key = self.encr_len // 8 if self.encr_len else _FIXED_KEYS.get(self.encr, 0)  # type: ignore[call-overload]
        return int(key) + self.salt_length

    @property
    def salt_length(self) -> int:
        """Octets of salt at the end of SK_e."""
        return _SALTS.get(self.encr, 0)  # type: ignore[call-overload, no-any-return]

    @property
    def tag_length(self) -> int:
        """Octets of an AEAD's tag."""
        return _AEAD_TAGS.get(self.encr, 0)  # type: ignore[call-overload, no-any-return]

    @property
    def integ_key_length(self) -> int:
        """Octets of SK_a; 0 with an AEAD. Raises UnsupportedSuite."""
        if self.is_aead:
            return 0
        length = INTEG_KEYS.get(self.integ)  # type: ignore[call-overload]
        if length is None:
            raise UnsupportedSuite(f"the integrity algorithm {_name(Integ, self.integ)} is not implemented")
        return int(length)

    @property
    def name(self) -> str:
        """As strongSwan writes it: AES_CBC_128/HMAC_SHA2_256_128/PRF_HMAC_SHA2_256/CURVE_25519."""
        cipher = _name(Encr, self.encr) + (f"_{self.encr_len}" if self.encr_len else "")
        parts = [cipher]
        if self.integ:
            parts.append(_name(Integ, self.integ))
        parts.append(f"PRF_{_name(Prf, self.prf)}")
        if self.group:
            parts.append(_name(Group, self.group))
        parts += [f"KE{n}_{_name(Group, group)}" for n, group in enumerate(self.additional, 1) if group]
        return "/".join(parts)

    def proposal(self) -> bytes:
        """The body of an SA payload with this suite as its one proposal (RFC 7296 section 3.3)."""
        transforms: list[tuple[int, int, int]] = [(TransformType.ENCR, self.encr, self.encr_len)]
        if self.integ:
            transforms.append((TransformType.INTEG, self.integ, 0))
        transforms += [(TransformType.PRF, self.prf, 0), (TransformType.KE, self.group, 0)]
        transforms += [(TransformType.ADDKE1 + n, group, 0) for n, group in enumerate(self.additional) if group]
        octets = b""
        for position, (kind, number, key_length) in enumerate(transforms, 1):
            attribute = struct.pack("!HH", _KEY_LENGTH, key_length) if key_length else b""
            more = _LAST if position == len(transforms) else _MORE_TRANSFORMS
            octets += struct.pack("!BBHBBH", more, 0, 8 + len(attribute), kind, 0, number) + attribute
        head = _PROPOSAL.pack(_LAST, 0, 8 + len(octets), 1, PROTOCOL_IKE, 0, len(transforms))
        return head + octets


def proposes(body: bytes, suite: Suite) -> bool:
    """Whether the body of an SA payload is one proposal, that of this suite, its transforms in any order (RFC 7296
    section 3.3)."""
    written = suite.proposal()
    return body == written or (len(body) == len(written) and _transforms(body) == _transforms(written))


def _transforms(body: bytes) -> list[bytes] | None:
    """The transforms of a payload's one proposal, sorted, without what says which is the last; None for another
    layout."""
    if len(body) < _PROPOSAL.size:
        return None
    last, _, length, _, protocol, spi_size, count = _PROPOSAL.unpack_from(body)
    if (last, length, protocol, spi_size) != (_LAST, len(body), PROTOCOL_IKE, 0):
        return None
    found = []
    at = _PROPOSAL.size
    while at < len(body):
        length = int.from_bytes(body[at + 2 : at + 4])
        if length < _LEAST_TRANSFORM or at + length > len(body):
            return None
        found.append(body[at + 4 : at + 5] + body[at + 6 : at + length])
        at += length
    return sorted(found) if len(found) == count else None


def check_resumable(suite: Suite) -> None:
    """Raises UnsupportedSuite, naming the algorithm, where keys cannot be derived for a suite.

    Only the prf matters to a resumption: charon itself does all that the ciphers do.
    """
    _ = suite.prf_length


def child_name(encr: int, encr_len: int, integ: int, esn: int) -> str:
    """An ESP suite as strongSwan writes it: AES_GCM_16_128, AES_CBC_256/HMAC_SHA2_256_128/ESN."""
    parts = [_name(Encr, encr) + (f"_{encr_len}" if encr_len else "")]
    if integ:
        parts.append(_name(Integ, integ))
    if esn:
        parts.append("ESN")
    return "/".join(parts)


def _name(kind: type[IntEnum], number: int) -> str:
    try:
        name = kind(number).name
    except ValueError:
        return f"{kind.__name__.upper()}_{number}"
    return "3DES_CBC" if name == "DES_3" else name
