"""Keys: prf, prf+, and what is derived with them. Pure functions; keys are arguments and results, never kept."""

from __future__ import annotations

import hmac
from typing import Final, NamedTuple

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.cmac import CMAC

from bridge.ike.transforms import FIXED_SIZE_PRFS, Prf, Suite, UnsupportedSuite

_HASHES: Final = {
    Prf.HMAC_SHA1: "sha1",
    Prf.HMAC_SHA2_256: "sha256",
    Prf.HMAC_SHA2_384: "sha384",
    Prf.HMAC_SHA2_512: "sha512",
}
_BLOCK: Final = 16
_PRF_PLUS_ROUNDS: Final = 255


def prf(algorithm: int, key: bytes, data: bytes) -> bytes:
    """The negotiated pseudo-random function (RFC 7296 section 2.13). Raises UnsupportedSuite."""
    name = _HASHES.get(algorithm)  # type: ignore[call-overload]
    if name is not None:
        return hmac.digest(key, data, name)
    if algorithm == Prf.AES128_XCBC:
        return _aes_xcbc(_xcbc_key(key), data)
    if algorithm == Prf.AES128_CMAC:
        return _aes_cmac(key if len(key) == _BLOCK else _aes_cmac(bytes(_BLOCK), key), data)
    raise UnsupportedSuite(f"the prf with number {algorithm} is not implemented")


def _xcbc_key(key: bytes) -> bytes:
    """RFC 4434 section 2: shorter keys are padded with zeros, longer ones are hashed under the zero key."""
    if len(key) <= _BLOCK:
        return key.ljust(_BLOCK, b"\0")
    return _aes_xcbc(bytes(_BLOCK), key)


def _encrypt_block(key: bytes, block: bytes) -> bytes:
    # one block, which is what the RFCs build on; ECB as such is used for nothing
    encryptor = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # noqa: S305
    return encryptor.update(block)


def _aes_xcbc(key: bytes, data: bytes) -> bytes:
    """AES-XCBC-MAC without truncation (RFC 3566 section 4, RFC 4434)."""
    k1, k2, k3 = (_encrypt_block(key, bytes((n,)) * _BLOCK) for n in (1, 2, 3))
    whole, rest = divmod(len(data), _BLOCK)
    if data and not rest:
        whole, last, pad = whole - 1, data[-_BLOCK:], k2
    else:
        last, pad = (data[whole * _BLOCK :] + b"\x80").ljust(_BLOCK, b"\0"), k3
    encryptor = Cipher(algorithms.AES(k1), modes.CBC(bytes(_BLOCK))).encryptor()
    return encryptor.update(data[: whole * _BLOCK] + _xor(last, pad))[-_BLOCK:]


def _xor(left: bytes, right: bytes) -> bytes:
    return (int.from_bytes(left) ^ int.from_bytes(right)).to_bytes(len(left))


def _aes_cmac(key: bytes, data: bytes) -> bytes:
    """AES-CMAC (RFC 4493); as a prf with keys of any length: RFC 4615 section 3."""
    mac = CMAC(algorithms.AES(key))
    mac.update(data)
    return mac.finalize()


def prf_plus(algorithm: int, key: bytes, seed: bytes, length: int) -> bytes:
    """prf+ (RFC 7296 section 2.13): `length` octets. Raises ValueError beyond 255 rounds."""
    output, last, number = b"", b"", 0
    while len(output) < length:
        number += 1
        if number > _PRF_PLUS_ROUNDS:
            raise ValueError("prf+ gives at most 255 blocks")
        last = prf(algorithm, key, last + seed + bytes((number,)))
        output += last
    return output[:length]


def skeyseed_initial(algorithm: int, g_ir: bytes, ni: bytes, nr: bytes) -> bytes:
    """SKEYSEED = prf(Ni | Nr, g^ir) (RFC 7296 section 2.14)."""
    if algorithm in FIXED_SIZE_PRFS:
        ni, nr = ni[:8], nr[:8]
    return prf(algorithm, ni + nr, g_ir)


def skeyseed_rekey(
    old_algorithm: int, sk_d_old: bytes, g_ir: bytes, ni: bytes, nr: bytes, additional: bytes = b""
) -> bytes:
    """SKEYSEED = prf(SK_d (old), g^ir (new) | Ni | Nr), with the old SA's prf (RFC 7296 section 2.18).

    `additional`, the further shared secrets of a rekey with several key exchanges, follow (RFC 9370 section 2.2.4).
    """
    return prf(old_algorithm, sk_d_old, g_ir + ni + nr + additional)


def skeyseed_resume(algorithm: int, sk_d_old: bytes, ni: bytes, nr: bytes, g_ir: bytes = b"") -> bytes:
    """SKEYSEED = prf(SK_d_old, Ni | Nr) (draft-xu-ike-sa-sync-01 section 3.3); with forward secrecy
    prf(SK_d_old, g^ir | Ni | Nr), as of a rekey (docs/protocol.md)."""
    return prf(algorithm, sk_d_old, g_ir + ni + nr)


NONCE_OCTETS: Final = 32
"""of the nonces that are made here: at least half the key size of every prf (RFC 7296 section 2.10)"""


class IkeKeys(NamedTuple):
    """{SK_d | SK_ai | SK_ar | SK_ei | SK_er | SK_pi | SK_pr} (RFC 7296 section 2.14)."""

    sk_d: bytes
    sk_ai: bytes
    sk_ar: bytes
    sk_ei: bytes
    sk_er: bytes
    sk_pi: bytes
    sk_pr: bytes

    def __repr__(self) -> str:
        return "IkeKeys(...)"


def derive_keys(
    suite: Suite, skeyseed: bytes, ni: bytes, nr: bytes, spi_i: bytes, spi_r: bytes, *, algorithm: int | None = None
) -> IkeKeys:
    """All keys = prf+(SKEYSEED, Ni | Nr | SPIi | SPIr) (RFC 7296 section 2.14; draft-xu-ike-sa-sync-01 section 3.3).

    `algorithm` as of `derive_sk_d`. Raises UnsupportedSuite.
    """
    p, a, e = suite.prf_length, suite.integ_key_length, suite.encr_key_length
    lengths = (p, a, a, e, e, p, p)
    octets = prf_plus(suite.prf if algorithm is None else algorithm, skeyseed, ni + nr + spi_i + spi_r, sum(lengths))
    keys, offset = [], 0
    for length in lengths:
        keys.append(octets[offset : offset + length])
        offset += length
    return IkeKeys(*keys)


def derive_sk_d(
    suite: Suite, skeyseed: bytes, ni: bytes, nr: bytes, spi_i: bytes, spi_r: bytes, *, algorithm: int | None = None
) -> bytes:
    """SK_d alone, the first of the keys. Raises UnsupportedSuite.

    `algorithm` is the prf of prf+ where that is not the suite's own: RFC 7296 section 2.18 has a rekeyed SA's SKEYSEED
    made with the old SA's prf, and charon makes all keys with it.
    """
    seed = ni + nr + spi_i + spi_r
    return prf_plus(suite.prf if algorithm is None else algorithm, skeyseed, seed, suite.prf_length)


class Resumption(NamedTuple):
    """What the keys of a resumed IKE_SA come from, on either side: SKEYSEED of draft-xu-ike-sa-sync-01 section 3.3, and
    then as in RFC 7296 section 2.14. `g_ir` with forward secrecy only."""

    suite: Suite
    sk_d_old: bytes
    nonce_i: bytes
    nonce_r: bytes
    spi_i: bytes
    spi_r: bytes
    g_ir: bytes = b""

    def __repr__(self) -> str:
        return "Resumption(...)"

    def _skeyseed(self) -> bytes:
        return skeyseed_resume(self.suite.prf, self.sk_d_old, self.nonce_i, self.nonce_r, self.g_ir)

    def keys(self) -> IkeKeys:
        """All of them. Raises UnsupportedSuite."""
        return derive_keys(self.suite, self._skeyseed(), self.nonce_i, self.nonce_r, self.spi_i, self.spi_r)

    def sk_d(self) -> bytes:
        """SK_d alone, which is less work. Raises UnsupportedSuite."""
        return derive_sk_d(self.suite, self._skeyseed(), self.nonce_i, self.nonce_r, self.spi_i, self.spi_r)
