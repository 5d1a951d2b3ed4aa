"""Sessions from the moment that charon is given them until all is as if they had always been here: their CHILD_SAs get
new keys, and their message IDs are found. Also what their clients send meanwhile, and what becomes of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Final

import structlog

from bridge.charon.charon import Charon
from bridge.charon.ha_channel import ChannelError
from bridge.charon.ha_message import IkeId
from bridge.charon.ike_sa import IkeSa
from bridge.charon.vici_types import SaInfo
from bridge.gateway import takeover_session as reasons
from bridge.gateway.takeover_rekeys import OFFSETS, TakeoverRekeys
from bridge.gateway.takeover_requests import TakeoverRequests
from bridge.gateway.takeover_session import Session
from bridge.gateway.takeover_state import Event, State
from bridge.net.interface import Sender
from bridge.net.packet import Datagram
from bridge.net.shared_esp import SharedEsp
from bridge.service.tasks import spawn
from bridge.stub.stub import Stub

log = structlog.get_logger()

ACTIVE_MAX: Final = 100_000
"""SPIs that are remembered: anyone can send ESP on any"""
LISTEN_SECONDS: Final = 0.02
"""between two looks at who sends ESP"""
FORGET_SECONDS: Final = 5.0
"""between two looks for sessions whose clients need not be overheard any more"""
UNDER_WAY: Final = frozenset((State.INSTALLING, State.REKEYING))


class TakenSessions:
    """By both SPIs. `again` sends a datagram to charon as its client sent it. `done` is called with a session that has
    new keys, or whose client does not answer."""

    def __init__(
        self, charon: Charon, again: Sender, esp: SharedEsp, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.done: Callable[[Session], None] = lambda _: None
        self.active: set[int] = set()
        """SPIs, as on the wire, that clients send ESP on"""
        self._expected = 0
        """takeovers of addresses that are under way"""
        self._listening = asyncio.Event()
        self._charon = charon
        self._esp = esp
        self._clock = clock
        self._sessions: dict[bytes, Session] = {}
        self._between: dict[bytes, Session] = {}
        """sessions whose IKE_SA was rekeyed before its CHILD_SAs had new keys, and is gone before the new one is up"""
        self._by_child: dict[int, Session] = {}
        """sessions whose CHILD_SAs have yet to get new keys, by the SPIs of these: charon moves them to a new IKE_SA"""
        self._rekeys = TakeoverRekeys(charon, self._rekeyed, clock=clock)
        self._requests = TakeoverRequests(charon, again, clock=clock)

    def __contains__(self, spis: bytes) -> bool:
        return spis in self._sessions

    def get(self, spis: bytes) -> Session | None:
        """The session with these SPIs."""
        return self._sessions.get(spis)

    def has(self, session: Session) -> bool:
        """Whether it is still here."""
        return self._sessions.get(session.sa.id.spis) is session

    def spis(self) -> set[bytes]:
        """Those of all of them."""
        return set(self._sessions)

    def under_way(self, address: str) -> int:
        """How many at an address have yet to get new keys."""
        return sum(
            1
            for session in self._sessions.values()
            if session.state in UNDER_WAY and session.stub.index.gateway == address
        )

    def start(self) -> list[asyncio.Task[None]]:
        """The tasks that rekey CHILD_SAs, first those of clients that send something."""
        return [
            spawn("takeover-rekeys", self._rekeys.run()),
            spawn("takeover-esp", self._listen()),
            spawn("takeover-forget", self._forget_old()),
        ]

    def close(self) -> None:
        """After the tasks ended."""
        self._esp.close()

    # from installation to new keys

    def put(self, session: Session) -> None:
        """One that charon is given now."""
        session.sa.up = False
        self._charon.tracker.adopt(session.sa)
        self._sessions[session.sa.id.spis] = session
        self._requests.watch(session)

    def refused(self, session: Session) -> None:
        """charon did not take it."""
        session.on(Event.REFUSED)
        self._charon.tracker.forget(session.sa.id)
        self.forget(session.sa.id.spis)

    def recovered(self, stub: Stub, sa: IkeSa, unique_id: str) -> None:
        """One that charon has, and that this gateway took over before the sidecar was restarted: its CHILD_SAs may
        have keys that no host knows."""
        session = Session(stub, sa, None, self._clock(), unique_id=unique_id)
        session.on(Event.INSTALLED)
        self._sessions[sa.id.spis] = session
        self._requests.watch(session)
        # a request of charon may be on its way, which charon itself repeats: its message ID is left alone
        self._await_keys(session, offsets=())

    def installed(self, session: Session, info: SaInfo) -> None:
        """charon has it."""
        session.unique_id = session.sa.unique_id = info.unique_id
        session.on(Event.INSTALLED)
        self._charon.tracker.has_come_up(session.sa)

    def begin(self, session: Session) -> None:
        """Rekey its CHILD_SAs, and answer what its client sent meanwhile."""
        self._await_keys(session)
        self._listening.set()
        self._requests.judge(session)

    def _await_keys(self, session: Session, offsets: Sequence[int] = OFFSETS) -> None:
        self._by_child |= dict.fromkeys((child.spi_in for child in session.stub.children), session)
        self._rekeys.put(session, offsets)

    def _have_keys(self, session: Session) -> None:
        for child in session.stub.children:
            if self._by_child.get(child.spi_in) is session:
                del self._by_child[child.spi_in]

    def _rekeyed(self, session: Session, reason: str) -> None:
        if session.state is State.TAKEN_OVER:
            self._have_keys(session)
            log.info("takeover-rekeyed", ms=round((self._clock() - session.began) * 1000, 1), **session.sa.id.logged)
        if reason == reasons.SILENT and session.heard:
            reason = reasons.NOT_ANSWERED
        if reason:
            log.warning("takeover-incomplete", reason=reason, **session.sa.id.logged)
        if reason in (reasons.CHILD_LOST, reasons.REFUSES_KEYS):
            spawn("takeover-end", self._end(session))
        elif reason == reasons.NOT_ANSWERED:
            # a DELETE would not be accepted either, and answers to its liveness checks hide that its traffic is lost
            spawn("takeover-end", self._remove(session))
        self.done(session)

    async def _end(self, session: Session) -> None:
        try:
            await self._charon.end_surely(session.sa)
        except ChannelError as error:
            log.warning("sa-not-ended", reason=str(error), **session.sa.id.logged)

    async def _remove(self, session: Session) -> None:
        try:
            await self._charon.remove([session.sa.id])
        except ChannelError as error:
            log.warning("sa-not-ended", reason=str(error), **session.sa.id.logged)
        else:
            self._charon.tracker.end(session.sa.id)

    # what happens meanwhile

    def heard(self, requests: Sequence[Datagram]) -> None:
        """Clients sent requests to a shared address."""
        for session in self._requests.overheard(requests):
            self._rekeys.first(session.sa.id.spis)

    def expect(self, wanted: bool) -> None:
        """Whether more sessions are to come: who sends ESP is of interest before charon has them, too."""
        self._expected += 1 if wanted else -1
        self._listening.set()

    async def _listen(self) -> None:
        """Have those sessions be first whose clients send ESP."""
        while True:
            await self._listening.wait()
            self._listening.clear()
            self._esp.open()
            while self._expected or self._rekeys.some_wait.is_set():
                for spi in self._esp.read():
                    if len(self.active) < ACTIVE_MAX:
                        self.active.add(spi)
                    self._rekeys.first_by_spi(spi)
                await asyncio.sleep(LISTEN_SECONDS)
            self._esp.close()
            self.active.clear()

    def changed(self, sa: IkeSa) -> None:
        """An SA of this gateway changed."""
        session = self._at(sa) if sa.up else None
        if session is None or sa.id.spis in {session.sa.id.spis, *session.earlier}:
            self._rekeys.changed(sa)
        else:
            self._follow(session, sa)

    def _at(self, sa: IkeSa) -> Session | None:
        """The session whose CHILD_SAs without new keys are at an IKE_SA."""
        found = (self._by_child.get(child.spi_in) for child in sa.children)
        return next((one for one in found if one is not None and one.sa.remote_id == sa.remote_id), None)

    def _follow(self, session: Session, sa: IkeSa) -> None:
        """Its IKE_SA was rekeyed, to this one."""
        old = session.sa.id.spis
        self._sessions.pop(old, None)
        self._between.pop(old, None)
        self._leave(old)
        session.follow(sa)
        self._sessions[sa.id.spis] = session
        self._rekeys.put(session)
        self._listening.set()

    def verified(self, ike_id: IkeId) -> None:
        """A request of a client verified."""
        self._requests.verified(ike_id.spis)
        session = self._sessions.get(ike_id.spis)
        if session is not None and session.state is State.LEFT and not session.heard:
            # it lives: once more, from its beginning
            session.heard, session.waits_since = True, None
            session.on(Event.HEARD)
            self._rekeys.put(session)

    def gone(self, sa: IkeSa) -> None:
        """An SA of this gateway ended."""
        session = self._sessions.get(sa.id.spis)
        if session is not None and session.sa is sa and session.state in (State.REKEYING, State.LEFT):
            if self._charon.tracker.heirs(sa):
                # where both sides rekeyed it, one of several will be up
                self._between[sa.id.spis] = self._sessions.pop(sa.id.spis)
                self._leave(sa.id.spis)
                return
            if self._by_child and (heir := self._heir(session)) is not None:
                self._follow(session, heir)
                return
        self.forget(sa.id.spis)

    def _heir(self, session: Session) -> IkeSa | None:
        """Where its CHILD_SAs are, if its IKE_SA was one of two new ones, and the other one stays."""
        others = (sa for sa in self._charon.tracker.established() if sa.id != session.sa.id)
        return next((sa for sa in others if self._at(sa) is session), None)

    def lost(self) -> None:
        """charon was restarted: it has none of them."""
        for spis in [*self._sessions, *self._between]:
            self.forget(spis)

    def forget(self, spis: bytes) -> None:
        """It is not here any more."""
        session = self._sessions.pop(spis, None) or self._between.pop(spis, None)
        if session is not None:
            self._have_keys(session)
            if session.state is not State.GONE:
                session.on(Event.ENDED)
        self._leave(spis)

    async def _forget_old(self) -> None:
        while True:
            await asyncio.sleep(FORGET_SECONDS)
            self._requests.forget_old()
            for spis in [spis for spis, one in self._between.items() if not self._charon.tracker.heirs(one.sa)]:
                # none of them came up
                self.forget(spis)

    def sent(self, sa: IkeSa) -> None:
        """charon sent a request on an SA."""
        self._rekeys.sent(sa.id.spis)

    def _leave(self, spis: bytes) -> None:
        self._rekeys.forget(spis)
        self._requests.forget(spis)
