"""Draining: clients of this gateway are asked to go on at another one, while this one lives (the load-balance scenario
of draft-xu-ike-sa-sync-01).

With `until_even` only a surplus moves: as many sessions as this gateway has more than the mean of all that could
resume some of them, and as the target has less. So several gateways can give some to one that returned, in any order or
at the same time, and none of them ends below the mean.

A target that could resume none of the sessions is refused before any client is asked: one without a heartbeat, without
a bank key of this gateway's, or without the sessions' connections. Sessions that it could not resume are left alone.

Each chosen client gets a Move (bridge.ike.stub_exchange). One whose sidecar answers resumes at the target; when the
bank says that the session went on there, its IKE_SA here is ended. One without a sidecar notices nothing. The states
of a client are those of bridge.gateway.drain_state.

The bank is asked about every client that was asked, so a report that is lost on its way changes nothing.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import structlog

from bridge.bank.interface import BankUnavailable, StubBank
from bridge.charon.charon import Charon
from bridge.charon.ike_sa import IkeSa, Trait, stub_sa
from bridge.config import canonical_address
from bridge.gateway.drain_state import DRAIN, ELSEWHERE, REASONS, REPORTED, Event, State
from bridge.gateway.other_gateways import OtherGateways, order
from bridge.gateway.session_elsewhere import SessionElsewhere
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
RATE: Final = 50.0
"""moves begun a second, by default"""
FAILURES_SHOWN: Final = 50
ALREADY: Final = {"error": "this gateway is being drained already"}
ANY: Final = "any"
"""target: each session goes to one of the living gateways, shared by rendezvous hashing"""
HERE: Final = "this gateway"
"""its name where it has no address in the configuration"""
BUNDLE: Final = 512
"""sessions that the bank is asked about at a time"""


@dataclass(slots=True, eq=False)
class _Waiting:
    """A session that is to move, to the first of `targets` that its client has: gateways by name, each with an address
    by which the client may know it."""

    sa: IkeSa
    targets: list[tuple[str, str]]
    target: str = ""
    """the gateway that was named last"""
    message_id: int = 0
    """of the last Move about it; 0: none was sent"""


@dataclass(slots=True, eq=False)
class _Asked:
    """A client that was sent a Move."""

    waiting: _Waiting
    sa: IkeSa
    index: Index
    move: StubMessage
    octets: bytes = field(repr=False)
    deadline: float
    again: float = 0.0
    sent: int = 0
    state: State = DRAIN.first
    vanished: bool = False
    """charon does not have the SA any more, and the bank does not say that the session went on elsewhere"""


@dataclass(slots=True, eq=False)
class _Run:
    """One drain, from its start to its end."""

    to: str
    rate: float
    began: float
    sessions: int
    wanted: int
    waiting: deque[_Waiting]
    sessions_at: dict[str, int] = field(default_factory=dict)
    """what the gateways had at the beginning, where their sessions are evened out"""
    asked: dict[bytes, _Asked] = field(default_factory=dict)
    outcomes: Counter[tuple[State, str]] = field(default_factory=Counter)
    failures: list[dict[str, str]] = field(default_factory=list)
    stopping: bool = False
    ended: float | None = None

    def count(self, state: State) -> int:
        return sum(number for (kind, _), number in self.outcomes.items() if kind is state)


def surplus(sessions_at: Mapping[str, int], here: str, there: str) -> int:
    """How many sessions of `here` go to `there`, so that neither crosses the mean of all."""
    mean = sum(sessions_at.values()) / len(sessions_at)
    return max(math.floor(min(sessions_at[here] - mean, mean - sessions_at[there])), 0)


class Drain:
    """Drains this gateway, one run at a time. Its coroutines are commands of the control socket."""

    def __init__(
        self,
        charon: Charon,
        bank: StubBank,
        sender: Sender,
        address: str | None,
        elsewhere: SessionElsewhere,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._charon = charon
        self._bank = bank
        self._sender = sender
        self._address = address
        self._elsewhere = elsewhere
        self._clock = clock
        self._wall = wall
        self._run: _Run | None = None
        self._task: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """End without waiting for any client."""
        if self._task is not None:
            await end(self._task)

    @property
    def _under_way(self) -> bool:
        return self._task is not None and not self._task.done()

    # commands

    async def start(self, request: dict[str, Any]) -> dict[str, Any]:
        """Begin. `to`: address of the target, or ANY; `share` of the sessions, `rate`: moves begun a second,
        `until_even`: the surplus over the mean of the gateways instead of a share; `shared` false: no session at an
        address that gateways share, since another gateway takes it over as it is; `instead`: of one that goes on."""
        if request.get("instead") and self._task is not None:
            # clients that move already say so when they are asked again
            await end(self._task)
        if self._under_way:
            return ALREADY
        to = request["to"] if request["to"] == ANY else canonical_address(request["to"])
        sas = [sa for sa in self._charon.tracker.established() if sa.resumable and sa.published and sa.remote]
        if not request.get("shared", True):
            sas = [sa for sa in sas if sa.derivation is None]
        if to == self._address or any(sa.local is not None and sa.local.address == to for sa in sas):
            return {"error": f"{to} is this gateway"}
        try:
            others = await OtherGateways.ask(self._bank, self._address)
        except BankUnavailable as error:
            return {"error": f"the bank does not answer, and no session can move without it: {error}"}
        if others.without_heartbeat:
            return {"error": "the bank takes no writes now, and no session can move without: see `ike-sa-sync status`"}
        to = to if to in others.facts else others.named(to)
        if to in others.other_keys:
            return {"error": f"{to} has another bank key, and could open no stub of this gateway: copy the key file"}
        if to == ANY and not others.facts:
            return {"error": "no other gateway lives that has a bank key of this one"}
        if to != ANY and to not in others.facts:
            alive = ", ".join(sorted([*others.facts, *others.other_keys]))
            return {"error": f"no gateway lives at {to}; others that do: {alive or 'none'}"}
        waiting: list[_Waiting] = []
        lacking: Counter[str] = Counter()
        for sa in sas:
            assert sa.published is not None
            names = [child.name for child in sa.children]
            targets = order(sa.published, others.facts) if to == ANY else [to]
            reasons = {target: others.lacks(target, sa.connection, names) for target in targets}
            able = [target for target in targets if reasons[target] is None]
            if able:
                assert sa.remote is not None
                known = [(target, address) for target in able for address in others.at(target, sa.remote.address)]
                waiting.append(_Waiting(sa, known))
            else:
                lacking[next(reason for reason in reasons.values() if reason)] += 1
        if sas and not waiting:
            return {"error": f"{to} could resume no session of this gateway: {'; '.join(sorted(lacking))}"}
        wanted, sessions_at = math.ceil(request["share"] * len(sas)), {}
        if request.get("until_even"):
            try:
                sessions_at = await self._sessions_at(others, sas)
            except BankUnavailable as error:
                return {"error": f"the bank does not answer: {error}"}
            if to not in sessions_at:
                return {"error": f"{to} does not say how many sessions it has"}
            wanted = surplus(sessions_at, self._address or HERE, to)
        if self._under_way:
            # begun by another operator while the bank was asked
            return ALREADY
        # those known to have a sidecar first: fewer others are asked in vain
        random.shuffle(waiting)
        waiting.sort(key=lambda one: not one.sa.companion)
        self._run = _Run(to, request["rate"], self._clock(), len(sas), wanted, deque(waiting), sessions_at)
        self._run.outcomes.update({(State.LEFT, reason): number for reason, number in lacking.items()})
        self._task = spawn("drain", self._drain(self._run))
        log.info("drain-begins", to=to, sessions=len(sas), wanted=wanted)
        return await self.progress({})

    async def _sessions_at(self, others: OtherGateways, sas: Sequence[IkeSa]) -> dict[str, int]:
        """How many sessions this gateway has, and each other one that could resume some of its own. Raises
        BankUnavailable."""
        needs = {(sa.connection, tuple(child.name for child in sa.children)) for sa in sas}
        able = {name for name in others.facts if any(others.lacks(name, *need) is None for need in needs)}
        published = await others.sessions(self._bank)
        return {self._address or HERE: self._charon.tracker.count()[0]} | {
            name: count for name, count in sorted(published.items()) if name in able
        }

    async def progress(self, _: dict[str, Any]) -> dict[str, Any]:
        """How far the last run is."""
        run = self._run
        if run is None:
            return {"error": "this gateway was not drained"}
        ended = self._clock() if run.ended is None else run.ended
        return {
            "state": "running" if run.ended is None else "stopped" if run.stopping else "done",
            "to": run.to,
            "sessions": run.sessions,
            "wanted": run.wanted,
            "sessions_at": run.sessions_at,
            "moved": run.count(State.MOVED),
            "left": run.count(State.LEFT),
            "failed": run.count(State.FAILED),
            "under_way": len(run.asked),
            "outcomes": [
                {"result": str(result), "reason": reason, "sessions": number}
                for (result, reason), number in sorted(run.outcomes.items())
            ],
            "failures": run.failures,
            "seconds": round(ended - run.began, 3),
        }

    async def stop(self, _: dict[str, Any]) -> dict[str, Any]:
        """Ask no more clients, and wait for those that move."""
        if self._run is not None and self._task is not None and not self._task.done():
            self._run.stopping = True
            await asyncio.wait([self._task])
        return await self.progress({})

    # what clients say

    def moving(self, message: StubMessage) -> None:
        """A client's report, not proved yet."""
        asked = self._run.asked.get(message.spis) if self._run is not None else None
        if self._run is None or asked is None or message.move is None:
            return
        sa = asked.sa
        if not verify(message, sa.suite.prf, sa.sk_d, before=asked.move):
            return
        sa.traits |= Trait.COMPANION
        event = REPORTED.get(message.move.status)
        if event is None:
            return
        if event in ELSEWHERE and event is not Event.NOT_CONFIGURED:
            # the client knows the gateway: its other address would lead to the same answer
            asked.waiting.targets = [one for one in asked.waiting.targets if one[0] != asked.waiting.target]
        if event in ELSEWHERE and asked.waiting.targets:
            event = Event.ANOTHER
        elif asked.state is State.ASKED:
            asked.again = self._clock() + REMIND_SECONDS
        self._on(self._run, asked, event)

    # the run

    async def _drain(self, run: _Run) -> None:
        begin = self._clock()
        try:
            while (run.waiting and not run.stopping and run.count(State.MOVED) < run.wanted) or run.asked:
                now = self._clock()
                # a pause pays for no burst
                begin = max(begin, now - TICK_SECONDS)
                while (
                    begin <= now
                    and run.waiting
                    and not run.stopping
                    and run.count(State.MOVED) + len(run.asked) < run.wanted
                ):
                    self._ask(run, run.waiting.popleft())
                    begin += 1 / run.rate
                await self._collect(run)
                for asked in list(run.asked.values()):
                    self._look_after(run, asked, now)
                await asyncio.sleep(TICK_SECONDS)
        finally:
            run.ended = self._clock()
            log.info(
                "drain-ends",
                to=run.to,
                moved=run.count(State.MOVED),
                left=run.count(State.LEFT),
                failed=run.count(State.FAILED),
            )

    def _ask(self, run: _Run, waiting: _Waiting) -> None:
        sa = waiting.sa
        if self._charon.tracker.sas.get(sa.id.spis) is not sa or sa.published is None:
            run.outcomes[(State.LEFT, REASONS[Event.VANISHED])] += 1
            return
        waiting.message_id = max(move_message_id(self._wall()), waiting.message_id + 1)
        waiting.target, address = waiting.targets.pop(0)
        octets = build_move(stub_sa(sa, sa.published), address, waiting.message_id)
        move = parse_stub_message(octets)
        run.asked[sa.id.spis] = _Asked(waiting, sa, sa.published, move, octets, self._clock() + MOVE_SECONDS)

    def _look_after(self, run: _Run, asked: _Asked, now: float) -> None:
        sa = asked.sa
        if asked.vanished:
            self._on(run, asked, Event.VANISHED)
        elif now > asked.deadline:
            self._on(run, asked, Event.OVERDUE)
        elif now >= asked.again:
            if asked.state is State.MOVING:
                asked.again = now + REMIND_SECONDS
            elif asked.sent < len(ASK_SECONDS):
                asked.again = now + ASK_SECONDS[asked.sent]
            else:
                self._on(run, asked, Event.UNANSWERED)
                return
            asked.sent += 1
            self._send(sa, asked.octets)

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

    async def _collect(self, run: _Run) -> None:
        """End the IKE_SAs of those that went on elsewhere: the bank knows when the target has confirmed."""
        every = list(run.asked.values())
        gone = [self._charon.tracker.sas.get(asked.sa.id.spis) is not asked.sa for asked in every]
        moved: list[Index | None] = []
        ended: list[bool | None] = []
        try:
            for first in range(0, len(every), BUNDLE):
                indexes = [asked.index for asked in every[first : first + BUNDLE]]
                moved += await self._bank.moved(indexes)
                ended += await self._bank.ended(indexes)
        except BankUnavailable as error:
            log.info(error.event, component="drain", reason=str(error))
            return
        over: list[tuple[IkeSa, Index | None]] = []
        for asked, vanished, new, over_there in zip(every, gone, moved, ended, strict=True):
            if asked.state in DRAIN.final:
                # its client has reported how it ended, while the bank was asked
                continue
            # a target of release 0.1 leaves no mark; the client's report, which is proved, stands for it
            if new is not None or (over_there and asked.state is State.MOVING):
                self._on(run, asked, Event.WENT_ON)
                over.append((asked.sa, new))
            else:
                asked.vanished = vanished
        await asyncio.gather(*(self._elsewhere.end(sa, new) for sa, new in over))

    def _on(self, run: _Run, asked: _Asked, event: Event) -> None:
        """Something happened to a client; where that ends it, it is counted and named in the log."""
        asked.state = DRAIN.after(asked.state, event)
        if asked.state not in DRAIN.final:
            return
        run.asked.pop(asked.sa.id.spis, None)
        if asked.state is State.NEXT:
            self._ask(run, asked.waiting)
            return
        result, reason = asked.state, REASONS[event]
        run.outcomes[(result, reason)] += 1
        sa = asked.sa
        identity = sa.remote_id.text if sa.remote_id else ""
        address = sa.remote.address if sa.remote else ""
        if result is State.FAILED and len(run.failures) < FAILURES_SHOWN:
            run.failures.append({"identity": identity, "address": address, "reason": reason})
        log.info("drained", result=str(result), identity=identity, peer=address, reason=reason, **sa.id.logged)
