"""Lock-out of an identity: the mark that `ike-sa-sync revoke` leaves in the bank, and what it matches.

A mark is sealed with the bank's key as stubs are (bridge.stub.keyring), so that who can write to the bank and lacks the
key can neither lock a client out nor let one in. Of several marks of an identity the one that was made last counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

import msgspec
from msgspec import Struct

from bridge.stub import bank_keys
from bridge.stub.keyring import KEY_ID_OCTETS, OVERHEAD, Keyring, SealError
from bridge.stub.types import Identity

PLACE: Final = bank_keys.REVOKED.encode()
"""the associated data: a mark does not open as a stub, nor a stub as a mark"""
TEXT_MAX: Final = 1024
"""characters of an identity"""


class Mark(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What an operator decided about an identity."""

    identity: str
    """as the operator wrote it"""
    revoked: bool
    """False: it is let in again, whatever an older mark says"""
    made: int
    """Unix milliseconds"""
    expires: int
    """Unix seconds, until which it counts"""

    @property
    def name(self) -> str:
        """What the identity is compared by."""
        return canonical(self.identity)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Mark)


def seal(mark: Mark, keyring: Keyring) -> bytes:
    """The mark as the bank keeps it."""
    return keyring.seal(_encoder.encode(mark), PLACE)


def open_mark(sealed: bytes, keyring: Keyring) -> Mark:
    """The mark that `seal` made. Raises SealError, and nothing else."""
    try:
        return _decoder.decode(keyring.open(sealed, PLACE))
    except msgspec.MsgspecError as error:
        raise SealError(f"not a mark: {error}") from None


def is_forged(sealed: bytes, keyring: Keyring) -> bool:
    """Whether no gateway made what is in the place of a mark: it is too short, or does not open with the key that it
    names. What another key sealed, or another release, may be a mark."""
    if len(sealed) < OVERHEAD:
        return True
    if sealed[:KEY_ID_OCTETS] not in keyring.ids:
        return False
    try:
        keyring.open(sealed, PLACE)
    except SealError:
        return True
    return False


_COMMA: Final = re.compile(r"(?<!\\),(?=\s*[A-Za-z0-9.]+\s*=)")
_ALIASES: Final = {
    "E": "emailaddress",
    "EMAIL": "emailaddress",
    "1.2.840.113549.1.9.1": "emailaddress",
    "S": "st",
    "UID": "uid",
    "0.9.2342.19200300.100.1.1": "uid",
}


@lru_cache(maxsize=4096)
def canonical(text: str) -> str:
    """An identity in the form that all ways to write it have in common.

    Letters are compared without their case, as strongSwan does. Of a distinguished name neither the order of its parts
    counts, which swanctl and RFC 4514 write in opposite ways, nor the blanks between them.
    """
    text = text.strip().removeprefix("@")
    if "=" not in text:
        return text.casefold()
    parts = [part.partition("=") for part in _COMMA.split(text)]
    if not all(equals for _, equals, _ in parts):
        return text.casefold()
    pairs = []
    for name, _, value in parts:
        name = name.strip().upper()
        pairs.append(f"{_ALIASES.get(name, name.lower())}={value.strip().replace(chr(92), '').casefold()}")
    return "dn:" + ",".join(sorted(pairs))


def names_of(identities: Iterable[Identity | None]) -> set[str]:
    """What the identities of a session are compared by."""
    return {canonical(identity.text) for identity in identities if identity is not None}
