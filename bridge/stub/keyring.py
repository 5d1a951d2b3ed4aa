"""The envelope of a stub at rest: AES-256-GCM under a key that only the gateways have.

    +------------+-------------+--------------------------+----------+
    | key id (4) | nonce (12)  | ciphertext (as the stub) | tag (16) |
    +------------+-------------+--------------------------+----------+

The associated data is the key under which the bank keeps the stub, so that a stub moved to another one does not open.

A key that was made with an epoch seals for so long at most: the next one is derived from it by HKDF (RFC 5869), on each
gateway by its own clock, and the key file is rewritten with it. An older key does not follow from a newer one, so a key
that is stolen today opens nothing in old files of the bank that expired in an epoch before:

    id (4) and key (32) of epoch n + 1 = the last 4 and the first 32 octets of
                                         HKDF-SHA-256(key of epoch n, no salt, "ike-sa-sync epoch", 36 octets)

Nonces are random. One key should not seal more than 2^32 stubs (NIST SP 800-38D section 8.3): bridge.bank.seal_volume
counts them.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_OCTETS = 32
KEY_ID_OCTETS = 4
SEAL_NONCE_OCTETS = 12
TAG_OCTETS = 16
OVERHEAD = KEY_ID_OCTETS + SEAL_NONCE_OCTETS + TAG_OCTETS
"""octets by which a sealed stub is longer than the stub"""

EPOCH_MIN: Final = 3600
"""seconds: an epoch has to be longer than gateways take to agree on a key and to seal their stubs with it"""
RETAIN_SECONDS: Final = 90_000
"""how long the key of an epoch that is over is kept in memory: as long as a stub that a client holds, and an hour"""
EPOCHS_MAX: Final = 20_000
"""keys derived together at most, from an old file: two years of the shortest epoch"""

_LINE = re.compile(
    r"(?P<id>[0-9a-f]{8})\s+(?P<key>[A-Za-z0-9+/]{43}=)(\s+epoch=(?P<number>[0-9]{1,10})/(?P<seconds>[0-9]{1,8}))?"
)
_HEADER = """\
# Keys of the stub bank, for all its gateways the same: one a line, <id> <base64>. The first seals, every one opens.
# A process that can read this file can take over every session in the bank.
"""
_EPOCH_INFO = b"ike-sa-sync epoch"


class Epoch(NamedTuple):
    """When a key seals that the next one is derived from."""

    number: int
    """Unix seconds, divided by `seconds`"""
    seconds: int


class _Key(NamedTuple):
    key: bytes
    epoch: Epoch | None

    def __repr__(self) -> str:
        return f"_Key({self.epoch})"

    def line(self, key_id: bytes) -> str:
        """As in the key file."""
        epoch = f" epoch={self.epoch.number}/{self.epoch.seconds}" if self.epoch is not None else ""
        return f"{key_id.hex()} {base64.b64encode(self.key).decode()}{epoch}\n"

    def epochs_over(self, now: float) -> int:
        """How many epochs began since its own, by `now` (Unix seconds)."""
        assert self.epoch is not None
        return max(int(now) // self.epoch.seconds - self.epoch.number, 0)

    @property
    def needed_until(self) -> float:
        """Until when (Unix seconds) something may be around that was sealed with it in its epoch."""
        assert self.epoch is not None
        return (self.epoch.number + 1) * self.epoch.seconds + RETAIN_SECONDS

    def following(self) -> tuple[bytes, _Key]:
        """Identifier and key of the next epoch."""
        assert self.epoch is not None
        length = KEY_OCTETS + KEY_ID_OCTETS
        octets = HKDF(algorithm=SHA256(), length=length, salt=None, info=_EPOCH_INFO).derive(self.key)
        following = _Key(octets[:KEY_OCTETS], Epoch(self.epoch.number + 1, self.epoch.seconds))
        return octets[KEY_OCTETS:], following


class SealError(Exception):
    """A sealed stub that does not open, or a key file that cannot be used. Never holds a key."""


class Keyring:
    """The keys of a bank by their identifiers (4 octets); the first one seals."""

    def __init__(
        self,
        keys: Mapping[bytes, bytes],
        *,
        epochs: Mapping[bytes, Epoch] | None = None,
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._ciphers = {key_id: AESGCM(key) for key_id, key in keys.items()}
        self._chained = {key_id: _Key(keys[key_id], epoch) for key_id, epoch in (epochs or {}).items()}
        """keys with an epoch"""
        self._heads = list(self._chained)
        """of each chain the newest"""
        self._retired: dict[bytes, float] = {}
        """keys of epochs that are over, and until when (Unix seconds) they are kept"""
        self._sealing = next(iter(keys))
        self._random = random
        self._seals: Counter[bytes] = Counter()

    def __repr__(self) -> str:
        return f"Keyring({', '.join(key_id.hex() for key_id in self._ciphers)})"

    @classmethod
    def load(cls, path: str | Path, now: float | None = None) -> Keyring:
        """The keys in a file that `generate` made, and those of the epochs that began since (`now`: Unix seconds). The
        first one of the file seals.

        Raises SealError if the file is missing, open to other users, or holds anything but keys and comments.
        """
        keys = _read(Path(path))
        epochs = {key_id: key.epoch for key_id, key in keys.items() if key.epoch is not None}
        ring = cls({key_id: key.key for key_id, key in keys.items()}, epochs=epochs)
        ring.advance(time.time() if now is None else now)
        return ring

    @property
    def ids(self) -> tuple[bytes, ...]:
        """The identifiers of the keys, in the file's order."""
        return tuple(self._ciphers)

    @property
    def sealing(self) -> bytes:
        """The identifier of the key that seals."""
        return self._sealing

    @property
    def seals(self) -> dict[bytes, int]:
        """How often each key has sealed in this process, by its identifier."""
        return dict(self._seals)

    def replace(self, other: Keyring) -> None:
        """Take over the keys of `other`: the key file was changed. What seals stays, if it is still there."""
        self._ciphers = other._ciphers
        self._chained, self._heads, self._retired = other._chained, other._heads, other._retired
        if self._sealing not in self._ciphers:
            self._sealing = other._sealing

    def advance(self, now: float) -> bool:
        """Derive the keys of the epochs that began since, each in front of the one before, and forget those that are
        over for long. Whether there are others than before."""
        changed = False
        for place, head in enumerate(self._heads):
            key_id, key = head, self._chained[head]
            newest_first: list[tuple[bytes, _Key]] = []
            for _ in range(min(key.epochs_over(now), EPOCHS_MAX)):
                self._retired[key_id] = key.needed_until
                key_id, key = key.following()
                if key.needed_until <= now and newest_first:
                    # over for long as well: only the way to those behind it
                    newest_first.clear()
                newest_first.insert(0, (key_id, key))
            if newest_first:
                self._chained.update(newest_first)
                self._heads[place] = key_id
                ciphers: dict[bytes, AESGCM] = {}
                for each, cipher in self._ciphers.items():
                    if each == head:
                        ciphers.update((new_id, AESGCM(new.key)) for new_id, new in newest_first)
                    ciphers[each] = cipher
                self._ciphers, changed = ciphers, True
        for key_id, until in list(self._retired.items()):
            if until <= now and key_id != self._sealing:
                del self._retired[key_id]
                self._chained.pop(key_id, None)
                changed = self._ciphers.pop(key_id, None) is not None or changed
        return changed

    def keep(self, path: str | Path) -> bool:
        """Bring a key file to the epoch of the key that seals, in one step; whether it was in an earlier one. Raises
        SealError, OSError."""
        path = Path(path)
        sealing = self._chained.get(self._sealing)
        if sealing is None or sealing.epoch is None:
            return False
        kept = _read(path)
        for key_id, key in kept.items():
            reached = key_id
            while reached != self._sealing and key.epoch is not None and key.epoch.number < sealing.epoch.number:
                reached, key = key.following()
            if reached == self._sealing and key_id != reached:
                lines = {(reached if each == key_id else each): each for each in kept}
                _replace(path, {new: sealing if old == key_id else kept[old] for new, old in lines.items()})
                return True
        return False

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
        nonce = self._random(SEAL_NONCE_OCTETS)
        self._seals[self._sealing] += 1
        return b"".join((self._sealing, nonce, self._ciphers[self._sealing].encrypt(nonce, plaintext, aad)))

    def open(self, sealed: bytes, aad: bytes) -> bytes:
        """What was sealed for the place that `aad` names. Raises SealError, and nothing else, if it does not open."""
        if len(sealed) < OVERHEAD:
            raise SealError("cut: shorter than its envelope")
        cipher = self._ciphers.get(sealed[:KEY_ID_OCTETS])
        if cipher is None:
            raise SealError(f"sealed with key {sealed[:KEY_ID_OCTETS].hex()}, which is not in the key file")
        nonce, ciphertext = (
            sealed[KEY_ID_OCTETS : KEY_ID_OCTETS + SEAL_NONCE_OCTETS],
            sealed[KEY_ID_OCTETS + SEAL_NONCE_OCTETS :],
        )
        try:
            return cipher.decrypt(nonce, ciphertext, aad)
        except InvalidTag:
            raise SealError("cut, altered, moved to another index, or sealed with another key of the same id") from None


def generate(path: str | Path, *, add: bool = False, epoch: int | None = None, now: float | None = None) -> str:
    """Write a new key to `path` (mode 0600) and give its id in hex. With `epoch` (seconds) it seals for so long only:
    see above.

    Without `add` the file must not exist. With it, the new key goes in front of those in the file, which is replaced
    in one step. Raises SealError, or OSError where the file cannot be written.
    """
    path = Path(path)
    present = _read(path) if add else {}
    key_id = os.urandom(KEY_ID_OCTETS)
    while key_id in present:
        key_id = os.urandom(KEY_ID_OCTETS)
    started = None if epoch is None else Epoch(int(time.time() if now is None else now) // epoch, epoch)
    keys = {key_id: _Key(os.urandom(KEY_OCTETS), started), **present}
    if not add:
        try:
            _create(path, _text(keys))
        except FileExistsError:
            raise SealError(f"{path} exists: --add puts a new key in front of those in it") from None
    else:
        _replace(path, keys)
    return key_id.hex()


def _text(keys: Mapping[bytes, _Key]) -> str:
    return _HEADER + "".join([key.line(key_id) for key_id, key in keys.items()])


def _replace(path: Path, keys: Mapping[bytes, _Key]) -> None:
    beside = path.with_name(f".{path.name}.{os.urandom(KEY_ID_OCTETS).hex()}")
    _create(beside, _text(keys))
    try:
        beside.replace(path)
    except OSError:
        beside.unlink()
        raise


def _create(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> dict[bytes, _Key]:
    """The keys in a file, in its order."""
    try:
        with path.open(encoding="ascii") as file:
            found = os.fstat(file.fileno())
            lines = file.read().splitlines()
    except FileNotFoundError:
        raise SealError(f"{path} does not exist: make it with `ike-sa-sync keygen {path}`, or copy it here") from None
    except UnicodeDecodeError:
        raise SealError(f"{path} is not a key file: it holds octets that are not ASCII") from None
    except OSError as error:
        raise SealError(f"{path} cannot be read: {error.strerror}") from None
    mode = found.st_mode
    if found.st_uid not in (0, os.geteuid()):
        # its owner could read and replace the keys, whatever the mode
        raise SealError(f"{path} belongs to user {found.st_uid}: chown root {path}")
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise SealError(f"{path} is open to other users (mode {stat.S_IMODE(mode):04o}): chmod 600 {path}")
    keys: dict[bytes, _Key] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise SealError(f"{path} line {number}: not a key: 8 hex digits, a space, 32 octets in base64")
        epoch = None if match["number"] is None else Epoch(int(match["number"]), int(match["seconds"]))
        if epoch is not None and epoch.seconds < EPOCH_MIN:
            raise SealError(f"{path} line {number}: an epoch has at least {EPOCH_MIN} seconds")
        key_id = bytes.fromhex(match["id"])
        if key_id in keys:
            raise SealError(f"{path} line {number}: key id {match['id']} is there twice")
        try:
            keys[key_id] = _Key(base64.b64decode(match["key"], validate=True), epoch)
        except binascii.Error:
            raise SealError(f"{path} line {number}: not base64") from None
    if not keys:
        raise SealError(f"{path} holds no key: make one with `ike-sa-sync keygen`")
    return keys
