"""Addresses that gateways share: the gateway that gets one takes over the sessions at it, as they are; the one that
loses it drops its own in silence.

    the fence of the address is taken down
    the stubs at the address are read; what is not here and can be taken is this gateway's from now on (epoch + 1)
    charon is given the IKE_SAs, with their own keys and message IDs, and CHILD_SAs with keys that no host has
    charon rekeys the CHILD_SAs: from then on traffic flows

Which gateway has the address is decided elsewhere (VRRP, an operator). The bank decides whose a session is: what an
older owner writes is refused, and it drops the session.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import structlog

from bridge.bank.interface import BankUnavailable, SharedBank, StubBank, Taking
from bridge.bank.write_queue import WriteQueue
from bridge.charon.charon import Charon
from bridge.charon.ha_channel import ChannelError
from bridge.charon.ha_message import HaError, IkeId
from bridge.charon.ike_sa import IkeSa
from bridge.charon.vici_types import SaInfo, ViciError
from bridge.config import TakeoverConfig, canonical_address
from bridge.gateway import takeover_session as reasons
from bridge.gateway.endings import Endings
from bridge.gateway.fence import Fence
from bridge.gateway.living import LivingSas
from bridge.gateway.publisher import Publisher
from bridge.gateway.revocation import Revocations
from bridge.gateway.takeover_rekeys import TakeoverRekeys
from bridge.gateway.takeover_requests import TakeoverRequests
from bridge.gateway.takeover_session import Session, obstacle, owned, session_of
from bridge.gateway.takeover_state import ADDRESS, Address, AddressEvent, Event, State
from bridge.net import address_watch
from bridge.net.interface import Sender
from bridge.net.shared_requests import Heard
from bridge.service.tasks import end, spawn
from bridge.stub import bank_keys
from bridge.stub.stub import Index, Stub

log = structlog.get_logger()

FIRST_BATCH, BATCH = 8, 256
"""sessions that charon gets with one activation: few at first, for a client waits; each activation looks at all SAs"""
TRIES: Final = 3
"""to become the owner of a session whose stub changes meanwhile"""
AGAIN_SECONDS: Final = 0.1
"""between two attempts where the bank or charon is not there"""
YIELD_SECONDS: Final = 2.0
"""that the bank has, and charon, before the answer to `yield`: the fence holds from its beginning"""
PUBLISH_SECONDS: Final = 0.25
"""between two stores of message IDs"""
TELL_SECONDS: Final = 60.0
"""that the bank names the gateway which took an address over last"""
SHOWN: Final = 50
"""sessions that were not taken over, by name"""
UNKNOWN: Final = {"error": "is not among takeover.addresses of this gateway"}


@dataclass(slots=True, eq=False)
class _Run:
    """One takeover of an address, from its beginning on."""

    address: str
    owner: str
    """whose sessions alone; "": all"""
    began: float
    found: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    """of states, and of reasons why a session was not taken over"""
    failures: list[dict[str, str]] = field(default_factory=list)
    first_ms: float | None = None
    """until the first session had new keys"""
    ended: float | None = None


class Takeover:
    """Of the addresses that are configured, from `start` to `close`. `address` is this gateway's own. `came` is called
    with a session that is here now, `went` with an SA that was dropped in silence."""

    def __init__(
        self,
        config: TakeoverConfig,
        address: str | None,
        charon: Charon,
        bank: StubBank,
        shared_bank: SharedBank,
        publisher: Publisher,
        writer: WriteQueue,
        endings: Endings,
        living: LivingSas,
        revocations: Revocations,
        again: Sender,
        fence: Fence,
        came: Callable[[IkeSa, Stub], None],
        went: Callable[[IkeSa], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.addresses = config.addresses
        self.taken = 0
        self.not_taken: Counter[str] = Counter()
        self.lost = 0
        """sessions that another gateway has taken from here"""
        self.hear_esp: Callable[[bool], None] = lambda _: None
        self._owner = address or ""
        self._charon = charon
        self._bank = bank
        self._shared_bank = shared_bank
        self._publisher = publisher
        self._writer = writer
        self._endings = endings
        self._living = living
        self._revocations = revocations
        self._fence = fence
        self._came = came
        self._went = went
        self._clock = clock
        self._wall = wall
        self._states = dict.fromkeys(config.addresses, ADDRESS.first)
        self._runs: dict[str, _Run] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._sessions: dict[bytes, Session] = {}
        self._rekeys = TakeoverRekeys(charon, self._rekeyed, clock=clock)
        self._requests = TakeoverRequests(charon, again, clock=clock)
        self._unpublished: dict[bytes, IkeSa] = {}
        self._lost: dict[Index, None] = {}
        self._turn = asyncio.Lock()
        """one command after the other: news of the kernel and of VRRP may come at the same time"""
        self._background: list[asyncio.Task[None]] = []
        charon.tracker.shared = frozenset(config.addresses)
        charon.tracker.owner = self._owner
        charon.tracker.on_message_id = self._own_request
        shared_bank.on_taken = self._taken_elsewhere

    # from start to end

    async def start(self, present: Iterable[str]) -> None:
        """Begin; `present` are the addresses that this host has. All others are fenced."""
        for address in present:
            self._on(address, AddressEvent.TAKEN)
            self._on(address, AddressEvent.DONE)
        await self._fence.start(self._away())
        self._background = [
            spawn("takeover-rekeys", self._rekeys.run()),
            spawn("takeover-publish", self._publish()),
        ]

    async def close(self) -> None:
        """End; charon goes on."""
        await end(*self._tasks.values(), *self._background)
        await self._fence.close()

    def _away(self) -> set[str]:
        return {address for address, state in self._states.items() if state is Address.AWAY}

    def _on(self, address: str, event: AddressEvent) -> None:
        self._states[address] = ADDRESS.after(self._states[address], event)

    # commands

    async def take(self, request: dict[str, Any]) -> dict[str, Any]:
        """Control command: take over the sessions at `address`, those of gateway `from` alone if that is given."""
        address = canonical_address(str(request["address"]))
        if address not in self._states:
            return {"error": f"{address} {UNKNOWN['error']}"}
        owner = canonical_address(str(request["from"])) if request.get("from") else ""
        async with self._turn:
            return await self._begin(address, owner)

    async def _begin(self, address: str, owner: str) -> dict[str, Any]:
        task = self._tasks.get(address)
        if task is not None and not task.done():
            return await self.progress({"address": address})
        self._on(address, AddressEvent.TAKEN)
        await self._fence.around(self._away())
        run = self._runs[address] = _Run(address, owner, self._clock())
        log.info("takeover-begins", address=address, **({"owner": owner} if owner else {}))
        self._tasks[address] = spawn(f"take over {address}", self._take(run))
        return await self.progress({"address": address})

    async def progress(self, request: dict[str, Any]) -> dict[str, Any]:
        """Control command: how far the last takeover of `address` is."""
        address = canonical_address(str(request["address"]))
        run = self._runs.get(address)
        if run is None:
            return {"error": f"{address} was not taken over since the sidecar started"}
        return self._row(run)

    async def give_up(self, request: dict[str, Any]) -> dict[str, Any]:
        """Control command: drop all sessions at `address` in silence, and let nothing of it leave this host."""
        address = canonical_address(str(request["address"]))
        if address not in self._states:
            return {"error": f"{address} {UNKNOWN['error']}"}
        async with self._turn:
            if request.get("unless_here") and address in address_watch.present():
                return {"address": address, "state": str(self._states[address]), "sessions": 0, "stored": True}
            return await self._give_up(address)

    async def _give_up(self, address: str) -> dict[str, Any]:
        task = self._tasks.pop(address, None)
        if task is not None:
            await end(task)
            run = self._runs[address]
            run.ended = run.ended or self._clock()
        if self._states[address] is not Address.AWAY:
            self._on(address, AddressEvent.YIELDED)
        await self._fence.around(self._away())
        sas = [sa for sa in self._charon.tracker.sas.values() if sa.local is not None and sa.local.address == address]
        stored = await self._store(sas)
        await self._drop(sas)
        log.info("yielded", address=address, sessions=len(sas), stored=stored)
        return {"address": address, "state": str(self._states[address]), "sessions": len(sas), "stored": stored}

    def status(self) -> list[dict[str, Any]]:
        """Of each address: its state, the sessions here, and the last takeover."""
        here = Counter(sa.local.address for sa in self._charon.tracker.established() if sa.local is not None)
        taken = Counter(
            sa.local.address for sa in self._charon.tracker.established() if sa.local is not None and sa.taken_over
        )
        return [
            {
                "address": address,
                "state": str(state),
                "sessions": here[address],
                "taken_over": taken[address],
                "last": self._row(self._runs[address]) if address in self._runs else None,
            }
            for address, state in self._states.items()
        ]

    def _row(self, run: _Run) -> dict[str, Any]:
        ended = self._clock() if run.ended is None else run.ended
        under_way = sum(
            1
            for session in self._sessions.values()
            if session.state in (State.INSTALLING, State.REKEYING) and session.stub.index.gateway == run.address
        )
        return {
            "address": run.address,
            "state": "running" if run.ended is None or under_way else "done",
            "from": run.owner,
            "found": run.found,
            "taken": run.counts[State.TAKEN_OVER],
            "under_way": under_way,
            "left": run.counts[State.LEFT],
            "not_taken": [
                {"reason": reason, "sessions": number}
                for reason, number in sorted(run.counts.items())
                if not isinstance(reason, State)
            ],
            "failures": run.failures,
            "first_ms": run.first_ms,
            "seconds": round(ended - run.began, 3),
        }

    # taking over

    async def _take(self, run: _Run) -> None:
        await self._charon.reconciled.wait()
        self.hear_esp(True)
        try:
            while True:
                try:
                    await self._take_all(run)
                except BankUnavailable as error:
                    log.warning("takeover-waits", address=run.address, reason=str(error))
                    await asyncio.sleep(AGAIN_SECONDS)
                    continue
                break
        finally:
            if not any(other.ended is None for other in self._runs.values() if other is not run):
                self.hear_esp(False)
        run.ended = self._clock()
        self._on(run.address, AddressEvent.DONE)
        self._requests.forget_old()
        log.info(
            "takeover-ends",
            address=run.address,
            found=run.found,
            not_taken=sum(number for reason, number in run.counts.items() if not isinstance(reason, State)),
            seconds=round(run.ended - run.began, 3),
        )

    async def _take_all(self, run: _Run) -> None:
        size = FIRST_BATCH
        waiting: list[Stub] = []
        async for page in self._stubs(run.address):
            waiting += page
            while len(waiting) >= size:
                await self._take_some(run, waiting[:size])
                waiting, size = waiting[size:], BATCH
        for first in range(0, len(waiting), BATCH):
            await self._take_some(run, waiting[first : first + BATCH])

    async def _stubs(self, address: str) -> Any:
        # not from what was prefetched: that lacks stubs which have changed since
        async for page in self._bank.download(address, FIRST_BATCH):
            yield page

    async def _take_some(self, run: _Run, stubs: Sequence[Stub]) -> None:
        await self._charon.know_connections({(s.connection, tuple(c.name for c in s.children)) for s in stubs})
        able = []
        for stub in stubs:
            if stub.spi_i + stub.spi_r in self._charon.tracker.sas:
                continue
            run.found += 1
            reason = self._obstacle(run, stub)
            if reason:
                self._refuse(run, stub, reason)
            else:
                able.append(stub)
        mine = await self._own(run, able)
        with contextlib.suppress(BankUnavailable):
            # a gateway that had the address, and lives, looks whether it has lost sessions: after they have a new owner
            await self._bank.post(bank_keys.TAKEOVER_KIND, run.address, self._owner, TELL_SECONDS)
        now, wall = self._clock(), self._wall()
        sessions = []
        for stub in mine:
            connection = self._charon.connection(stub.connection)
            assert connection is not None
            session = session_of(stub, connection, began=now, now=wall)
            session.sa.up = False
            self._charon.tracker.adopt(session.sa)
            self._sessions[session.sa.id.spis] = session
            self._requests.watch(session)
            sessions.append(session)
        await self._install(run, sessions)

    def _obstacle(self, run: _Run, stub: Stub) -> str:
        version = self._charon.channel.version
        connection = self._charon.connection(stub.connection)
        children = [child.name for child in connection.children] if connection is not None else []
        if stub.derivation is not None and run.owner and stub.derivation.owner != run.owner:
            return reasons.OWNED_BY_ANOTHER
        if stub.index in self._endings:
            return reasons.ENDED
        if self._revocations.revoked(stub):
            return reasons.REVOKED
        if self._living.clashes(stub):
            return reasons.CLASHES
        return obstacle(stub, connection, children, version=version or 0, now=self._wall())

    def _refuse(self, run: _Run, stub: Stub, reason: str) -> None:
        run.counts[reason] += 1
        self.not_taken[reason] += 1
        identity, peer = (stub.eap_id or stub.remote_id).text, stub.remote.address
        if len(run.failures) < SHOWN:
            run.failures.append({"identity": identity, "address": peer, "reason": reason})
        log.warning("session-not-taken-over", identity=identity, peer=peer, reason=reason, index=str(stub.index))

    async def _own(self, run: _Run, stubs: Sequence[Stub]) -> list[Stub]:
        """Become the owner of these sessions; gives them as the bank has them now. Raises BankUnavailable."""
        mine: list[Stub] = []
        todo = list(stubs)
        for attempt in range(TRIES):
            if not todo:
                break
            if attempt:
                read = await self._bank.get([stub.index for stub in todo])
                for stub, again in zip(todo, read, strict=True):
                    if again is None:
                        self._refuse(run, stub, reasons.ENDED)
                todo = [stub for stub in read if stub is not None]
            now = self._wall()
            pairs = [(stub, owned(stub, self._owner, now=now)) for stub in todo]
            left = []
            for (stub, new), said in zip(pairs, await self._shared_bank.take(pairs), strict=True):
                if said is Taking.TAKEN:
                    mine.append(new)
                elif said is Taking.ENDED:
                    self._refuse(run, stub, reasons.ENDED)
                else:
                    left.append(stub)
            todo = left
        for stub in todo:
            self._refuse(run, stub, reasons.CHANGED)
        return mine

    async def _install(self, run: _Run, sessions: Sequence[Session]) -> None:
        todo = list(sessions)
        while todo:
            try:
                await self._charon.installer.install([session.install for session in todo])
                break
            except HaError:
                # nothing was sent: one of them does not fit
                if len(todo) > 1:
                    for session in todo:
                        await self._install(run, [session])
                else:
                    self._failed(run, todo[0], reasons.UNFIT)
                return
            except ChannelError as error:
                log.warning("takeover-waits", address=run.address, reason=str(error))
                await asyncio.sleep(AGAIN_SECONDS)
        listed: dict[bytes, SaInfo] = {}
        for connection in {session.stub.connection for session in todo}:
            try:
                listed |= {info.spis: info for info in await self._charon.vici.list_sas(connection)}
            except ViciError as error:
                log.warning("takeover-list-failed", reason=str(error))
        for session in todo:
            info = listed.get(session.sa.id.spis)
            if info is None or info.state != "ESTABLISHED":
                self._failed(run, session, reasons.NOT_KEPT)
            elif self._sessions.get(session.sa.id.spis) is session:
                self._is_here(session, info)

    def _failed(self, run: _Run, session: Session, reason: str) -> None:
        session.on(Event.REFUSED)
        self._charon.tracker.forget(session.sa.id)
        self._forget(session.sa.id.spis)
        self._refuse(run, session.stub, reason)

    def _is_here(self, session: Session, info: SaInfo) -> None:
        sa = session.sa
        session.unique_id = sa.unique_id = info.unique_id
        session.on(Event.INSTALLED)
        self._charon.tracker.has_come_up(sa)
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
        self._rekeys.put(session)
        self._requests.judge(session)

    def _rekeyed(self, session: Session, reason: str) -> None:
        """A session has new keys, or its client is silent."""
        run = self._runs.get(session.stub.index.gateway)
        if run is not None:
            if session.state is State.TAKEN_OVER:
                if run.first_ms is None:
                    run.first_ms = round((self._clock() - run.began) * 1000, 1)
                log.info(
                    "takeover-rekeyed",
                    ms=round((self._clock() - session.began) * 1000, 1),
                    **session.sa.id.logged,
                )
            run.counts[session.state] += 1
        if reason == reasons.CHILD_LOST:
            spawn("takeover-end", self._end(session))
        if reason:
            log.warning("takeover-incomplete", reason=reason, **session.sa.id.logged)

    async def _end(self, session: Session) -> None:
        try:
            await self._charon.end_surely(session.sa)
        except ChannelError as error:
            log.warning("sa-not-ended", reason=str(error), **session.sa.id.logged)

    # what happens meanwhile

    def heard(self, heard: Heard) -> None:
        """Clients sent something to a shared address."""
        for session in self._requests.overheard(heard.requests):
            self._rekeys.first(session)
        if heard.esp:
            for session in list(self._sessions.values()):
                remote = session.install.remote
                if session.state is State.REKEYING and (remote.address, remote.port) in heard.esp:
                    self._rekeys.first(session)

    def changed(self, sa: IkeSa) -> None:
        """An SA of this gateway changed."""
        self._rekeys.changed(sa)

    def verified(self, ike_id: IkeId) -> None:
        """A request of a client verified."""
        self._requests.verified(ike_id.spis)

    def gone(self, sa: IkeSa) -> None:
        """An SA of this gateway ended."""
        self._forget(sa.id.spis)

    def _forget(self, spis: bytes) -> None:
        session = self._sessions.pop(spis, None)
        if session is not None and session.state is not State.GONE:
            session.on(Event.ENDED)
        self._rekeys.forget(spis)
        self._requests.forget(spis)

    def _own_request(self, sa: IkeSa) -> None:
        self._rekeys.sent(sa.id.spis)
        self._unpublished[sa.id.spis] = sa

    async def _publish(self) -> None:
        """Store the message IDs of this gateway's own requests, those of a moment together; and drop what another
        gateway has."""
        while True:
            await asyncio.sleep(PUBLISH_SECONDS)
            sas, self._unpublished = self._unpublished, {}
            for spis, sa in sas.items():
                if sa.up and self._charon.tracker.sas.get(spis) is sa:
                    self._publisher.publish(sa)
            lost, self._lost = self._lost, {}
            if lost:
                await self._drop_lost(lost)
            self._requests.forget_old()

    # ownership

    def _taken_elsewhere(self, index: Index) -> None:
        """The bank refused what this gateway wrote: another one has the session."""
        self._lost[index] = None

    async def _drop_lost(self, lost: Iterable[Index]) -> None:
        indexes = set(lost)
        for index in indexes:
            self._endings.remove(index)
        sas = [sa for sa in self._charon.tracker.sas.values() if sa.up and sa.index_here(self._owner) in indexes]
        self.lost += len(sas)
        for sa in sas:
            log.warning("session-taken-by-another", connection=sa.connection, **sa.id.logged)
        await self._drop(sas)

    async def look(self) -> None:
        """Whether another gateway has taken sessions that are here: it said that it takes some."""
        mine = {
            sa.index_here(self._owner): sa for sa in self._charon.tracker.established() if sa.derivation is not None
        }
        indexes = list(mine)
        for first in range(0, len(indexes), BATCH):
            bundle = indexes[first : first + BATCH]
            for index, stub in zip(bundle, await self._bank.get(bundle), strict=True):
                ours = mine[index].derivation
                theirs = stub.derivation if stub is not None else None
                if theirs is not None and ours is not None and theirs.epoch > ours.epoch:
                    self._lost[index] = None

    async def foreign(self, infos: Sequence[SaInfo]) -> list[SaInfo]:
        """Of SAs that charon has and this sidecar does not know, those that are no other gateway's; the others are
        dropped. Raises BankUnavailable."""
        shared = [info for info in infos if info.local.address in self._states]
        if not shared:
            return list(infos)
        indexes = [Index(info.local.address, info.spi_i if info.initiator else info.spi_r) for info in shared]
        stubs = await self._bank.get(indexes)
        drop = {
            info.spis: IkeId.of(info.spi_i, info.spi_r, info.initiator)
            for info, stub in zip(shared, stubs, strict=True)
            if self._states[info.local.address] is Address.AWAY
            or (stub is not None and stub.derivation is not None and stub.derivation.owner != self._owner)
        }
        drop = {spis: ike_id for spis, ike_id in drop.items() if spis not in self._sessions}
        if drop:
            log.warning("sessions-of-others-dropped", sessions=len(drop))
            with contextlib.suppress(ChannelError):
                await self._charon.remove(list(drop.values()))
        return [info for info in infos if info.spis not in drop and info.spis not in self._sessions]

    async def _store(self, sas: Sequence[IkeSa]) -> bool:
        """Have the bank know the last message IDs of these."""
        for sa in sas:
            if sa.up and sa.derivation is not None:
                self._publisher.publish(sa)
        try:
            async with asyncio.timeout(YIELD_SECONDS):
                await self._writer.flush()
        except TimeoutError:
            return False
        return True

    async def _drop(self, sas: Sequence[IkeSa]) -> None:
        """Take these out of charon in silence: their sessions go on elsewhere."""
        for sa in sas:
            self._charon.tracker.forget(sa.id)
            self._forget(sa.id.spis)
            self._unpublished.pop(sa.id.spis, None)
            self._went(sa)
        try:
            async with asyncio.timeout(YIELD_SECONDS):
                await self._charon.remove([sa.id for sa in sas])
        except (TimeoutError, ChannelError) as error:
            # charon hangs, or is gone: the fence keeps it silent
            log.warning("sessions-not-dropped", sessions=len(sas), reason=str(error) or "charon hangs")
