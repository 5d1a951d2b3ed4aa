"""Rotation of the bank's keys without a gap: a new key seals once every living gateway has it, and then what other keys
sealed is sealed anew, in the background.

Which keys a gateway has is in its heartbeat. A Redis that was emptied names gateways again only with their next
heartbeats: so a key has to be seen at all gateways for as long as a heartbeat lives.

A key with an epoch has a successor by itself, which seals in the same way: once all have it. When no stub needs the key
before it any more, the file is rewritten without it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import structlog

from bridge.bank.interface import BankUnavailable, StubBank
from bridge.stub.keyring import Keyring, SealError

log = structlog.get_logger()

SETTLE_SECONDS: Final = 15.0
"""that all living gateways have to be seen with a key before it seals"""
LOOK_SECONDS: Final = 2.0
"""between two looks at the key file, and at which keys the other gateways have"""


class KeyRotation:
    """Keeps `keyring` as `key_file` has it, and chooses what seals. `address` is this gateway's in the index.

    `settle` in seconds: how long all gateways have to be seen with a key before it seals.
    """

    def __init__(
        self,
        bank: StubBank,
        keyring: Keyring,
        key_file: str | Path,
        address: str | None,
        *,
        settle: float = SETTLE_SECONDS,
        look: float = LOOK_SECONDS,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._bank = bank
        self._keyring = keyring
        self._file = Path(key_file)
        self._address = address
        self._settle = settle
        self._look = look
        self._wall = wall
        self._unkept = False
        self._stamp = self._stamp_of_file()
        self._candidate: tuple[bytes, float] | None = None
        """the key that would seal, and since when it has been so"""
        self._resealed: set[str] = set()
        # until the others are seen: the key that all have if any is on its way
        keyring.prefer(keyring.ids[-1:])

    def status(self) -> dict[str, Any]:
        """For `ike-sa-sync status`: the key that seals, all keys of the file, whether an older one may go."""
        return {
            "sealing": self._keyring.sealing.hex(),
            "keys": [key_id.hex() for key_id in self._keyring.ids],
            "resealed": self._address in self._resealed,
        }

    def returned(self) -> None:
        """The bank was away, or is another one than before: what it holds may be sealed with any key."""
        self._resealed.clear()

    async def run(self) -> None:
        """Until it is cancelled."""
        first = True
        while True:
            self._reload()
            if self._keyring.advance(self._wall()):
                log.info("keys-of-epochs", keys=[key_id.hex() for key_id in self._keyring.ids])
            try:
                gateways = await self._bank.gateways()
                others = [sign.keys for name, sign in gateways.items() if sign.alive and name != self._address]
                # whoever starts among others that live does as they do
                self._choose(frozenset(self._keyring.ids).intersection(*others), at_once=first and bool(others))
                first = False
                # each its own, and of those that are gone the first who comes
                todo = {name for name, sign in gateways.items() if not sign.alive or name == self._address}
                for gateway in todo - self._resealed:
                    if count := await self._bank.reseal(gateway):
                        log.info("stubs-resealed", gateway=gateway, stubs=count, key=self._keyring.sealing.hex())
                    self._resealed.add(gateway)
                self._resealed &= todo
                await self._keep_file()
            except BankUnavailable:
                self._candidate = None
            await asyncio.sleep(self._look)

    def _choose(self, everywhere: frozenset[bytes], *, at_once: bool) -> None:
        """Let the first key of the file that is `everywhere` seal, if that has been so for long enough."""
        chosen = next((key_id for key_id in self._keyring.ids if key_id in everywhere), self._keyring.sealing)
        now = time.monotonic()
        if self._candidate is None or self._candidate[0] != chosen:
            self._candidate = (chosen, now)
        if (at_once or now - self._candidate[1] >= self._settle) and self._keyring.prefer((chosen,)):
            log.info("key-in-use", key=chosen.hex())
            self._resealed.clear()

    async def _keep_file(self) -> None:
        """Everything is sealed with the key that seals now: the one before it has done its duty."""
        try:
            if await asyncio.to_thread(self._keyring.keep, self._file):
                self._stamp = self._stamp_of_file()
                log.info("key-file-rewritten", file=str(self._file), key=self._keyring.sealing.hex())
        except (SealError, OSError) as error:
            if not self._unkept:
                log.error(
                    "key-file-not-rewritten",
                    reason=str(error),
                    fix="let the sidecar write to its folder; until then the file opens what expired in earlier epochs",
                )
            self._unkept = True
        else:
            self._unkept = False

    def _reload(self) -> None:
        stamp = self._stamp_of_file()
        if stamp in (None, self._stamp):
            return
        try:
            self._keyring.replace(Keyring.load(self._file))
        except (SealError, OSError) as error:
            log.warning("keys-not-reloaded", reason=str(error), mend="the keys in memory stay in use")
        else:
            log.info("keys-reloaded", keys=[key_id.hex() for key_id in self._keyring.ids])
        self._stamp = stamp

    def _stamp_of_file(self) -> tuple[int, ...] | None:
        try:
            stat = self._file.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino
