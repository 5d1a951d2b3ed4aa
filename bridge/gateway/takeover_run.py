"""One takeover of an address: the sessions at it are read from the bank, owned, and given to charon.

the stubs at the address are read; what is not here and can be taken is this gateway's from now on (epoch + 1)
charon is given the IKE_SAs, with their own keys and message IDs, and CHILD_SAs with keys that no host has
bridge.gateway.taken_sessions rekeys the CHILD_SAs: from then on traffic flows
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import structlog

from bridge.bank.interface import BankUnavailable, StubBank
from bridge.charon.charon import Charon
from bridge.charon.ha_channel import ChannelError
from bridge.charon.ha_message import HaError
from bridge.charon.ike_sa import IkeSa
from bridge.charon.vici_client import START_SECONDS
from bridge.charon.vici_types import SaInfo, ViciError
from bridge.gateway import takeover_session as reasons
from bridge.gateway.left_in_kernel import outbound_of
from bridge.gateway.session_owner import SessionOwner
from bridge.gateway.taken_sessions import TakenSessions
from bridge.gateway.takeover_barriers import Barriers
from bridge.gateway.takeover_session import Session, age, obstacle, session_of
from bridge.gateway.takeover_state import State
from bridge.net import xfrm
from bridge.net.xfrm import EspSa
from bridge.stub.child_sa import wire_spi
from bridge.stub.stub import Index, Stub

log = structlog.get_logger()

FIRST_BATCH, BATCH, WHOLE_BATCH = 8, 256, 1024
"""sessions that charon gets with one activation: few at first, for a client waits; each activation looks at all SAs; up
to WHOLE_BATCH where they are of one HA segment, whose CHILD_SAs are rekeyed together"""
AGAIN_SECONDS: Final = 0.1
"""between two attempts where the bank or charon is not there"""
LIVING: Final = frozenset(("ESTABLISHED", "REKEYING", "REKEYED"))
"""VICI's states of an IKE_SA that was activated: its client may rekey it immediately"""
SHOWN: Final = 50
"""sessions that were not taken over, by name"""


@dataclass(slots=True, eq=False)
class Run:
    """What became of the sessions at an address, from the beginning of a takeover on."""

    address: str
    owners: frozenset[str] | None
    """whose sessions alone; None: all. "" is one that gave them up"""
    began: float
    loads_until: float = 0.0
    """until when charon's connections may be missing because it was just started"""
    at_start: bool = False
    """whether the sidecar was started while the address was here: what this gateway owned then and charon does not have
    has ended"""
    stopping: bool = False
    """whether the address is given up: no further batch"""
    installed: list[Session] = field(default_factory=list)
    """given to charon; whether it has them is to be asked"""
    listed: int = 0
    """sessions that it was asked about"""
    seen: set[Index] = field(default_factory=set)
    """sessions that the bank has at the address and that were not here"""
    keyed: set[Index] = field(default_factory=set)
    """of these, sessions with new keys"""
    left: set[Index] = field(default_factory=set)
    """and those whose clients do not answer"""
    reasons: Counter[str] = field(default_factory=Counter)
    """why sessions were not taken over"""
    failures: list[dict[str, str]] = field(default_factory=list)
    first_ms: float | None = None
    """until the first session had new keys"""
    ended: float | None = None

    def done(self, index: Index, state: State, now: float) -> None:
        """A session has new keys, or its client does not answer."""
        if state is State.TAKEN_OVER:
            if self.first_ms is None:
                self.first_ms = round((now - self.began) * 1000, 1)
            self.keyed.add(index)
            self.left.discard(index)
        else:
            self.left.add(index)

    @property
    def not_taken(self) -> list[tuple[str, int]]:
        """Reasons, and the sessions that were not taken over because of each."""
        return sorted(self.reasons.items())

    def row(self, under_way: int, now: float) -> dict[str, Any]:
        """For the control socket; so many of its sessions have yet to get new keys."""
        ended = now if self.ended is None else self.ended
        return {
            "address": self.address,
            "state": "running" if self.ended is None or under_way else "done",
            "from": ", ".join(sorted(filter(None, self.owners or ()))),
            "found": len(self.seen),
            "taken": len(self.keyed),
            "under_way": under_way,
            "left": len(self.left),
            "not_taken": [{"reason": reason, "sessions": number} for reason, number in self.not_taken],
            "failures": self.failures,
            "first_ms": self.first_ms,
            "seconds": round(ended - self.began, 3),
        }


class SessionTaker:
    """Takes sessions over for this gateway. `came` is called with a session that is here now."""

    def __init__(
        self,
        charon: Charon,
        bank: StubBank,
        owner: SessionOwner,
        sessions: TakenSessions,
        barriers: Barriers,
        came: Callable[[IkeSa, Stub], None],
        *,
        wall: Callable[[], float] = time.time,
        remove_sas: Callable[[Sequence[EspSa]], None] = xfrm.remove_sas,
    ) -> None:
        self._remove_sas = remove_sas
        self.taken = 0
        self.not_taken: Counter[str] = Counter()
        self._charon = charon
        self._bank = bank
        self._owner = owner
        self._sessions = sessions
        self._barriers = barriers
        self._came = came
        self._wall = wall

    async def take(self, run: Run) -> None:
        """Take over what the bank has at the address of `run`; waits for the bank and for charon."""
        await self._charon.reconciled.wait()
        self._sessions.expect(True)
        try:
            await self._take_patiently(run)
        finally:
            self._sessions.expect(False)

    async def _take_patiently(self, run: Run) -> None:
        waits = ""
        while not run.stopping:
            try:
                started = await self._charon.vici.started()
                await self._take_all(run, started)
            except (BankUnavailable, ViciError) as error:
                if waits != str(error):
                    waits = str(error)
                    log.warning("takeover-waits", address=run.address, reason=waits)
                await asyncio.sleep(AGAIN_SECONDS)
                continue
            return

    async def _take_all(self, run: Run, started: float) -> None:
        """A few as soon as they are read; then those first whose clients send something."""
        waiting: list[Stub] = []
        # not from what was prefetched: that lacks stubs which have changed since
        async for page in self._bank.download(run.address, BATCH):
            if not run.seen and not run.stopping:
                await self._take_some(run, page[:FIRST_BATCH], started)
                page = page[FIRST_BATCH:]
            waiting += page
        waiting.sort(key=self._segment)
        while waiting and not run.stopping:
            batch, waiting = self._next(waiting)
            await self._take_some(run, batch, started)
        await self._confirm(run)

    def _segment(self, stub: Stub) -> int:
        return self._charon.landing.segment_of(stub.remote.address)

    def _next(self, waiting: list[Stub]) -> tuple[list[Stub], list[Stub]]:
        """The sessions of the next batch, and the others, which are in the order of their segments."""
        active = self._sessions.active
        if active:
            waiting = sorted(waiting, key=lambda stub: not any(wire_spi(one.spi_in) in active for one in stub.children))
        end = BATCH
        while end < min(len(waiting), WHOLE_BATCH) and self._segment(waiting[end]) == self._segment(waiting[end - 1]):
            end += 1
        return waiting[:end], waiting[end:]

    async def _take_some(self, run: Run, stubs: Sequence[Stub], started: float) -> None:
        await self._know_connections(run, stubs)
        able = []
        for stub in stubs:
            known = self._charon.tracker.sas.get(stub.spi_i + stub.spi_r)
            if known is not None:
                ours = known.derivation
                if ours is None or stub.derivation is None or stub.derivation.epoch <= ours.epoch:
                    continue
                # another gateway had it since
                await self._owner.drop([known])
            again = stub.index in run.seen
            run.seen.add(stub.index)
            reason = self._obstacle(run, stub, started, again=again)
            if not reason:
                able.append(stub)
            elif not again:
                self._refuse(run, stub, reason)
        able = await self._latest(run, able)
        ages = {stub.index: age(stub) for stub in able}
        mine, others = await self._owner.become(able, lambda stub: self._obstacle(run, stub, started, again=True))
        for stub, reason in others:
            self._refuse(run, stub, reason)
        await self._owner.announce(run.address)
        now, wall = time.monotonic(), self._wall()
        sessions = []
        for stub in mine:
            connection = self._charon.connection(stub.connection)
            if connection is None:
                # charon was restarted meanwhile; once its connections are loaded, all is taken again
                self._refuse(run, stub, reasons.CONNECTION_MISSING)
                continue
            session = session_of(stub, connection, began=now, now=wall)
            session.age = ages[stub.index]
            self._sessions.put(session)
            sessions.append(session)
        await self._install(run, sessions)

    async def _know_connections(self, run: Run, stubs: Sequence[Stub]) -> None:
        needed = {(stub.connection, tuple(child.name for child in stub.children)) for stub in stubs}
        await self._charon.know_connections(needed)
        while time.monotonic() < run.loads_until and any(self._charon.connection(name) is None for name, _ in needed):
            await asyncio.sleep(AGAIN_SECONDS)
            await self._charon.know_connections(needed)

    async def _latest(self, run: Run, stubs: Sequence[Stub]) -> list[Stub]:
        """Without those whose client has a newer session: a gateway that failed leaves stubs of sessions behind that
        its clients have replaced since."""
        newest: dict[Hashable, Stub] = {}
        for stub in sorted(stubs, key=age):
            newest.update(dict.fromkeys(self._barriers.keys(stub), stub))
        left, over = [], []
        for stub in stubs:
            older = []
            reason = reasons.OLDER if any(newest[key] is not stub for key in self._barriers.keys(stub)) else ""
            for sa in self._barriers.rivals(stub):
                rival = self._sessions.get(sa.id.spis)
                if rival is None or rival.confirmed:
                    reason = reason or reasons.CLASHES
                elif rival.age >= age(stub):
                    reason = reason or reasons.OLDER
                else:
                    older.append(sa)
            if reason:
                self._refuse(run, stub, reason)
            else:
                left.append(stub)
                over += older
        await self._owner.drop(over)
        return left

    def _obstacle(self, run: Run, stub: Stub, started: float, *, again: bool) -> str:
        derivation = stub.derivation
        mine = derivation is not None and derivation.owner == self._owner.address
        # what the bank has let this gateway own before it was lost is to be owned once more
        if (
            derivation is not None
            and run.owners is not None
            and derivation.owner not in run.owners
            and not (mine and again)
        ):
            return reasons.OWNED_BY_ANOTHER
        if reason := self._barriers.of(stub):
            return reason
        unkeyed = derivation is not None and derivation.unkeyed
        if run.at_start and mine and not again and not unkeyed and stub.established > started + START_SECONDS:
            # charon has run since before it began, and does not have it
            self._owner.ended(stub)
            return reasons.ENDED
        version = self._charon.channel.version
        connection = self._charon.connection(stub.connection)
        children = [child.name for child in connection.children] if connection is not None else []
        return obstacle(stub, connection, children, version=version or 0, now=self._wall())

    def _refuse(self, run: Run, stub: Stub, reason: str) -> None:
        run.reasons[reason] += 1
        self.not_taken[reason] += 1
        identity, peer = (stub.eap_id or stub.remote_id).text, stub.remote.address
        if len(run.failures) < SHOWN:
            run.failures.append({"identity": identity, "address": peer, "reason": reason})
        log.warning("session-not-taken-over", identity=identity, peer=peer, reason=reason, index=str(stub.index))

    async def _install(self, run: Run, sessions: Sequence[Session]) -> None:
        self._clear_kernel(sessions)
        waits = False
        while not run.stopping and (sessions := [session for session in sessions if self._sessions.has(session)]):
            try:
                await self._charon.installer.install([session.install for session in sessions if session.install])
                break
            except HaError:
                # nothing was sent: one of them does not fit
                if len(sessions) == 1:
                    self._failed(run, sessions[0], reasons.UNFIT)
                    return
                for session in sessions:
                    await self._install(run, [session])
                return
            except ChannelError as error:
                if not waits:
                    log.warning("takeover-waits", address=run.address, reason=str(error))
                waits = True
                await asyncio.sleep(AGAIN_SECONDS)
        run.installed += sessions
        # each list is of all IKE_SAs: as many as there are digits in their number, not one for each batch
        if len(run.installed) >= max(FIRST_BATCH, run.listed):
            await self._confirm(run)

    def _clear_kernel(self, sessions: Sequence[Session]) -> None:
        """Of a charon of this host that died and had them, the kernel still has the ESP SAs, and accepts no others with
        the same SPIs. Those of SAs that this charon has stay."""
        stubs = [session.stub for session in sessions]
        sas = [EspSa(stub.local.address, wire_spi(child.spi_in)) for stub in stubs for child in stub.children]
        living = outbound_of(self._charon.tracker.sas.values())
        theirs = [EspSa(stub.remote.address, wire_spi(child.spi_out)) for stub in stubs for child in stub.children]
        sas += [each for each in theirs if each not in living]
        try:
            self._remove_sas(sas)
        except OSError as error:
            log.warning("left-in-kernel-not-removed", reason=str(error), sas=len(sessions))

    async def _confirm(self, run: Run) -> None:
        """Ask VICI whether charon has what it was given."""
        sessions, run.installed = run.installed, []
        run.listed += len(sessions)
        listed = await self._listed(run, sessions)
        if run.stopping:
            return
        lacking = []
        for session in sessions:
            info = listed.get(session.sa.id.spis)
            if not self._sessions.has(session):
                # it ended meanwhile, or charon was restarted
                continue
            if info is not None and info.state in LIVING:
                self._is_here(session, info)
            elif info is None or info.state != "DELETING":
                lacking.append(session)
                self._failed(run, session, reasons.NOT_KEPT)
        if lacking:
            with contextlib.suppress(ChannelError):
                await self._charon.remove([session.sa.id for session in lacking])

    async def _listed(self, run: Run, sessions: Sequence[Session]) -> dict[bytes, SaInfo]:
        """What VICI says of sessions that were installed. What it does not answer is asked again, as long as charon may
        have them."""
        listed: dict[bytes, SaInfo] = {}
        left = {session.stub.connection for session in sessions}
        while not run.stopping and left and any(self._sessions.has(session) for session in sessions):
            for connection in sorted(left):
                try:
                    listed |= {info.spis: info for info in await self._charon.vici.list_sas(connection)}
                    left.discard(connection)
                except ViciError as error:
                    log.warning("takeover-list-failed", reason=str(error))
                    await asyncio.sleep(AGAIN_SECONDS)
        return listed

    def _failed(self, run: Run, session: Session, reason: str) -> None:
        self._sessions.refused(session)
        self._refuse(run, session.stub, reason)

    def _is_here(self, session: Session, info: SaInfo) -> None:
        self._sessions.installed(session, info)
        sa = session.sa
        self._came(sa, session.stub)
        self.taken += 1
        log.info(
            "session-taken-over",
            connection=sa.connection,
            identity=sa.remote_id.text if sa.remote_id else "",
            peer=sa.remote.address if sa.remote else "",
            epoch=sa.derivation.epoch if sa.derivation else 0,
            **sa.id.logged,
        )
        self._sessions.begin(session)
