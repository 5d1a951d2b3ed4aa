"""One drain, from its first Move to its end: which client is asked when, and what became of it.

Each gateway that sessions go to is asked for as many at a time as it finishes (bridge.gateway.pace), and all of them
for `rate` a second at most. The bank is asked about every client that was asked, so a report that is lost on its way
changes nothing. Neither the bank nor an end of an IKE_SA here keeps the clients waiting that are asked next.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import structlog

from bridge.bank.interface import BankUnavailable, StubBank
from bridge.charon.ike_sa import IkeSa, Trait, stub_sa
from bridge.charon.sa_tracker import SaTracker
from bridge.gateway.drain_state import DRAIN, ELSEWHERE, REASONS, REPORTED, Event, State
from bridge.gateway.pace import Pace, Window
from bridge.ike.stub_exchange import StubMessage, build_move, move_message_id, parse_stub_message, verify
from bridge.net.interface import Sender
from bridge.net.packet import has_marker
from bridge.service.tasks import end, spawn
from bridge.stub.stub import Index

log = structlog.get_logger()

TICK_SECONDS: Final = 0.05
ASK_SECONDS: Final = (0.5, 1.0, 2.0)
"""how long each Move waits for an answer; after the last the client is left alone"""
REMIND_SECONDS: Final = 1.0
"""between two questions to a client that moves: its report may have been lost"""
MOVE_SECONDS: Final = 30.0
"""how long a move may take"""
WINDOW: Final = 16
"""clients under way to one gateway at first, and at least: fewer than in an outage, for their own gateway lives and
none of them waits. As each that arrives makes room for one more than before, a quick gateway soon has hundreds"""
QUEUE_SECONDS: Final = 0.1
"""that a session should wait at its target: less than in an outage too, and more than a tick, so that the target always
has some"""
QUICK_SECONDS: Final = 0.1
"""a resumption that takes no longer has met a busy machine, or the wait for a tick, and no queue"""
FAILURES_SHOWN: Final = 50
BUNDLE: Final = 512
"""sessions that the bank is asked about at a time"""


class Ends(Protocol):
    """Ends what went on elsewhere (bridge.gateway.session_elsewhere)."""

    def end(self, sa: IkeSa, new: Index, ended: Callable[[bool], None]) -> None:
        """Begin to end an SA; `ended` is called with whether charon does not have it any more."""


@dataclass(slots=True, eq=False)
class Candidate:
    """A session that is to move, to the first of `targets` that its client has: gateways by name, each with an address
    by which the client may know it."""

    sa: IkeSa
    targets: list[tuple[str, str]]
    target: str = ""
    """the gateway that was named last"""
    message_id: int = 0
    """of the last Move about it; 0: none was sent"""


@dataclass(slots=True, eq=False)
class _Lane:
    """The sessions for one gateway."""

    waiting: deque[Candidate] = field(default_factory=deque)
    window: Window = field(default_factory=lambda: Window(Pace(WINDOW, WINDOW, QUEUE_SECONDS, QUICK_SECONDS)))
    late: bool = False
    """whether a client that moves has not arrived, since the last tick"""


@dataclass(slots=True, eq=False)
class _Asked:
    """A client that was sent a Move."""

    candidate: Candidate
    lane: _Lane
    sa: IkeSa
    index: Index
    move: StubMessage
    octets: bytes = field(repr=False)
    deadline: float
    again: float = 0.0
    sent: int = 0
    state: State = DRAIN.first
    reported: float | None = None
    """when its client reported that it moves"""
    tombstone: bool = False
    """the last look found one, and no mark"""
    vanished: bool = False
    """charon does not have the SA any more, and the bank does not say that the session went on elsewhere"""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a drain is to do."""

    candidates: Sequence[Candidate]
    """in the order in which they are asked"""
    left: Mapping[str, int]
    """how many sessions are none of these, by reason"""
    to: str
    rate: float
    """moves begun a second at most"""
    sessions: int
    """that this gateway has"""
    wanted: int
    """of these, that are to move"""
    sessions_at: Mapping[str, int]
    """what the gateways had at the beginning, where their sessions are evened out"""


class DrainRun:
    """Does what `plan` says. `run` is a task."""

    def __init__(
        self,
        tracker: SaTracker,
        bank: StubBank,
        sender: Sender,
        ends: Ends,
        plan: Plan,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._tracker = tracker
        self._bank = bank
        self._sender = sender
        self._ends = ends
        self._plan = plan
        self._clock = clock
        self._wall = wall
        self._began = self._begin = clock()
        self._ended: float | None = None
        self._lanes: dict[str, _Lane] = {}
        for candidate in plan.candidates:
            self._lane_of(candidate).waiting.append(candidate)
        self._asked: dict[bytes, _Asked] = {}
        self._ending: dict[bytes, _Asked] = {}
        """what went on, until charon was asked to end it here"""
        left = {(State.LEFT, reason): number for reason, number in plan.left.items()}
        self._outcomes: Counter[tuple[State, str]] = Counter(left)
        self._failures: list[dict[str, str]] = []
        self._bank_away = False
        self.stopping = False
        """no more clients are asked"""

    def _lane_of(self, candidate: Candidate) -> _Lane:
        name, _ = candidate.targets[0]
        return self._lanes.setdefault(name, _Lane())

    def _count(self, state: State) -> int:
        return sum(number for (kind, _), number in self._outcomes.items() if kind is state)

    def progress(self) -> dict[str, Any]:
        """How far it is. `moved` are those that charon was asked to end here; `ending` went on, and wait for that."""
        ended = self._clock() if self._ended is None else self._ended
        return {
            "state": "running" if self._ended is None else "stopped" if self.stopping else "done",
            "to": self._plan.to,
            "sessions": self._plan.sessions,
            "wanted": self._plan.wanted,
            "sessions_at": self._plan.sessions_at,
            "moved": self._count(State.MOVED),
            "unconfirmed": self._count(State.UNCONFIRMED),
            "left": self._count(State.LEFT),
            "failed": self._count(State.FAILED),
            "under_way": len(self._asked),
            "ending": len(self._ending),
            "outcomes": [
                {"result": str(result), "reason": reason, "sessions": number}
                for (result, reason), number in sorted(self._outcomes.items())
            ],
            "failures": self._failures,
            "seconds": round(ended - self._began, 3),
        }

    async def run(self) -> None:
        """Until all is settled."""
        collector = spawn("drain-bank", self._keep_collecting())
        try:
            while self._wants_more or self._asked or self._ending:
                now = self._clock()
                self._ask_more(now)
                for asked in list(self._asked.values()):
                    self._look_after(asked, now)
                for lane in self._lanes.values():
                    if lane.late:
                        lane.late = False
                        lane.window.pace.late()
                await asyncio.sleep(TICK_SECONDS)
        finally:
            self._ended = self._clock()
            log.info(
                "drain-ends",
                to=self._plan.to,
                moved=self._count(State.MOVED),
                unconfirmed=self._count(State.UNCONFIRMED),
                left=self._count(State.LEFT),
                failed=self._count(State.FAILED),
            )
            await end(collector)

    # who is asked

    @property
    def _wants_more(self) -> bool:
        """Whether more clients are to be asked, now or once it is known what became of others."""
        return (
            not self.stopping
            and self._went + len(self._ending) < self._plan.wanted
            and any(lane.waiting for lane in self._lanes.values())
        )

    @property
    def _went(self) -> int:
        """How many sessions went on elsewhere, as far as is known."""
        return self._count(State.MOVED) + self._count(State.UNCONFIRMED)

    def _ask_more(self, now: float) -> None:
        # a pause pays for no burst
        self._begin = max(self._begin, now - TICK_SECONDS)
        while self._begin <= now and self._wants_more and self._went + self._under_way < self._plan.wanted:
            lanes = [lane for lane in self._lanes.values() if lane.waiting and lane.window.has_room]
            if not lanes:
                return
            lane = max(lanes, key=lambda lane: len(lane.waiting))
            self._ask(lane, lane.waiting.popleft())
            self._begin += 1 / self._plan.rate

    @property
    def _under_way(self) -> int:
        return len(self._asked) + len(self._ending)

    def _ask(self, lane: _Lane, candidate: Candidate) -> None:
        sa = candidate.sa
        if self._tracker.sas.get(sa.id.spis) is not sa or sa.published is None:
            self._outcomes[(State.LEFT, REASONS[Event.VANISHED])] += 1
            return
        candidate.message_id = max(move_message_id(self._wall()), candidate.message_id + 1)
        candidate.target, address = candidate.targets.pop(0)
        octets = build_move(stub_sa(sa, sa.published), address, candidate.message_id)
        move = parse_stub_message(octets)
        asked = _Asked(candidate, lane, sa, sa.published, move, octets, self._clock() + MOVE_SECONDS)
        self._asked[sa.id.spis] = asked
        lane.window.enter(asked)

    def _look_after(self, asked: _Asked, now: float) -> None:
        if asked.vanished:
            self._on(asked, Event.VANISHED)
        elif now > asked.deadline:
            asked.lane.late = True
            self._on(asked, Event.OVERDUE)
        elif now >= asked.again:
            if asked.state is State.MOVING:
                asked.again = now + REMIND_SECONDS
            elif asked.sent < len(ASK_SECONDS):
                if asked.sent:
                    asked.lane.window.unanswered(asked)
                asked.again = now + ASK_SECONDS[asked.sent]
            else:
                self._on(asked, Event.UNANSWERED)
                return
            asked.sent += 1
            self._send(asked.sa, asked.octets)

    def _send(self, sa: IkeSa, octets: bytes) -> None:
        assert sa.local is not None
        assert sa.remote is not None
        local, remote = sa.local, sa.remote
        try:
            self._sender.send(
                local.address, local.port, remote.address, remote.port, octets, has_marker(remote.port, local.port)
            )
        except OSError as error:
            log.info("move-not-sent", peer=remote.address, reason=error.strerror, **sa.id.logged)

    # what became of them

    def moving(self, message: StubMessage) -> None:
        """A client's report, not proved yet."""
        asked = self._asked.get(message.spis)
        if asked is None or message.move is None:
            return
        sa = asked.sa
        if not verify(message, sa.suite.prf, sa.sk_d, before=asked.move):
            return
        sa.traits |= Trait.COMPANION
        event = REPORTED.get(message.move.status)
        if event is None:
            return
        candidate = asked.candidate
        if event is Event.NO_ANSWER:
            asked.lane.late = True
        if event in ELSEWHERE and event is not Event.NOT_CONFIGURED:
            # the client knows the gateway: its other address would lead to the same answer
            candidate.targets = [one for one in candidate.targets if one[0] != candidate.target]
        if event in ELSEWHERE and candidate.targets:
            event = Event.ANOTHER
        elif event is Event.MOVING and asked.state is State.ASKED:
            asked.reported = self._clock()
            asked.again = asked.reported + REMIND_SECONDS
            asked.lane.window.enter(asked)
        self._on(asked, event)

    async def _keep_collecting(self) -> None:
        while True:
            began = self._clock()
            await self._collect()
            await asyncio.sleep(max(TICK_SECONDS, self._clock() - began))

    async def _collect(self) -> None:
        """Ask the bank which sessions went on elsewhere: it knows when the target has confirmed them."""
        every = list(self._asked.values())
        try:
            for first in range(0, len(every), BUNDLE):
                await self._collect_of(every[first : first + BUNDLE])
            self._bank_away = False
        except BankUnavailable as error:
            if not self._bank_away:
                log.info(error.event, component="drain", reason=str(error))
            self._bank_away = True

    async def _collect_of(self, bundle: list[_Asked]) -> None:
        """Raises BankUnavailable."""
        gone = [self._tracker.sas.get(asked.sa.id.spis) is not asked.sa for asked in bundle]
        moved = await self._bank.moved([asked.index for asked in bundle])
        # a target of release 0.1 leaves no mark, and no process without the bank's key can leave one
        moving = [
            asked.index
            for asked, new in zip(bundle, moved, strict=True)
            if new is False and asked.state is State.MOVING
        ]
        ended = dict(zip(moving, await self._bank.ended(moving), strict=True)) if moving else {}
        for asked, vanished, new in zip(bundle, gone, moved, strict=True):
            if self._asked.get(asked.sa.id.spis) is not asked:
                # its client has reported how it ended, while the bank was asked
                continue
            if new is None:
                # the next look may say more
                continue
            if new:
                self._went_on(asked, new)
            elif vanished:
                asked.vanished = True
            elif ended.get(asked.index):
                self._tombstone(asked)

    def _tombstone(self, asked: _Asked) -> None:
        """There is no mark. At first it may only not have been there yet when the bank was asked, or the SA has just
        ended here; after that nothing is ended for it."""
        if not asked.tombstone:
            asked.tombstone = True
            return
        self._resumed(asked)
        self._on(asked, Event.UNMARKED)

    def _resumed(self, asked: _Asked) -> None:
        asked.lane.window.pace.resumed(self._clock() - asked.reported if asked.reported is not None else None)

    def _went_on(self, asked: _Asked, new: Index) -> None:
        self._resumed(asked)
        self._on(asked, Event.WENT_ON)

        def ended(done: bool) -> None:
            self._ending.pop(asked.sa.id.spis, None)
            self._on(asked, Event.ENDED if done else Event.NOT_ENDED)

        self._ends.end(asked.sa, new, ended)

    def _on(self, asked: _Asked, event: Event) -> None:
        """Something happened to a client; where that ends it, it is counted and named in the log."""
        asked.state = DRAIN.after(asked.state, event)
        if asked.state in (State.ASKED, State.MOVING):
            return
        sa = asked.sa
        self._asked.pop(sa.id.spis, None)
        asked.lane.window.leave(asked)
        if asked.state is State.NEXT:
            self._lane_of(asked.candidate).waiting.appendleft(asked.candidate)
            return
        if asked.state is State.ENDING:
            self._ending[sa.id.spis] = asked
            return
        result, reason = asked.state, REASONS[event]
        self._outcomes[(result, reason)] += 1
        identity = sa.remote_id.text if sa.remote_id else ""
        address = sa.remote.address if sa.remote else ""
        if result is State.FAILED and len(self._failures) < FAILURES_SHOWN:
            self._failures.append({"identity": identity, "address": address, "reason": reason})
        log.info("drained", result=str(result), identity=identity, peer=address, reason=reason, **sa.id.logged)
