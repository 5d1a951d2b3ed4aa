"""The envelope of a stub at rest: AES-256-GCM under a key that only the gateways have.

    +------------+-------------+--------------------------+----------+
    | key id (4) | nonce (12)  | ciphertext (as the stub) | tag (16) |
    +------------+-------------+--------------------------+----------+

The associated data is the key under which the bank keeps the stub, so that a stub moved to another one does not open.

Nonces are random. One key should not seal more than 2^32 stubs (NIST SP 800-38D section 8.3): at 100 changes a second
that is more than a year.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_OCTETS = 32
KEY_ID_OCTETS = 4
NONCE_OCTETS = 12
TAG_OCTETS = 16
OVERHEAD = KEY_ID_OCTETS + NONCE_OCTETS + TAG_OCTETS
"""octets by which a sealed stub is longer than the stub"""

_LINE = re.compile(r"(?P<id>[0-9a-f]{8})\s+(?P<key>[A-Za-z0-9+/]{43}=)")
_HEADER = """\
# Keys of the stub bank, for all its gateways the same: one a line, <id> <base64>. The first seals, every one opens.
# Whoever reads this file can take over every session in the bank.
"""


class SealError(Exception):
    """A sealed stub that does not open, or a key file that cannot be used. Never holds a key."""


class Keyring:
    """The keys of a bank by their identifiers (4 octets); the first one seals."""

    def __init__(self, keys: Mapping[bytes, bytes], *, random: Callable[[int], bytes] = os.urandom) -> None:
        self._ciphers = {key_id: AESGCM(key) for key_id, key in keys.items()}
        self._sealing = next(iter(keys))
        self._random = random

    def __repr__(self) -> str:
        return f"Keyring({', '.join(key_id.hex() for key_id in self._ciphers)})"

    @classmethod
    def load(cls, path: str | Path) -> Keyring:
        """The keys in a file that `generate` made.

        Raises SealError if the file is missing, open to other users, or holds anything but keys and comments.
        """
        return cls(_read(Path(path)))

    @property
    def ids(self) -> tuple[bytes, ...]:
        """The identifiers of the keys, in the file's order."""
        return tuple(self._ciphers)

    @property
    def sealing(self) -> bytes:
        """The identifier of the key that seals."""
        return self._sealing

    def replace(self, other: Keyring) -> None:
        """Take over the keys of `other`: the key file was changed. What seals stays, if it is still there."""
        self._ciphers = other._ciphers
        if self._sealing not in self._ciphers:
            self._sealing = other._sealing

    def prefer(self, everywhere: Collection[bytes]) -> bool:
        """Seal with the first key that is among `everywhere`, the ids of those that all gateways have; whether that is
        another one than before. While there is none, what seals stays.
        """
        chosen = next((key_id for key_id in self._ciphers if key_id in everywhere), self._sealing)
        changed, self._sealing = chosen != self._sealing, chosen
        return changed

    def is_current(self, sealed: bytes) -> bool:
        """Whether `sealed` was sealed with the key that seals now."""
        return sealed[:KEY_ID_OCTETS] == self._sealing

    def is_older(self, sealed: bytes) -> bool:
        """Whether `sealed` was sealed with a key that stands behind the one that seals now."""
        ids = self.ids
        key_id = sealed[:KEY_ID_OCTETS]
        return key_id in ids and ids.index(key_id) > ids.index(self._sealing)

    def seal(self, plaintext: bytes, aad: bytes) -> bytes:
        """`plaintext` sealed with the first key for the place that `aad` names; `OVERHEAD` octets longer."""
        nonce = self._random(NONCE_OCTETS)
        return b"".join((self._sealing, nonce, self._ciphers[self._sealing].encrypt(nonce, plaintext, aad)))

    def open(self, sealed: bytes, aad: bytes) -> bytes:
        """What was sealed for the place that `aad` names. Raises SealError, and nothing else, if it does not open."""
        if len(sealed) < OVERHEAD:
            raise SealError("cut: shorter than its envelope")
        cipher = self._ciphers.get(sealed[:KEY_ID_OCTETS])
        if cipher is None:
            raise SealError(f"sealed with key {sealed[:KEY_ID_OCTETS].hex()}, which is not in the key file")
        nonce, ciphertext = sealed[KEY_ID_OCTETS : KEY_ID_OCTETS + NONCE_OCTETS], sealed[KEY_ID_OCTETS + NONCE_OCTETS :]
        try:
            return cipher.decrypt(nonce, ciphertext, aad)
        except InvalidTag:
            raise SealError("cut, altered, moved to another index, or sealed with another key of the same id") from None


def generate(path: str | Path, *, add: bool = False) -> str:
    """Write a new key to `path` (mode 0600) and give its id in hex.

    Without `add` the file must not exist. With it, the new key goes in front of those in the file, which is replaced
    in one step. Raises SealError, or OSError where the file cannot be written.
    """
    path = Path(path)
    present = _read(path) if add else {}
    key_id = os.urandom(KEY_ID_OCTETS)
    while key_id in present:
        key_id = os.urandom(KEY_ID_OCTETS)
    keys = {key_id: os.urandom(KEY_OCTETS), **present}
    text = _HEADER + "".join(f"{i.hex()} {base64.b64encode(key).decode()}\n" for i, key in keys.items())
    if not add:
        try:
            _create(path, text)
        except FileExistsError:
            raise SealError(f"{path} exists: --add puts a new key in front of those in it") from None
    else:
        beside = path.with_name(f".{path.name}.{key_id.hex()}")
        _create(beside, text)
        try:
            beside.replace(path)
        except OSError:
            beside.unlink()
            raise
    return key_id.hex()


def _create(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> dict[bytes, bytes]:
    """The keys in a file, in its order."""
    try:
        with path.open(encoding="ascii") as file:
            mode = os.fstat(file.fileno()).st_mode
            lines = file.read().splitlines()
    except FileNotFoundError:
        raise SealError(f"{path} does not exist: make it with `ike-sa-sync keygen {path}`, or copy it here") from None
    except UnicodeDecodeError:
        raise SealError(f"{path} is not a key file: it holds octets that are not ASCII") from None
    except OSError as error:
        raise SealError(f"{path} cannot be read: {error.strerror}") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise SealError(f"{path} is open to other users (mode {stat.S_IMODE(mode):04o}): chmod 600 {path}")
    keys: dict[bytes, bytes] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise SealError(f"{path} line {number}: not a key: 8 hex digits, a space, 32 octets in base64")
        key_id = bytes.fromhex(match["id"])
        if key_id in keys:
            raise SealError(f"{path} line {number}: key id {match['id']} is there twice")
        try:
            keys[key_id] = base64.b64decode(match["key"], validate=True)
        except binascii.Error:
            raise SealError(f"{path} line {number}: not base64") from None
    if not keys:
        raise SealError(f"{path} holds no key: make one with `ike-sa-sync keygen`")
    return keys
