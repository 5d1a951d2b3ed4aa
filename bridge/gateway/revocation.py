"""Identities that an operator locked out (`ike-sa-sync revoke`), as this gateway enforces it.

The marks are in the bank (bridge.stub.revocation). A gateway asks the bank before it rebuilds anything whether they
changed, once for all requests that come within FRESH_SECONDS, remembers what it knows across a restart, and gives marks
back to a bank that lost them: a mark ends by its time or by a newer one, not by its absence. SAs of a locked-out
identity are ended here whatever their clients say, also those that come up by a full handshake later; their stubs are
deleted and never published again.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import structlog

from bridge.bank.interface import BankUnavailable, StubBank
from bridge.bank.write_queue import WriteQueue
from bridge.charon.charon import Charon
from bridge.charon.ike_sa import IkeSa
from bridge.charon.vici_types import SaInfo, ViciError
from bridge.gateway.endings import Endings
from bridge.service.metrics import Metrics
from bridge.service.state_file import replace
from bridge.stub.bank_keys import LOCKOUT_KIND
from bridge.stub.keyring import Keyring, SealError
from bridge.stub.revocation import Mark, canonical, names_of, open_mark, seal
from bridge.stub.stub import Stub

log = structlog.get_logger()

FILE: Final = "revocations"
"""in the folder that `state` names: a sealed mark a line, in base64"""
REPORT_TTL: Final = 60.0
LOOK_SECONDS: Final = 30.0
"""between two looks at the bank's marks that nothing gave cause for"""
SLICE: Final = 512
"""SAs that are looked at before the event loop has its turn"""
FRESH_SECONDS: Final = 0.02
"""for which a look counts for the other requests of a crowd too: what a mark that came meanwhile is about is ended when
the keyspace reports it"""
REPEAT_SECONDS: Final = 1.0
"""until what could not be ended, or could not be asked, is tried again"""


class Revocations:
    """The marks that count. `directory` is where they are kept across a restart, None for memory alone."""

    def __init__(
        self,
        bank: StubBank,
        keyring: Keyring,
        directory: str | Path | None = None,
        *,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bank = bank
        self._keyring = keyring
        self._clock = clock
        self._looked = float("-inf")
        """when a look began to which the bank answered (clock)"""
        self._path = None if directory is None else Path(directory) / FILE
        self._wall = wall
        self._stamp: bytes | None = None
        self._marks: dict[str, tuple[Mark, bytes]] = {}
        self._reading = asyncio.Lock()
        self._unsaved = False
        """the file could not be written"""
        self.unreadable = 0
        """marks of the bank that did not open at the last look"""
        self.changed = asyncio.Event()
        """set when there are other marks than before"""
        self._load()

    def revoked(self, sa: Stub | IkeSa) -> bool:
        """Whether the session is of an identity that is locked out; both that of IKE and that of EAP count."""
        return bool(self._marks) and self._any_revoked(names_of((sa.remote_id, sa.eap_id)))

    def lists_revoked(self, info: SaInfo) -> bool:
        """The same of an SA that VICI lists."""
        return self._any_revoked(canonical(text) for text in (info.remote_id, info.eap_id) if text)

    def _any_revoked(self, names: Iterable[str]) -> bool:
        now = self._wall()
        for name in names:
            found = self._marks.get(name)
            if found is not None and found[0].revoked and found[0].expires > now:
                return True
        return False

    @property
    def latest(self) -> int:
        """When the mark was made that was made last (Unix milliseconds)."""
        return max((mark.made for mark, _ in self._marks.values()), default=0)

    def active(self) -> list[Mark]:
        """The marks by which identities are locked out now."""
        now = self._wall()
        return [mark for mark, _ in self._marks.values() if mark.revoked and mark.expires > now]

    @property
    def fresh(self) -> bool:
        """Whether the bank was asked so lately that it need not be asked again."""
        return self._clock() - self._looked < FRESH_SECONDS

    async def look(self) -> None:
        """Take up what changed in the bank. Raises BankUnavailable."""
        began = self._clock()
        stamp = await self._bank.revocation_stamp()
        if stamp != self._stamp:
            await self.read()
        self._looked = began

    async def read(self) -> None:
        """Take up all marks of the bank, and give back to it those that it lacks. Raises BankUnavailable."""
        async with self._reading:
            if self._unsaved:
                await self._save()
            stamp = await self._bank.revocation_stamp()
            banks = await self._bank.revocations()
            found = list(self._marks.values())
            unreadable = 0
            for sealed in {sealed for marks in banks for sealed in marks}:
                try:
                    found.append((open_mark(sealed, self._keyring), sealed))
                except SealError:
                    unreadable += 1
            self.unreadable = unreadable
            if unreadable:
                log.warning(
                    "revocation-unreadable", marks=unreadable, fix="is bank.key_file that of the other gateways?"
                )
            now = self._wall()
            known: dict[str, tuple[Mark, bytes]] = {}
            # of two seals of one mark, every gateway keeps the same
            for mark, sealed in sorted(found, key=lambda each: (each[0].made, each[1])):
                if mark.expires > now:
                    known[mark.name] = (mark, sealed)
            for name, (mark, sealed) in known.items():
                if self._keyring.is_older(sealed):
                    known[name] = (mark, seal(mark, self._keyring))
            wanted = {sealed: mark.expires for mark, sealed in known.values()}
            stale = {sealed for _, sealed in found} - wanted.keys()
            if any(wanted.keys() - marks or stale & marks for marks in map(set, banks)):
                await self._bank.put_revocations(wanted, stale)
                stamp = await self._bank.revocation_stamp()
            self._stamp = stamp
            if known != self._marks:
                self._marks = known
                self.changed.set()
                await self._save()

    # across a restart

    async def _save(self) -> None:
        if self._path is None:
            return
        text = "".join([f"{base64.b64encode(sealed).decode()}\n" for _, sealed in self._marks.values()])
        try:
            await asyncio.to_thread(replace, self._path, text)
        except OSError as error:
            if not self._unsaved:
                log.warning("revocations-not-saved", file=str(self._path), reason=error.strerror)
            self._unsaved = True
        else:
            self._unsaved = False

    def _load(self) -> None:
        if self._path is None:
            return
        try:
            lines = self._path.read_text(encoding="ascii", errors="replace").split()
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning("revocations-not-read", file=str(self._path), reason=error.strerror)
            return
        for line in lines:
            try:
                sealed = base64.b64decode(line, validate=True)
                mark = open_mark(sealed, self._keyring)
            except (SealError, binascii.Error) as error:
                log.warning("revocations-not-read", file=str(self._path), reason=str(error))
            else:
                self._marks[mark.name] = (mark, sealed)


class LockOut:
    """Ends the SAs of locked-out identities here, for as long as it runs. `address` is this gateway's in the index."""

    def __init__(
        self,
        revocations: Revocations,
        bank: StubBank,
        charon: Charon,
        endings: Endings,
        writer: WriteQueue,
        address: str | None,
    ) -> None:
        self._revocations = revocations
        self._bank = bank
        self._charon = charon
        self._endings = endings
        self._writer = writer
        self._address = address
        self._news = asyncio.Event()
        self._ended = 0
        """SAs, since the marks changed last"""
        self.ended = 0
        """SAs, since this sidecar started"""

    def gauges(self, metrics: Metrics) -> None:
        """Who is locked out, for `status`."""
        marks = self._revocations
        metrics.gauge("identities_revoked", "identities that are locked out here", lambda: len(marks.active()))
        metrics.gauge(
            "revocations_unreadable",
            "marks of locked-out identities in the bank that did not open here at the last look",
            lambda: marks.unreadable,
        )
        metrics.total("revoked_ended", "IKE_SAs ended because their identity is locked out", lambda: self.ended)

    def soon(self) -> None:
        """The bank's marks changed, or an SA came up that is to be ended."""
        self._news.set()

    async def run(self) -> None:
        """Until cancelled. SAs that are known do not wait for those that only the bank knows: it may be away."""
        listed_at = -LOOK_SECONDS
        while True:
            self._news.clear()
            known = self._charon.reconciled.is_set()
            pause = LOOK_SECONDS if known else REPEAT_SECONDS
            try:
                await self._revocations.read()
            except BankUnavailable as error:
                # its return is news; what is known is enforced meanwhile
                log.debug(error.event, component="revocations", reason=str(error))
            if self._revocations.changed.is_set():
                self._revocations.changed.clear()
                self._ended = 0
                log.info("revocations", identities=[mark.identity for mark in self._revocations.active()])
            try:
                self._ended += await self._end_all()
                if known:
                    await self._report()
                elif self._revocations.active() and time.monotonic() >= listed_at + LOOK_SECONDS:
                    self._ended += await self._end_unknown()
                    listed_at = time.monotonic()
            except (BankUnavailable, ViciError) as error:
                log.warning("revocation-delayed", reason=str(error))
                pause = REPEAT_SECONDS
            try:
                async with asyncio.timeout(pause):
                    await self._news.wait()
            except TimeoutError:
                pass

    async def _end_all(self) -> int:
        """End what is to be ended; how many SAs charon had of them."""
        if not self._revocations.active():
            return 0
        sas = []
        for number, sa in enumerate(self._charon.tracker.established()):
            if self._revocations.revoked(sa):
                sas.append(sa)
            if number % SLICE == 0:
                await asyncio.sleep(0)
        if not sas:
            return 0
        for sa in sas:
            index = sa.published or sa.index_here(self._address)
            expires = max(sa.stub_expires, sa.expires)
            self._endings.add(index, expires)
            self._writer.submit_delete(index, expires=expires)
        ended = await self._charon.end({sa.id.spis for sa in sas})
        self.ended += ended
        for sa in sas:
            log.warning(
                "sa-ended-by-revocation",
                connection=sa.connection,
                identity=sa.remote_id.text if sa.remote_id else "",
                eap_identity=sa.eap_id.text if sa.eap_id else "",
                peer=sa.remote.address if sa.remote else "",
                **sa.id.logged,
            )
        return ended

    async def _end_unknown(self) -> int:
        """End those whose keys only the bank knows, as after a restart while it is away: charon lists their identities.
        How many charon had. Raises ViciError."""
        found: list[SaInfo] = []

        def take(infos: list[SaInfo]) -> None:
            found.extend(
                info for info in infos if info.state == "ESTABLISHED" and self._revocations.lists_revoked(info)
            )

        await self._charon.vici.each_sas(take)
        unknown = [info for info in found if info.spis not in self._charon.tracker.sas]
        for info in unknown:
            # one that has ended meanwhile
            with contextlib.suppress(ViciError):
                await self._charon.vici.end_sa(info.unique_id)
            log.warning(
                "sa-ended-by-revocation",
                connection=info.connection,
                identity=info.remote_id,
                eap_identity=info.eap_id,
                peer=info.remote.address,
                spi_i=info.spi_i.hex(),
                spi_r=info.spi_r.hex(),
            )
        self.ended += len(unknown)
        return len(unknown)

    async def _report(self) -> None:
        if self._address is None:
            return
        value = json.dumps({"latest": self._revocations.latest, "ended": self._ended})
        await self._bank.post(LOCKOUT_KIND, self._address, value, REPORT_TTL)
