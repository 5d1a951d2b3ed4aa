"""New keys for the CHILD_SAs of sessions that were taken over: charon rekeys them, some at a time, first those whose
clients send something.

charon looks at all its IKE_SAs for each VICI command. Where many wait, it is asked for those of a whole HA segment with
one message (RESYNC), as long as these are at least half of the segment's: the others' CHILD_SAs are rekeyed too.

The message ID of the gateway's request comes from the stub, which may be a moment older than what the dead gateway
sent. A client ignores a request under another ID than it expects; so the request goes out again under the next ones,
and then under the one before. The one before comes last: a client that has answered it already would answer again, and
charon ends an IKE_SA whose answer is of another exchange.

A client that is rekeying the IKE_SA by itself answers TEMPORARY_FAILURE (RFC 7296 section 2.25). charon reports neither
that nor any other refusal, but then it awaits no answer any more: VICI shows that. Such a client is asked again.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Final

import structlog

from bridge.charon.charon import Charon
from bridge.charon.ha_channel import ChannelError
from bridge.charon.ha_message import HaError
from bridge.charon.ike_sa import IkeSa
from bridge.charon.vici_types import ViciError
from bridge.gateway.takeover_session import CHILD_LOST, REFUSES_KEYS, SILENT, Session
from bridge.gateway.takeover_state import Event, State
from bridge.stub.child_sa import wire_spi

log = structlog.get_logger()

OFFSETS: Final = (1, 2, -1)
"""from the stub's message ID, tried in this order"""
FIRST_SETTABLE: Final = 1
"""charon ignores the message that sets 0"""
ANSWER_SECONDS: Final = 1.0
"""that a client has for each; it is asked once a second where charon's own retransmission comes later"""
REFUSAL_SECONDS: Final = 30.0
"""that a client may refuse new keys: as long as it may take to rekey the IKE_SA by itself"""
OUTSTANDING: Final = 128
"""sessions whose clients have yet to answer, at most: what waits longer than their retransmissions costs more"""
AT_A_TIME: Final = 16
"""sessions that charon is asked about over one connection: afterwards others may be first"""
MANY: Final = 256
"""waiting sessions from which on charon is asked for whole segments"""
GROUP: Final = 16
"""waiting sessions of a segment at least"""
COUNT_SECONDS: Final = 0.5
"""between two counts of the IKE_SAs in each segment"""
TICK_SECONDS: Final = 0.05


class TakeoverRekeys:
    """`put` sessions that charon has; `run` is a task. `done` is called with each that has left State.REKEYING, and
    with the reason where its client is silent."""

    def __init__(
        self, charon: Charon, done: Callable[[Session, str], None], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._charon = charon
        self._done = done
        self._clock = clock
        self._waiting: OrderedDict[bytes, Session] = OrderedDict()
        self._in_segment: defaultdict[int, dict[bytes, Session]] = defaultdict(dict)
        """those that wait, by segment"""
        self._present: Counter[int] = Counter()
        """the established IKE_SAs of each segment, when they were last counted"""
        self._counted = float("-inf")
        self._by_spi: dict[int, bytes] = {}
        """of those that wait, by the SPIs that their clients send ESP on"""
        self._asked: dict[bytes, Session] = {}
        self._left: dict[bytes, Session] = {}
        """left to their clients, which may rekey by themselves"""
        self.some_wait = asyncio.Event()
        """while sessions wait to be rekeyed"""
        self._wake = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting) + len(self._asked)

    def put(self, session: Session, offsets: Sequence[int] = OFFSETS) -> None:
        """One that charon has now; those without CHILD_SAs are ready. `offsets` from the stub's message ID are tried
        where its client does not answer."""
        self._left.pop(session.sa.id.spis, None)
        session.offsets, session.tried = [] if session.id_known else list(offsets), False
        session.refuses_since, session.unkeyed = None, len(session.left)
        self._waiting[session.sa.id.spis] = session
        self._in_segment[self._segment(session)][session.sa.id.spis] = session
        if session.request is not None:
            self._waiting.move_to_end(session.sa.id.spis, last=False)
        for child in session.stub.children:
            self._by_spi[wire_spi(child.spi_in)] = session.sa.id.spis
        self._wake.set()
        self.some_wait.set()

    def first(self, spis: bytes) -> None:
        """The client of this session sent something, and waits for an answer."""
        if spis in self._waiting:
            self._waiting.move_to_end(spis, last=False)

    def first_by_spi(self, spi: int) -> None:
        """A client sent ESP on this SPI."""
        if (spis := self._by_spi.get(spi)) is not None:
            self.first(spis)

    def sent(self, spis: bytes) -> None:
        """charon sent a request on an SA."""
        session = self._asked.get(spis)
        if session is not None:
            session.waits_since, session.sent = self._clock(), True

    def changed(self, sa: IkeSa) -> None:
        """CHILD_SAs of an SA came or went."""
        session = self._asked.get(sa.id.spis) or self._left.get(sa.id.spis)
        if session is not None and session.sa is sa:
            self._look(session)

    def forget(self, spis: bytes) -> None:
        """It is gone."""
        self._no_longer_waits(spis)
        self._asked.pop(spis, None)
        self._left.pop(spis, None)

    def _no_longer_waits(self, spis: bytes) -> None:
        session = self._waiting.pop(spis, None)
        if session is not None:
            self._in_segment[self._segment(session)].pop(spis, None)
            for child in session.stub.children:
                self._by_spi.pop(wire_spi(child.spi_in), None)
        if not self._waiting:
            self.some_wait.clear()

    async def run(self) -> None:
        """Ask, and look after those that were asked."""
        while True:
            if not self._waiting and not self._asked:
                self._wake.clear()
                await self._wake.wait()
            if len(self._asked) < OUTSTANDING and len(self._waiting) >= MANY and (group := self._group()):
                await self._ask_segment(group)
                continue
            room = OUTSTANDING - len(self._asked)
            chosen = list(islice(self._waiting.values(), max(0, min(room, AT_A_TIME))))
            for session in chosen:
                self._no_longer_waits(session.sa.id.spis)
            self._asked |= {session.sa.id.spis: session for session in chosen}
            await self._ask(chosen)
            if self._waiting and len(self._asked) < OUTSTANDING:
                continue
            await self._look_after()
            await asyncio.sleep(TICK_SECONDS)

    def _group(self) -> list[Session]:
        """The waiting sessions of the segment that is next, if charon is to be asked for all of it."""
        segment = self._segment(next(iter(self._waiting.values())))
        group = self._in_segment[segment]
        if len(group) < GROUP:
            return []
        if (now := self._clock()) >= self._counted + COUNT_SECONDS:
            self._counted = now
            addresses = (sa.remote.address for sa in self._charon.tracker.established() if sa.remote is not None)
            self._present = Counter(map(self._charon.landing.segment_of, addresses))
        return list(group.values()) if 2 * len(group) >= self._present[segment] else []

    def _segment(self, session: Session) -> int:
        return self._charon.landing.segment_of(session.stub.remote.address)

    async def _ask_segment(self, group: Sequence[Session]) -> None:
        now = self._clock()
        for session in group:
            self._no_longer_waits(session.sa.id.spis)
            self._asked[session.sa.id.spis] = session
            session.waits_since, session.sent = now, False
        segment = self._segment(group[0])
        log.info("takeover-rekeys-segment", segment=segment, sessions=len(group))
        try:
            await self._charon.installer.resync({segment})
        except ChannelError as error:
            # each of them is asked for once its second is over
            log.warning("takeover-rekey-refused", reason=str(error))

    async def _ask(self, sessions: Sequence[Session]) -> None:
        wanted = [(session, name) for session in sessions for name in dict.fromkeys(session.left)]
        for session in sessions:
            session.sent = False
            if not session.left:
                self._look(session)
        if not wanted:
            return
        try:
            said = await self._charon.vici.rekey_children([(session.unique_id, name) for session, name in wanted])
        except ViciError as error:
            said = [str(error)] * len(wanted)
        for (session, name), reason in zip(wanted, said, strict=True):
            session.refused = bool(reason)
            if reason:
                # the SA is gone, its client has rekeyed the CHILD_SA already, or charon does not answer
                log.info("takeover-rekey-refused", reason=reason, child=name, **session.sa.id.logged)
            # where charon's word that it sent something is lost, the time counts from here
            session.waits_since = session.waits_since or self._clock()

    async def _look_after(self) -> None:
        late = [session for session in self._asked.values() if self._late(session)]
        if late:
            # what charon has said meanwhile
            self._charon.channel.receive()
        refusing = await self._refusing([session for session in late if session.sent])
        for session in late:
            if self._asked.get(session.sa.id.spis) is not session or not self._late(session):
                continue
            if session in refusing or (session.refuses_since is not None and not session.sent):
                await self._ask_again(session)
            else:
                await self._try_next(session)

    def _late(self, session: Session) -> bool:
        return session.waits_since is not None and self._clock() - session.waits_since >= ANSWER_SECONDS

    async def _refusing(self, sessions: Sequence[Session]) -> list[Session]:
        """Those whose clients have answered charon's request without new keys."""
        if not sessions:
            return []
        try:
            tasks = await self._charon.vici.tasks([session.unique_id for session in sessions])
        except ViciError as error:
            log.warning("takeover-tasks-not-listed", reason=str(error))
            return []
        # the new keys may have come while it answered
        self._charon.channel.receive()
        return [session for session, open_tasks in zip(sessions, tasks, strict=True) if not open_tasks and session.left]

    async def _ask_again(self, session: Session) -> None:
        """Its client is busy with the IKE_SA itself, or wants no new keys at all."""
        now = self._clock()
        session.waits_since, session.offsets, session.tried, session.id_known = now, [], False, True
        if session.refuses_since is None:
            session.refuses_since = now
            log.info("takeover-rekey-not-accepted", children=session.left, **session.sa.id.logged)
        if now - session.refuses_since < REFUSAL_SECONDS:
            await self._ask([session])
            return
        self._asked.pop(session.sa.id.spis, None)
        session.on(Event.SILENT)
        self._left[session.sa.id.spis] = session
        self._done(session, REFUSES_KEYS)

    async def _try_next(self, session: Session) -> None:
        derivation = session.stub.derivation
        assert derivation is not None
        offset = session.offsets.pop(0) if session.offsets else None
        if session.refused and offset is not None:
            # nothing was sent under the message ID before: once more as it was
            session.waits_since = self._clock()
            await self._ask([session])
            return
        if offset is not None and derivation.next_request + offset < FIRST_SETTABLE:
            offset = None
        if offset is None:
            self._asked.pop(session.sa.id.spis, None)
            if session.tried and derivation.next_request >= FIRST_SETTABLE:
                await self._set_next_id(session, derivation.next_request)
            if session.state is State.REKEYING:
                session.on(Event.SILENT)
                self._left[session.sa.id.spis] = session
                self._done(session, SILENT)
            return
        session.waits_since, session.tried = self._clock(), True
        number = derivation.next_request + offset
        log.info("takeover-message-id-tried", message_id=number, **session.sa.id.logged)
        if await self._set_next_id(session, number):
            # charon has put its request back, and sends it when it is asked for something
            await self._ask([session])

    async def _set_next_id(self, session: Session, number: int) -> bool:
        try:
            await self._charon.installer.set_next_id(session.sa.id, number, own=True)
            await self._charon.channel.drained()
        except (ChannelError, HaError) as error:
            log.warning("takeover-message-id-not-set", reason=str(error), **session.sa.id.logged)
            return False
        return True

    def _look(self, session: Session) -> None:
        before, session.unkeyed = session.unkeyed, len(session.left)
        if session.left:
            if session.unkeyed < before:
                # it refuses the next one no longer than it may
                session.refuses_since = None
            # one of several: the next one's request has its own second
            session.waits_since = self._clock()
            if len(session.left) < len(session.stub.children):
                # the client has answered: its message ID is known, and charon repeats what is lost
                session.offsets, session.tried = [], False
            return
        self._asked.pop(session.sa.id.spis, None)
        self._left.pop(session.sa.id.spis, None)
        if session.state in (State.REKEYING, State.LEFT):
            session.on(Event.REKEYED)
            self._done(session, CHILD_LOST if session.lost else "")
