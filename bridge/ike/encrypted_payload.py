"""The Encrypted payload of a protected message (RFC 7296 section 3.14, with AEAD ciphers RFC 5282). No I/O.

                         1                   2                   3
     0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
    +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
    | Next Payload  |C|  RESERVED   |         Payload Length        |
    +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
    |                     Initialization Vector                     |
    +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
    ~                    Encrypted IKE Payloads                     ~
    +               +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
    |               |             Padding (0-255 octets)            |
    +-+-+-+-+-+-+-+-+                               +-+-+-+-+-+-+-+-+
    |                                               |  Pad Length   |
    +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
    ~                    Integrity Checksum Data                    ~
    +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+

charon does this, with the keys that it is given, for all messages of an IKE_SA but one: the client's sidecar makes the
first exchange of a resumed one (`confirm`). The load generator, which has no charon, makes all with it.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import Final, NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESCCM, AESGCM, ChaCha20Poly1305

from bridge.ike.keys import IkeKeys, prf
from bridge.ike.message import (
    HEADER,
    PAYLOAD_HEADER,
    VERSION,
    Header,
    MalformedMessage,
    Payload,
    PayloadType,
    parse,
    parse_header,
    parse_payloads,
)
from bridge.ike.transforms import Encr, Integ, Prf, Suite, UnsupportedSuite

_BLOCK: Final = 16
_AEAD_IV: Final = 8
"""octets (RFC 5282 section 3.1, RFC 7634 section 2)"""

_INTEG: Final = {
    # the function, and the octets of it that are sent
    Integ.HMAC_SHA1_96: (Prf.HMAC_SHA1, 12),
    Integ.AES_XCBC_96: (Prf.AES128_XCBC, 12),
    Integ.AES_CMAC_96: (Prf.AES128_CMAC, 12),
    Integ.HMAC_SHA2_256_128: (Prf.HMAC_SHA2_256, 16),
    Integ.HMAC_SHA2_384_192: (Prf.HMAC_SHA2_384, 24),
    Integ.HMAC_SHA2_512_256: (Prf.HMAC_SHA2_512, 32),
}
_GCM: Final = frozenset({Encr.AES_GCM_8, Encr.AES_GCM_12, Encr.AES_GCM_16})
_CCM: Final = frozenset({Encr.AES_CCM_8, Encr.AES_CCM_12, Encr.AES_CCM_16})
_COUNTING: Final = _GCM | _CCM | {Encr.CHACHA20_POLY1305, Encr.AES_CTR}
"""ciphers whose IV need only never repeat"""


class NotAuthentic(MalformedMessage):
    """The checksum of a protected message is wrong: it was altered, or made with other keys."""


class Protection(NamedTuple):
    """How one side protects what it sends: the suite and that side's SK_e and SK_a."""

    suite: Suite
    sk_e: bytes
    sk_a: bytes

    def __repr__(self) -> str:
        return f"Protection({self.suite.name})"

    @classmethod
    def of(cls, suite: Suite, keys: IkeKeys, *, initiator: bool) -> Protection:
        """That of the messages which the original initiator sends, or the responder (RFC 7296 section 2.14)."""
        return cls(suite, keys.sk_ei, keys.sk_ai) if initiator else cls(suite, keys.sk_er, keys.sk_ar)

    @property
    def iv_length(self) -> int:
        """Octets of initialization vector. Raises UnsupportedSuite."""
        if self.suite.encr in _COUNTING:
            return _AEAD_IV
        if self.suite.encr == Encr.AES_CBC:
            return _BLOCK
        raise UnsupportedSuite(f"{self.suite.name}: no messages of this cipher can be made here")

    @property
    def checksum_length(self) -> int:
        """Octets at the end of the message that authenticate it. Raises UnsupportedSuite."""
        return self.suite.tag_length or self._integ()[1]

    def _integ(self) -> tuple[int, int]:
        found = _INTEG.get(self.suite.integ)  # type: ignore[call-overload]
        if found is None:
            raise UnsupportedSuite(f"{self.suite.name}: no messages of this integrity algorithm can be made here")
        return found  # type: ignore[no-any-return]

    def checksum(self, octets: bytes) -> bytes:
        """The integrity checksum of a message up to it (RFC 7296 section 3.14)."""
        function, length = self._integ()
        return prf(function, self.sk_a, octets)[:length]

    def cipher(self, iv: bytes) -> Cipher[modes.CTR] | Cipher[modes.CBC]:
        """The cipher of a suite that is no AEAD, at the beginning of a message."""
        if self.suite.encr == Encr.AES_CTR:
            # RFC 5930: nonce from SK_e, IV, and a counter that begins with 1
            key, salt = self._key_and_salt()
            return Cipher(algorithms.AES(key), modes.CTR(salt + iv + (1).to_bytes(4)))
        return Cipher(algorithms.AES(self.sk_e), modes.CBC(iv))

    def _key_and_salt(self) -> tuple[bytes, bytes]:
        end = len(self.sk_e) - self.suite.salt_length
        return self.sk_e[:end], self.sk_e[end:]

    def seal(self, iv: bytes, plaintext: bytes, associated: bytes) -> bytes:
        """Ciphertext and tag of an AEAD (RFC 5282 sections 4 and 5.1)."""
        key, salt = self._key_and_salt()
        encr, tag = self.suite.encr, self.suite.tag_length
        if encr in _GCM:
            # the short tags of GCM are the beginning of the long one
            return AESGCM(key).encrypt(salt + iv, plaintext, associated)[: len(plaintext) + tag]
        if encr in _CCM:
            return AESCCM(key, tag).encrypt(salt + iv, plaintext, associated)
        if encr == Encr.CHACHA20_POLY1305:
            return ChaCha20Poly1305(key).encrypt(salt + iv, plaintext, associated)
        raise UnsupportedSuite(f"{self.suite.name}: no messages of this cipher can be made here")

    def open(self, iv: bytes, sealed: bytes, associated: bytes) -> bytes:
        """What `seal` was given. Raises InvalidTag."""
        key, salt = self._key_and_salt()
        encr, tag = self.suite.encr, self.suite.tag_length
        if encr in _GCM:
            mode = modes.GCM(salt + iv, sealed[-tag:], min_tag_length=tag)
            decryptor = Cipher(algorithms.AES(key), mode).decryptor()
            decryptor.authenticate_additional_data(associated)
            return decryptor.update(sealed[:-tag]) + decryptor.finalize()
        if encr in _CCM:
            return AESCCM(key, tag).decrypt(salt + iv, sealed, associated)
        if encr == Encr.CHACHA20_POLY1305:
            return ChaCha20Poly1305(key).decrypt(salt + iv, sealed, associated)
        raise UnsupportedSuite(f"{self.suite.name}: no messages of this cipher can be made here")


def protect(
    protection: Protection,
    *,
    spi_i: bytes,
    spi_r: bytes,
    exchange: int,
    flags: int,
    message_id: int,
    payloads: Sequence[tuple[int, bytes]],
    iv: bytes,
) -> bytes:
    """A message whose (type, body) payloads are inside an Encrypted payload. `iv` has `iv_length` octets: random ones
    for CBC, for all other ciphers such as were never used with these keys. Raises UnsupportedSuite.
    """
    aead = protection.suite.is_aead
    first = payloads[0][0] if payloads else PayloadType.NONE
    inner = b"".join(
        PAYLOAD_HEADER.pack(
            payloads[n + 1][0] if n + 1 < len(payloads) else PayloadType.NONE, 0, PAYLOAD_HEADER.size + len(body)
        )
        + body
        for n, (_, body) in enumerate(payloads)
    )
    block = 1 if aead or protection.suite.encr == Encr.AES_CTR else _BLOCK
    pad = -(len(inner) + 1) % block
    plaintext = inner + bytes(pad) + bytes((pad,))
    size = PAYLOAD_HEADER.size + len(iv) + len(plaintext) + protection.checksum_length
    head = HEADER.pack(
        spi_i, spi_r, PayloadType.SK, VERSION, exchange, flags, message_id, HEADER.size + size
    ) + PAYLOAD_HEADER.pack(first, 0, size)
    if aead:
        return head + iv + protection.seal(iv, plaintext, head)
    encryptor = protection.cipher(iv).encryptor()
    message = head + iv + encryptor.update(plaintext) + encryptor.finalize()
    return message + protection.checksum(message)


_FRAGMENT_NUMBERS: Final = 4
"""octets of an Encrypted Fragment payload in front of its IV (RFC 7383 section 2.5)"""


def is_authentic(protection: Protection, data: bytes) -> bool:
    """Whether the checksum of a protected message, or of a fragment of one (RFC 7383), is right; nothing else of it is
    read. Raises MalformedMessage where there is none, UnsupportedSuite."""
    message = parse(data)
    if not message.payloads or message.payloads[-1].type not in (PayloadType.SK, PayloadType.SKF):
        raise MalformedMessage("no Encrypted payload")
    sealed = message.payloads[-1]
    start = sealed.offset + (_FRAGMENT_NUMBERS if sealed.type == PayloadType.SKF else 0)
    ivs, checksum = protection.iv_length, protection.checksum_length
    if len(data) < start + ivs + 1 + checksum:
        raise MalformedMessage("the Encrypted payload is cut")
    if not protection.suite.is_aead:
        return hmac.compare_digest(protection.checksum(data[:-checksum]), data[-checksum:])
    try:
        protection.open(data[start : start + ivs], data[start + ivs :], data[:start])
    except InvalidTag:
        return False
    return True


def unprotect(protection: Protection, data: bytes) -> tuple[Header, tuple[Payload, ...]]:
    """The header and what is inside the Encrypted payload; offsets are those in the plaintext.

    Raises NotAuthentic, MalformedMessage where there is no Encrypted payload or nonsense in it, UnsupportedSuite.
    """
    message = parse(data)
    if not message.payloads or message.payloads[-1].type != PayloadType.SK:
        raise MalformedMessage("no Encrypted payload")
    sealed = message.payloads[-1]
    ivs, checksum = protection.iv_length, protection.checksum_length
    if len(sealed.body) < ivs + 1 + checksum:
        raise MalformedMessage("the Encrypted payload is cut")
    iv, body = sealed.body[:ivs], sealed.body[ivs:]
    if protection.suite.is_aead:
        try:
            plaintext = protection.open(iv, body, data[: sealed.offset])
        except InvalidTag:
            raise NotAuthentic("its tag is wrong") from None
    else:
        if not hmac.compare_digest(protection.checksum(data[:-checksum]), data[-checksum:]):
            raise NotAuthentic("its checksum is wrong")
        ciphertext = body[:-checksum]
        if protection.iv_length == _BLOCK and len(ciphertext) % _BLOCK:
            raise MalformedMessage("the ciphertext is no whole number of blocks")
        decryptor = protection.cipher(iv).decryptor()
        plaintext = decryptor.update(ciphertext) + decryptor.finalize()
    end = len(plaintext) - 1 - plaintext[-1]
    if end < 0:
        raise MalformedMessage("more padding than there is room")
    # the Encrypted payload's own header names the first payload in it (RFC 7296 section 3.14)
    first = data[sealed.offset - PAYLOAD_HEADER.size]
    return parse_header(data), parse_payloads(first, plaintext[:end], 0)
