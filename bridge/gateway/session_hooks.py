"""What happens to the sessions of this gateway, as events for the program of `hooks.session` (docs/hooks.md).

    handshake ---> established        resumed-here or taken-over <--- a session of another gateway
                        '-----------.     .------'
                  rekeyed: the same session, no event
                        .-----------'     '------.
                     ended                    moved-away

charon raises nothing for an IKE_SA that comes over its HA channel. Here every session begins with one event and ends
with one. A session keeps its name, the index that its IKE_SA at this gateway had first, when it is rekeyed, so that the
end has the name of the beginning; the stub carries the name to the gateway where the session goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from typing import Any, Final, NamedTuple

import structlog

from bridge.charon.ike_sa import IkeSa
from bridge.charon.sa_tracker import SaTracker
from bridge.charon.vici_types import SaInfo
from bridge.config import HooksConfig
from bridge.gateway.hook_program import FAILURES, HookProgram
from bridge.gateway.metrics import GatewayMetrics
from bridge.gateway.session_journal import SessionJournal
from bridge.service.tasks import end, spawn
from bridge.stub.stub import Index, Stub
from bridge.stub.types import ChildSa, Endpoint, Identity

log = structlog.get_logger()

SETTLE_SECONDS: Final = 1.0
"""that an IKE_SA that comes up has until its virtual IP and its first CHILD_SA are known"""
LOOK_SECONDS: Final = 0.05
END_SECONDS: Final = 1.0
"""after the end of an IKE_SA, until which its successor by a rekeying, or VICI's last figures, may still come"""
WATCH_SECONDS: Final = 40.0
"""that a session's previous gateway is watched for, beyond the time after which it counts as failed; more than a
sidecar that was stopped in order has for its return"""
DETECTIONS: Final = 5
"""how many times the detection's time it may take to know that a gateway failed"""
WATCH_EACH: Final = 1.0
BEAT_SECONDS: Final = 0.2
"""a heartbeat this long after the resumption is of a gateway that has received the mark of the move"""
WATCHED_MAX: Final = 50_000
"""sessions whose previous gateway is watched"""
CHILDREN_MAX: Final = 64
"""CHILD_SAs whose octets are known one by one"""


class SessionEvent(StrEnum):
    """What the program gets."""

    ESTABLISHED = "established"
    RESUMED_HERE = "resumed-here"
    TAKEN_OVER = "taken-over"
    MOVED_AWAY = "moved-away"
    ENDED = "ended"


ENDS: Final = (SessionEvent.MOVED_AWAY, SessionEvent.ENDED)


class Name(NamedTuple):
    """A session at a gateway."""

    gateway: str
    spi: bytes
    """the gateway's, of the first IKE_SA of the session there"""

    @property
    def text(self) -> str:
        return str(Index(*self))

    @property
    def facts(self) -> dict[str, str]:
        return {"gateway": self.gateway, "session": self.text}


class Octets:
    """The octets of all CHILD_SAs that a session has had, (to this gateway, from this gateway)."""

    def __init__(self) -> None:
        self._children: dict[int, tuple[int, int]] = {}
        self._ended = (0, 0)

    def put(self, info: SaInfo) -> None:
        """What VICI says of them now; a CHILD_SA that has ended is not in later reports."""
        for child in info.children:
            known = self._children.get(child.spi_in, (0, 0))
            self._children[child.spi_in] = max(known[0], child.octets_in), max(known[1], child.octets_out)
        while len(self._children) > CHILDREN_MAX:
            oldest = self._children.pop(next(iter(self._children)))
            self._ended = self._ended[0] + oldest[0], self._ended[1] + oldest[1]

    @property
    def both(self) -> tuple[int, int]:
        every = [self._ended, *self._children.values()]
        return sum(one for one, _ in every), sum(one for _, one in every)


class _Session:
    """One session here."""

    def __init__(self, name: Name, sa: IkeSa, previous: Name | None = None) -> None:
        self.name = name
        self.sa = sa
        self.previous = previous
        self.children = sa.children
        """those that it had last"""
        self.octets = Octets()
        self.begun: asyncio.Task[None] | None = None
        """tells of its beginning, a moment later"""
        self.told = False
        """of its beginning"""
        self.down = asyncio.Event()
        """VICI has reported its end, and all figures before"""
        self.moved = False
        self.to: str | None = None
        """the gateway that it moved to"""


class SessionHooks:
    """Follows the sessions of `tracker`. `address` is this gateway's own; `failed` returns whether another gateway has
    failed, which is known some `detect` seconds later; `beats` when each wrote its last heartbeat; `state` is the
    folder of the journal. Without a program none of its methods does anything."""

    def __init__(
        self,
        config: HooksConfig,
        tracker: SaTracker,
        metrics: GatewayMetrics,
        address: str | None,
        failed: Callable[[str], bool],
        beats: Mapping[str, float],
        state: str | None,
        *,
        detect: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._program = HookProgram(config.session, config.timeout, metrics) if config.session else None
        self._tracker = tracker
        self._address = address
        self._failed = failed
        self._beats = beats
        self._detect = detect
        self._clock = clock
        self._wall = wall
        self._by_spis: dict[bytes, _Session] = {}
        self._by_name: dict[Name, _Session] = {}
        self._journal = SessionJournal(state if config.session else None)
        self._tasks: set[asyncio.Task[None]] = set()
        self._watched: dict[Name, tuple[Stub, float, float]] = {}
        """sessions of other gateways that went on here, since when, and until when those gateways are watched"""
        self._watch: asyncio.Task[None] | None = None
        if self._program is not None:
            tracker.on_info = self._told
            tracker.on_lost.append(self._lost)
        metrics.expect_hooks(SessionEvent, FAILURES)

    async def close(self) -> None:
        """Hand over what is left, for a while."""
        if self._watch is not None:
            await end(self._watch)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=SETTLE_SECONDS + END_SECONDS)
        await end(*self._tasks)
        if self._program is not None:
            await self._program.close()
        await self._journal.write()

    async def run(self, reconciled: asyncio.Event) -> None:
        """Keep the journal. Once charon's IKE_SAs are known, report the end of sessions that are not among them."""
        if self._program is None:
            return
        keep = spawn("session-journal", self._journal.keep())
        try:
            await reconciled.wait()
            here = {name.text for name in self._by_name}
            for name, facts in self._journal.before():
                if name not in here:
                    self._raise_unseen(name, facts)
            await keep
        finally:
            await end(keep)

    def __len__(self) -> int:
        """How many events wait for the program."""
        return 0 if self._program is None else len(self._program)

    def status(self) -> dict[str, Any] | None:
        """For `ike-sa-sync status`."""
        return None if self._program is None else {"pending": len(self), "last_failure": self._program.last_failure}

    # what happens

    def changed(self, sa: IkeSa) -> None:
        """An IKE_SA came up or changed."""
        if self._program is None or not sa.up:
            return
        session = self._by_spis.get(sa.id.spis)
        if session is None:
            new = self._put(sa) and not sa.adopted
            session = self._by_spis[sa.id.spis]
            if new and session.name.text not in self._journal:
                session.begun = self._spawn("session-established", self._established(session))
        elif session.sa.id.spis == sa.id.spis:
            # after a recovery that failed, charon reports the same IKE_SA again
            session.sa, session.children = sa, sa.children or session.children

    def known(self, sa: IkeSa) -> None:
        """An IKE_SA is here from before the sidecar started; the program may be new."""
        if self._program is None:
            return
        self._put(sa)
        session = self._by_spis[sa.id.spis]
        if self._journal.lasts and session.name.text not in self._journal:
            self._raise(SessionEvent.ESTABLISHED, session)

    def resumed(self, sa: IkeSa, old: Stub) -> None:
        """A session goes on here as `sa`, from its `old` stub."""
        self._came(SessionEvent.RESUMED_HERE, sa, old)

    def taken_over(self, sa: IkeSa, old: Stub) -> None:
        """This gateway took over the session of another one, with the address of that gateway, as `sa`."""
        self._came(SessionEvent.TAKEN_OVER, sa, old)

    def moving_away(self, sa: IkeSa, to: str | None) -> None:
        """An IKE_SA is about to be ended, because its session went on at another gateway."""
        if (session := self._of(sa)) is not None:
            session.moved, session.to = True, to

    def gone(self, sa: IkeSa) -> None:
        """An IKE_SA ended."""
        if not sa.up or (session := self._of(sa)) is None:
            return
        self._spawn("session-ended", self._ended(session, sa))

    def down(self, info: SaInfo) -> None:
        """VICI has reported the end of an IKE_SA."""
        if (session := self._by_spis.get(info.spis)) is not None:
            session.down.set()

    def _told(self, info: SaInfo) -> None:
        if (session := self._by_spis.get(info.spis)) is not None:
            session.octets.put(info)

    def _lost(self, sas: Iterable[IkeSa]) -> None:
        """charon was restarted, and has none of these."""
        for sa in sas:
            if (session := self._of(sa)) is not None:
                session.moved = False
                self._over(session, reason="charon-restarted")

    # sessions

    def _of(self, sa: IkeSa) -> _Session | None:
        """The session of an IKE_SA; one that was here before the sidecar started is known from now on."""
        if self._program is not None and sa.up and sa.id.spis not in self._by_spis:
            self._put(sa)
        return self._by_spis.get(sa.id.spis)

    def _put(self, sa: IkeSa, previous: Name | None = None) -> bool:
        """Take in an IKE_SA; whether its session is new here."""
        sa.first_spi = sa.first_spi or sa.local_spi
        name = Name(self._name_of(sa), sa.first_spi)
        session = self._by_name.get(name)
        new = session is None
        if session is None:
            session = self._by_name[name] = _Session(name, sa, previous)
            # of a rekeying that this sidecar knew, or did not see
            new = sa.first_spi == sa.local_spi
        session.sa, session.children = sa, sa.children or session.children
        self._by_spis[sa.id.spis] = session
        return new

    def _name_of(self, sa: IkeSa) -> str:
        """This gateway's own address, also for an IKE_SA at an address that it shares: the session at the gateway that
        had that address before is another one."""
        own = self._address if sa.derivation is not None else None
        return own or sa.index_here(self._address).gateway

    def _forget(self, session: _Session) -> None:
        self._by_name.pop(session.name, None)
        self._by_spis.pop(session.sa.id.spis, None)

    def _over(self, session: _Session, reason: str | None = None) -> None:
        """A session ended here, and its beginning is told before that."""
        if self._by_name.get(session.name) is session:
            self._forget(session)
            if session.begun is not None:
                self._tell_beginning(session)
            self._raise(SessionEvent.MOVED_AWAY if session.moved else SessionEvent.ENDED, session, reason=reason)

    def _came(self, event: SessionEvent, sa: IkeSa, old: Stub) -> None:
        if self._program is None:
            return
        owner = old.derivation.owner if old.derivation is not None else ""
        previous = Name(owner or old.index.gateway, old.session_spi or old.index.spi)
        own = self._tracker.sas.get(old.spi_i + old.spi_r)
        if own is not None and own is not sa:
            self.moving_away(own, sa.index_here(self._address).gateway)
        if (before := self._by_spis.get(sa.id.spis)) is not None:
            # a session that is taken over keeps its SPIs: it was here a moment ago, and its end is not told yet
            self._over(before)
        sa.first_spi = sa.local_spi
        self._put(sa, previous)
        session = self._by_spis[sa.id.spis]
        self._raise(event, session)
        if previous.gateway != session.name.gateway and len(self._watched) < WATCHED_MAX:
            now = self._clock()
            self._watched[previous] = old, now, now + DETECTIONS * self._detect + WATCH_SECONDS
            if self._watch is None or self._watch.done():
                self._watch = spawn("previous-gateways", self._watch_gateways())

    async def _established(self, session: _Session) -> None:
        for _ in range(round(SETTLE_SECONDS / LOOK_SECONDS)):
            sa = session.sa
            if sa.children and sa.reported_at >= sa.children_at:
                break
            await asyncio.sleep(LOOK_SECONDS)
        self._tell_beginning(session)

    def _tell_beginning(self, session: _Session) -> None:
        if not session.told:
            session.told = True
            self._raise(SessionEvent.ESTABLISHED, session)

    async def _ended(self, session: _Session, sa: IkeSa) -> None:
        if session.begun is not None:
            await session.begun
        # one that was removed over the HA channel, or was rekeyed, does not go down
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(session.down.wait(), END_SECONDS)
        if session.sa is sa:
            self._over(session)
        elif session.sa.id.spis != sa.id.spis:
            self._by_spis.pop(sa.id.spis, None)

    async def _watch_gateways(self) -> None:
        """A gateway that lives reports itself that a session left it, even if it stops soon afterwards, as at the end
        of a drain. For one that failed this gateway does."""
        while self._watched:
            await asyncio.sleep(WATCH_EACH)
            now = self._clock()
            for name, (old, since, until) in list(self._watched.items()):
                if self._beats.get(name.gateway, 0.0) > since + BEAT_SECONDS or until < now:
                    del self._watched[name]
                elif self._failed(name.gateway):
                    del self._watched[name]
                    self._raise_lost(name, old)

    def _spawn(self, name: str, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = spawn(name, work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # the event

    def _raise(self, event: SessionEvent, session: _Session, *, reason: str | None = None) -> None:
        sa = session.sa
        over = event in ENDS
        facts = {
            **session.name.facts,
            "connection": sa.connection,
            "spi_i": sa.id.spi_i.hex(),
            "spi_r": sa.id.spi_r.hex(),
            **_peers(sa.local_id, sa.remote_id, sa.eap_id, sa.local, sa.remote),
            "virtual_ips": sa.remote_vips,
            "children": _children(session.children if over else sa.children),
            "established": sa.established,
            "authenticated_until": sa.authenticated_until or None,
            "previous": session.previous.facts if session.previous else None,
        }
        if over:
            self._journal.end(session.name.text)
        else:
            self._journal.begin(session.name.text, facts)
        to = session.to if event is SessionEvent.MOVED_AWAY else None
        self._call(event, facts, octets=session.octets.both, to=to, reason=reason, own=sa.id.spis)

    def _raise_lost(self, previous: Name, old: Stub) -> None:
        facts = {
            **previous.facts,
            "connection": old.connection,
            "spi_i": old.spi_i.hex(),
            "spi_r": old.spi_r.hex(),
            **_peers(old.local_id, old.remote_id, old.eap_id, old.local, old.remote),
            "virtual_ips": old.remote_vips,
            "children": _children(old.children),
            "established": old.established,
            "authenticated_until": old.authenticated_until or None,
            "previous": None,
        }
        self._call(SessionEvent.ENDED, facts, reason="gateway-failed")

    def _raise_unseen(self, name: str, facts: Mapping[str, Any]) -> None:
        """A session ended while no sidecar ran."""
        self._journal.end(name)
        self._call(SessionEvent.ENDED, facts, reason="sidecar-was-away")

    def _call(
        self,
        event: SessionEvent,
        facts: Mapping[str, Any],
        *,
        octets: tuple[int | None, int | None] = (None, None),
        to: str | None = None,
        reason: str | None = None,
        own: bytes = b"",
    ) -> None:
        """Have the program called; `own` is the IKE_SA of the session, by both SPIs, if it is one of this gateway."""
        assert self._program is not None
        now, addresses = round(self._wall(), 3), facts["virtual_ips"]

        def build() -> dict[str, Any]:
            in_use = [address for address in addresses if self._has(address, own)]
            ends = {"octets_in": octets[0], "octets_out": octets[1], "to": to, "reason": reason}
            return {"event": str(event), "time": now, **facts, "virtual_ips_in_use": in_use, **ends}

        # the end of the session that had an address comes before the start of the next
        self._program.call(addresses[0] if addresses else facts["session"], str(event), build)

    def _has(self, address: str, own: bytes) -> bool:
        """Whether another IKE_SA here than `own` has an address; not one whose client has yet to confirm it."""
        for spis in self._tracker.virtual_ips.holders([address]) - {own}:
            sa = self._tracker.sas.get(spis)
            if sa is None or sa.up:
                return True
        return False


def _peers(
    local_id: Identity | None,
    remote_id: Identity | None,
    eap_id: Identity | None,
    local: Endpoint | None,
    remote: Endpoint | None,
) -> dict[str, Any]:
    return {
        "local_id": local_id.text if local_id else None,
        "remote_id": remote_id.text if remote_id else None,
        "eap_id": eap_id.text if eap_id else None,
        "local": {"address": local.address, "port": local.port} if local else None,
        "remote": {"address": remote.address, "port": remote.port} if remote else None,
    }


def _children(children: Iterable[ChildSa]) -> list[dict[str, Any]]:
    return [
        {
            "name": child.name,
            "local_ts": [selector.text for selector in child.local_ts],
            "remote_ts": [selector.text for selector in child.remote_ts],
        }
        for child in children
    ]
