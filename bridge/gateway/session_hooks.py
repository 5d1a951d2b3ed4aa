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
from collections.abc import Iterable
from typing import Any, Final

from bridge.charon.ike_sa import IkeSa
from bridge.charon.sa_tracker import SaTracker
from bridge.charon.vici_types import SaInfo
from bridge.config import HooksConfig
from bridge.gateway.hook_program import FAILURES, HookProgram
from bridge.gateway.hook_report import HookReport, SessionEvent
from bridge.gateway.hook_session import Name, Session
from bridge.gateway.metrics import GatewayMetrics
from bridge.gateway.previous_gateways import PreviousGateways
from bridge.gateway.session_journal import SessionJournal
from bridge.service.metrics import Metrics
from bridge.service.tasks import end, spawn
from bridge.stub.stub import Stub

SETTLE_SECONDS: Final = 1.0
"""that an IKE_SA that comes up has until its virtual IP and its first CHILD_SA are known"""
LOOK_SECONDS: Final = 0.05
END_SECONDS: Final = 1.0
"""after the end of an IKE_SA, until which its successor by a rekeying, or VICI's report, may still come"""
COUNT_SECONDS: Final = 5.0
"""after VICI's report that an IKE_SA ended, until which those of its CHILD_SAs may still come: charon makes them after
that, with the last figures, and runs updown scripts in between"""


class SessionHooks:
    """Follows the sessions of `tracker`. `address` is this gateway's own, `state` the folder of the journal. Without a
    program none of its methods does anything."""

    def __init__(
        self,
        config: HooksConfig,
        tracker: SaTracker,
        metrics: GatewayMetrics,
        address: str | None,
        previous: PreviousGateways,
        state: str | None,
    ) -> None:
        self._program = HookProgram(config.session, config.timeout, metrics) if config.session else None
        self._tracker = tracker
        self._address = address
        self._previous = previous
        self._by_spis: dict[bytes, Session] = {}
        self._by_name: dict[Name, Session] = {}
        self._journal = SessionJournal(state if config.session else None)
        self._tasks: set[asyncio.Task[None]] = set()
        if self._program is not None:
            self._report = HookReport(self._program, self._journal, tracker)
            previous.on_lost = self._report.lost
            tracker.on_info.append(self._told)
            tracker.on_child_down.append(self._child_down)
            tracker.on_lost.append(self._lost)
        metrics.expect_hooks(SessionEvent, FAILURES)

    async def close(self) -> None:
        """Hand over what is left, for a while."""
        await self._previous.close()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=SETTLE_SECONDS + END_SECONDS + COUNT_SECONDS)
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
                    self._report.unseen(name, facts)
            await keep
        finally:
            await end(keep)

    def gauges(self, metrics: Metrics) -> None:
        """How many events wait, for `status`."""
        metrics.gauge("hook_pending", "events of sessions that wait for hooks.session", lambda: len(self))

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
            self._report.raised(SessionEvent.ESTABLISHED, session)

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
            session.check_counted()

    def _child_down(self, info: SaInfo) -> None:
        if (session := self._by_spis.get(info.spis)) is not None:
            session.octets.put_last(info)
            session.check_counted()

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

    def _of(self, sa: IkeSa) -> Session | None:
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
            session = self._by_name[name] = Session(name, sa, previous)
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

    def _forget(self, session: Session) -> None:
        self._by_name.pop(session.name, None)
        self._by_spis.pop(session.sa.id.spis, None)

    def _over(self, session: Session, reason: str | None = None) -> None:
        """A session ended here, and its beginning is told before that."""
        if self._by_name.get(session.name) is session:
            self._forget(session)
            if session.begun is not None:
                self._tell_beginning(session)
            self._report.raised(
                SessionEvent.MOVED_AWAY if session.moved else SessionEvent.ENDED, session, reason=reason
            )

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
        self._report.raised(event, session)
        if previous.gateway != session.name.gateway:
            self._previous.watch(previous, old)

    async def _established(self, session: Session) -> None:
        for _ in range(round(SETTLE_SECONDS / LOOK_SECONDS)):
            sa = session.sa
            if sa.children and sa.reported_at >= sa.children_at:
                break
            await asyncio.sleep(LOOK_SECONDS)
        self._tell_beginning(session)

    def _tell_beginning(self, session: Session) -> None:
        if not session.told:
            session.told = True
            self._report.raised(SessionEvent.ESTABLISHED, session)

    async def _ended(self, session: Session, sa: IkeSa) -> None:
        if session.begun is not None:
            await session.begun
        # one that was removed over the HA channel, or was rekeyed, does not go down
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(session.down.wait(), END_SECONDS)
            await asyncio.wait_for(session.counted.wait(), COUNT_SECONDS)
        if session.sa is sa:
            self._over(session)
        elif session.sa.id.spis != sa.id.spis:
            self._by_spis.pop(sa.id.spis, None)

    def _spawn(self, name: str, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = spawn(name, work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
