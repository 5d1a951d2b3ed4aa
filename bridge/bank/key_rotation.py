"""Rotation of the bank's keys without a gap: a new key seals once every living gateway has it, and then what other keys
sealed is sealed again, in the background.

Which keys a gateway has is in its heartbeat. A Redis that was emptied names gateways again only with their next
heartbeats: so a key has to be seen at all gateways for as long as a heartbeat lives.

A key with an epoch has a successor by itself, which seals in the same way: once all have it. When no stub needs the key
before it any more, the file is rewritten without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Final, NamedTuple

import structlog

from bridge.bank.interface import BankUnavailable, BankUnwritable, StubBank
from bridge.bank.key_file import KeyFile
from bridge.bank.seal_volume import POST_SECONDS, SealVolume

log = structlog.get_logger()

SETTLE_SECONDS: Final = 15.0
"""that all living gateways have to be seen with a key before it seals"""
WAIT_SECONDS: Final = 60.0
"""how long a new key waits for gateways that lack it before the log names them: files are copied one after the other"""
GATEWAYS_SHOWN: Final = 20
LOOK_SECONDS: Final = 2.0
"""between two looks at the key file, and at which keys the other gateways have"""


class Pace(NamedTuple):
    """Seconds."""

    settle: float = SETTLE_SECONDS
    patience: float = WAIT_SECONDS
    look: float = LOOK_SECONDS


PACE: Final = Pace()


class KeyRotation:
    """Keeps the keyring as its file has it, and chooses what seals. `address` is this gateway's in the index,
    `shared` are those that it shares with others, whose stubs each of them seals again.

    `doubtful` says that heartbeats may be missing since the bank did not take them: then a gateway that is not seen may
    be alive, and no key is chosen.
    """

    def __init__(
        self,
        bank: StubBank,
        keys: KeyFile,
        address: str | None,
        *,
        shared: Collection[str] = (),
        pace: Pace = PACE,
        wall: Callable[[], float] = time.time,
        doubtful: Callable[[], bool] = lambda: False,
    ) -> None:
        self._bank = bank
        self._file = keys
        self._keyring = keyring = keys.keyring
        self._address = address
        self._shared = frozenset(shared)
        self._pace = pace
        self._wall = wall
        self._doubtful = doubtful
        self._volume = SealVolume(bank, keyring, address)
        self._volume_at = 0.0
        self._waiting_since: float | None = None
        self._waits_for: tuple[str, ...] = ()
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
            "resealed": {self._address, *self._shared} <= self._resealed,
            "waits_for": list(self._waits_for),
            "seals": self.seals,
        }

    def returned(self) -> None:
        """The bank was away, or is another one than before: what it holds may be sealed with any key."""
        self._resealed.clear()

    async def run(self) -> None:
        """Until it is cancelled."""
        first = True
        while True:
            self._file.reload()
            if self._keyring.advance(self._wall()):
                log.info("keys-of-epochs", keys=[key_id.hex() for key_id in self._keyring.ids])
            try:
                gateways = await self._bank.gateways()
                others = {name: sign.keys for name, sign in gateways.items() if sign.alive and name != self._address}
                if self._doubtful():
                    self._candidate = None
                else:
                    # a gateway that starts while others are alive takes the key that they have in use
                    everywhere = frozenset(self._keyring.ids).intersection(*others.values())
                    self._choose(everywhere, immediately=first and bool(others))
                    first = False
                self._say_who_lacks(others)
                await self._count(gateways)
                # each its own, and of those that are gone the first who comes
                todo = {name for name, sign in gateways.items() if not sign.alive or name == self._address}
                todo |= self._shared
                for gateway in todo - self._resealed:
                    if count := await self._bank.reseal(gateway):
                        log.info("stubs-resealed", gateway=gateway, stubs=count, key=self._keyring.sealing.hex())
                    self._resealed.add(gateway)
                self._resealed &= todo
                await self._file.keep()
            except BankUnavailable:
                self._candidate = None
            await asyncio.sleep(self._pace.look)

    def _choose(self, everywhere: frozenset[bytes], *, immediately: bool) -> None:
        """Let the first key of the file that is `everywhere` seal, if that has been so for long enough."""
        chosen = next((key_id for key_id in self._keyring.ids if key_id in everywhere), self._keyring.sealing)
        now = time.monotonic()
        if self._candidate is None or self._candidate[0] != chosen:
            self._candidate = (chosen, now)
        if (immediately or now - self._candidate[1] >= self._pace.settle) and self._keyring.prefer((chosen,)):
            log.info("key-in-use", key=chosen.hex())
            self._resealed.clear()

    @property
    def seals(self) -> int:
        """Stubs sealed with the key that seals now, by all gateways as far as is known."""
        return self._volume.total

    async def _count(self, gateways: Iterable[str]) -> None:
        now = time.monotonic()
        if now >= self._volume_at:
            self._volume_at = now + POST_SECONDS
            with contextlib.suppress(BankUnwritable):
                await self._volume.update(gateways)

    def _say_who_lacks(self, others: Mapping[str, frozenset[bytes]]) -> None:
        """The file's first key does not seal until every gateway that is alive has it. Anyone with write access to the
        bank can forge the heartbeat of a gateway that does not exist, so the log says for which ones the key waits."""
        newest, now = self._keyring.ids[0], time.monotonic()
        lacking = tuple(sorted(name for name, keys in others.items() if newest not in keys))
        if newest == self._keyring.sealing or not lacking:
            self._waiting_since, self._waits_for = None, ()
            return
        if self._waiting_since is None:
            self._waiting_since = now
        if lacking != self._waits_for and now - self._waiting_since >= self._pace.patience:
            self._waits_for = lacking
            log.warning(
                "key-waits-for-gateways",
                key=newest.hex(),
                gateways=" ".join(lacking[:GATEWAYS_SHOWN]),
                count=len(lacking),
                fix="copy the key file to them; delete ike:gateway:ADDRESS in the bank where ADDRESS is no gateway",
            )
