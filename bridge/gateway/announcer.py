"""A failed gateway's clients are asked to resume here (docs/protocol.md, Announcement). No I/O; times are monotonic
seconds.

The sessions of a failed gateway are shared among those that could resume them by rendezvous hashing: each session has
an order of gateways, the first announces immediately, each later one a turn later if it was not resumed by then.

    WAITING --its turn, and room--> ANNOUNCED --Moving: moving--> COMING --confirmed--> resumed
       |                               |  '--no answer to ATTEMPTS--> silent: left to DPD
       |                               '--Moving: another--> refused
       |--Moving: the daemon answers, unproven--> WAITING, later
       '--the session goes on elsewhere, or the client says that its gateway lives--> over

A few sessions are announced first. A client asks its gateway before it moves. If one says that its gateway has
answered, or several that only its daemon has, without a proof, and none moves, the announcements pause, and begin again
with a few: while the gateway has no heartbeat in the bank, it cannot say when it really fails. A gateway that is back
may have lost its sessions: they are announced until a client says that it still has them. Announcements go out as fast
as sessions come in (bridge.gateway.pace).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final

import structlog

from bridge.bank.failover_progress import FailoverProgress
from bridge.gateway.announced_failure import Announced, AnnouncementState, Failure
from bridge.gateway.other_gateways import order
from bridge.ike.stub_exchange import (
    REPORTS,
    MoveStatus,
    StubMessage,
    StubSa,
    build_announcement,
    verify_report,
)
from bridge.stub.stub import Index, Stub

log = structlog.get_logger()

TURN_SECONDS: Final = 2.0
"""between the turns of two gateways"""
TRIAL: Final = 16
"""sessions that are announced first"""
TRIAL_SECONDS: Final = 0.15
"""after which the rest follow: a gateway that lives has answered its clients by then"""
CONCURRING: Final = 3
"""clients that say that the daemon of their gateway answers, unproven: one alone may be deceived"""
PAUSE_SECONDS: Final = 10.0
"""then, until clients are asked again"""
ASKED_AGAIN_SECONDS: Final = 0.6
"""after which the rest follow then: time for three Probes"""
LIVES, DAEMON_LIVES = "a client says that it lives", "clients say that its charon lives"
"""why announcements were stopped"""
ATTEMPTS: Final = (0.7, 1.4, 2.8)
"""seconds that each announcement waits for an answer: a client first asks its gateway for 0.3 s"""
ARRIVE_SECONDS: Final = 10.0
"""within which a client that is coming has to be here"""


class Announcer:
    """Announcements of this gateway. `source(stub)`: its address that the client of a stub knows; `send(stub, octets)`
    sends to that client; `message_id()` gives the Message ID of one that is first sent now; `rate`: announcements a
    second at most."""

    def __init__(
        self,
        address: str,
        source: Callable[[Stub], str],
        send: Callable[[Stub, bytes], None],
        message_id: Callable[[], int],
        *,
        rate: float,
    ) -> None:
        self._address = address
        self._source = source
        self._send = send
        self._message_id = message_id
        self._rate = rate
        self._allowance = 0.0
        self._last = 0.0
        self._failures: dict[str, Failure] = {}
        self._gateway_of: dict[str, str] = {}
        """the failed gateway, by its other addresses in the index"""
        self._by_spis: dict[bytes, tuple[Failure, Announced]] = {}
        self.false_alarms = 0
        """failures that a client has contradicted"""
        self.totals: Counter[str] = Counter()
        """sessions by their outcome: announced, resumed, refused, silent (no answer)"""

    def begin(self, gateway: str, now: float) -> None:
        """`gateway` has failed; its stubs follow by `add`."""
        self.end(gateway, "a new failure", now)
        self._failures[gateway] = Failure(gateway, now, TRIAL_SECONDS)

    def add(self, gateway: str, stubs: Iterable[tuple[Stub, Iterable[str]]], *, complete: bool) -> None:
        """Stubs of `gateway`, each with the gateways that could announce and resume it. They wait behind those that
        wait; those that are known may be among them. `complete`: there are no others; what comes before that had
        traffic, and its clients get a head start."""
        failure = self._failures.get(gateway)
        if failure is None or failure.ended is not None:
            return
        waiting = []
        for stub, able in stubs:
            if stub.index in failure.known:
                continue
            failure.known.add(stub.index)
            failure.stubs += 1
            self._gateway_of[stub.index.gateway] = failure.gateway
            turns = order(stub.index, able)
            if self._address in turns:
                waiting.append(Announced(stub, failure.began + turns.index(self._address) * TURN_SECONDS))
                if not complete:
                    failure.first.add(stub.index)
        failure.sessions += len(waiting)
        failure.queue(waiting)
        if complete:
            failure.complete = True
            log.warning("announcing", gateway=gateway, sessions=failure.sessions)

    def back(self, gateway: str, now: float) -> None:
        """`gateway` has a heartbeat again. Its clients find out whether it still has their sessions."""
        failure = self._failures.get(gateway)
        if failure is None or failure.ended is not None:
            return
        failure.back, failure.paused_until = True, min(failure.paused_until, now)
        for announced in failure.waiting:
            if announced.octets:
                # it was asked before, and waits to be asked again
                announced.turn = now
        failure.queue(())

    def end(self, gateway: str, reason: str, now: float) -> None:
        """Announce nothing more of `gateway`."""
        failure = self._failures.get(gateway)
        if failure is None or failure.ended is not None:
            return
        failure.stopped = reason
        failure.waiting.clear()
        for announced in failure.under_way.values():
            self._by_spis.pop(announced.spis, None)
        failure.under_way.clear()
        self._finish(failure, now)

    def over(self, index: Index, now: float) -> None:
        """The session was resumed, or ended, here or elsewhere."""
        failure = self._failures.get(self._gateway_of.get(index.gateway, index.gateway))
        if failure is None or failure.ended is not None:
            return
        announced = failure.under_way.get(index)
        if announced is None:
            if index not in failure.outside:
                failure.outside.add(index)
                failure.counts["elsewhere"] += 1
            return
        failure.window.pace.resumed(now - announced.coming if announced.coming is not None else None)
        # the bank reports the end of its stub more than once
        failure.outside.add(index)
        self._settle(failure, announced, "resumed")

    def under_way(self) -> list[Index]:
        """The sessions that were announced and are not settled."""
        return [index for failure in self._failures.values() for index in failure.under_way]

    def first_under_way(self, gateway: str, now: float) -> bool:
        """Whether sessions of `gateway` that had traffic have not gone on yet, within their head start."""
        failure = self._failures.get(gateway)
        return failure is not None and failure.ended is None and failure.first_under_way(now)

    def expects(self, spis: bytes) -> bool:
        """Whether a report about the SA with these SPIs may come."""
        return spis in self._by_spis

    @property
    def busy(self) -> bool:
        """Whether `tick` has anything to do."""
        return any(failure.ended is None for failure in self._failures.values())

    def tick(self, now: float) -> None:
        """Send what is due."""
        self._allowance = min(self._allowance + (now - self._last) * self._rate, max(self._rate / 10, 1.0))
        self._last = now
        for failure in self._failures.values():
            if failure.ended is None and now >= failure.paused_until:
                self._repeat(failure, now)
                self._announce(failure, now)
                if failure.complete and not failure.waiting and not failure.under_way:
                    self._finish(failure, now)

    def _announce(self, failure: Failure, now: float) -> None:
        while failure.waiting and failure.waiting[0].turn <= now and failure.window.has_room:
            if failure.trial_until is None:
                if len(failure.under_way) >= TRIAL:
                    failure.trial_until = now + failure.trial_seconds
                    return
            elif now < failure.trial_until:
                return
            if self._allowance < 1 or failure.waits_for_first(failure.waiting[0], now):
                return
            announced = failure.waiting.popleft()
            if announced.stub.index in failure.outside:
                continue
            stub = announced.stub
            sa = StubSa(stub.spi_i, stub.spi_r, stub.initiator, stub.index, stub.suite.prf, stub.sk_d)
            announced.octets = build_announcement(sa, self._source(stub), self._message_id())
            announced.state = AnnouncementState.ANNOUNCED
            failure.under_way[stub.index] = announced
            failure.window.enter(announced)
            self._by_spis[announced.spis] = failure, announced
            failure.counts["announced"] += 1
            self.totals["announced"] += 1
            self._transmit(announced, now)

    def _repeat(self, failure: Failure, now: float) -> None:
        late = False
        for announced in [one for one in failure.under_way.values() if now >= one.again]:
            if announced.state is AnnouncementState.COMING:
                self._settle(failure, announced, "silent")
                late = True
            elif announced.sent < len(ATTEMPTS):
                if self._allowance < 1:
                    break
                failure.window.unanswered(announced)
                self._transmit(announced, now)
            else:
                self._settle(failure, announced, "silent")
        if late:
            failure.window.pace.late()

    def _transmit(self, announced: Announced, now: float) -> None:
        self._allowance -= 1
        announced.again = now + ATTEMPTS[announced.sent]
        announced.sent += 1
        self._send(announced.stub, announced.octets)

    def report(self, message: StubMessage, now: float) -> bool:
        """A client's Moving, not proved yet; whether it is about an announcement of this gateway."""
        found = self._by_spis.get(message.spis)
        if found is None or message.move is None or message.move.status not in REPORTS:
            return False
        failure, announced = found
        stub = announced.stub
        if not verify_report(message, stub.suite.prf, stub.sk_d, announced.octets):
            return True
        status = message.move.status
        if status is MoveStatus.MOVING:
            failure.came = True
            if announced.state is AnnouncementState.ANNOUNCED:
                announced.state, announced.again = AnnouncementState.COMING, now + ARRIVE_SECONDS
                announced.coming = now
                failure.window.enter(announced)
        elif status is MoveStatus.GATEWAY_LIVES:
            self._wait(failure, announced, now)
            self._contradicted(
                failure, LIVES, "a client says that it answers: it is cut off from the bank, or its sidecar hung", now
            )
        elif status is MoveStatus.DAEMON_ANSWERS:
            self._daemon_answers(failure, announced, now)
        else:
            self._settle(failure, announced, "refused")
        return True

    def _daemon_answers(self, failure: Failure, announced: Announced, now: float) -> None:
        """A client stays, since the daemon of its gateway has answered, and not the sidecar."""
        failure.daemon += 1
        self._wait(failure, announced, now)
        if failure.came or (failure.daemon < CONCURRING and failure.under_way):
            return
        self._contradicted(failure, DAEMON_LIVES, "clients say that its charon answers and its sidecar does not", now)

    def _contradicted(self, failure: Failure, state: str, reason: str, now: float) -> None:
        """Announce nothing for a while; nothing more, if the gateway is back."""
        if not failure.contradicted:
            failure.contradicted = True
            self.false_alarms += 1
            effect = "none" if failure.back else f"its clients stay; a few are asked again every {PAUSE_SECONDS:.0f} s"
            log.error("gateway-lives", gateway=failure.gateway, reason=reason, effect=effect)
        if failure.back:
            self.end(failure.gateway, state, now)
            return
        failure.paused, failure.paused_until, failure.trial_seconds = state, now + PAUSE_SECONDS, ASKED_AGAIN_SECONDS
        failure.trial_until, failure.daemon, failure.came = None, 0, False
        for announced in list(failure.under_way.values()):
            self._wait(failure, announced, now)

    def _wait(self, failure: Failure, announced: Announced, now: float) -> None:
        """Announce a session again, after a while and after all others."""
        self._remove(failure, announced)
        failure.counts["announced"] -= 1
        announced.state, announced.sent, announced.coming = AnnouncementState.WAITING, 0, None
        last = failure.waiting[-1].turn if failure.waiting else 0.0
        announced.turn = max(now + PAUSE_SECONDS, last)
        failure.waiting.append(announced)

    def _settle(self, failure: Failure, announced: Announced, outcome: str) -> None:
        self._remove(failure, announced)
        failure.counts[outcome] += 1
        self.totals[outcome] += 1

    def _remove(self, failure: Failure, announced: Announced) -> None:
        failure.under_way.pop(announced.stub.index, None)
        self._by_spis.pop(announced.spis, None)
        failure.window.leave(announced)

    def _finish(self, failure: Failure, now: float) -> None:
        failure.ended = now
        failure.outside.clear()
        failure.known.clear()
        failure.first.clear()
        log.info(
            "announced",
            gateway=failure.gateway,
            sessions=failure.sessions,
            seconds=round(now - failure.began, 3),
            **{key: failure.counts[key] for key in ("resumed", "refused", "silent", "elsewhere")},
            **({"stopped": failure.stopped} if failure.stopped else {}),
        )

    def status(self, now: float, ended_within: float = math.inf) -> list[FailoverProgress]:
        """How far each failure is whose announcements go on, or ended within so many seconds."""
        return [
            failure.progress(now)
            for failure in self._failures.values()
            if failure.ended is None or now - failure.ended <= ended_within
        ]
