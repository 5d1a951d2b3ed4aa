"""One attempt to move a session: a gateway is chosen, asked, and gone on with; or there is a full handshake. Its states
are those of bridge.client.attempt_state; each method here is for one of them, and gives what happened in it.

ASKING is `sync_request` and `race`, SWITCHING `switchover`, and where a session may go is known to `candidates`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import structlog

from bridge.charon.charon import Charon
from bridge.charon.ha_channel import ChannelError
from bridge.charon.ha_message import HaError
from bridge.charon.ike_sa import IkeSa
from bridge.charon.vici_types import ViciError
from bridge.charon.vpns import Vpn
from bridge.client.attempt_state import ATTEMPT, Event, State
from bridge.client.candidates import Candidates
from bridge.client.outcome import Outcome, Result
from bridge.client.race import RefusedByError, first_answer
from bridge.client.sessions import Session
from bridge.client.switchover import Switchover
from bridge.client.sync_request import Answer, NoAnswerError, SyncRequester, Target

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Means:
    """What every attempt is made with. `refusal_grace` in seconds; `clock` gives monotonic ones; `resumed` is called
    for each session that was resumed, before the attempt ends."""

    charon: Charon
    candidates: Candidates
    requester: SyncRequester
    switchover: Switchover
    refusal_grace: float
    clock: Callable[[], float]
    resumed: Callable[[Session, IkeSa, Answer], None]


class Attempt:
    """`session` is None where there is none in `vpn`; `to`: the address of the gateway to go to, None for any; `stay`:
    its gateway lives, so it stays there where no other resumes it; `restored`: it is from before this host went down.
    """

    def __init__(
        self,
        means: Means,
        vpn: Vpn,
        session: Session | None,
        to: str | None = None,
        *,
        stay: bool = False,
        restored: bool = False,
    ) -> None:
        self.state = ATTEMPT.first
        self._means = means
        self._vpn = vpn
        self._session = session
        self._sa: IkeSa | None = None
        self._origin: IkeSa | None = None
        """what is asked for: `_sa`, or the IKE_SA that was rekeyed to it"""
        self._to = to
        self._stay = stay
        self._restored = restored
        self._reason = ""
        self._gateways: list[Target] = []
        self._proven: tuple[Target, Answer]
        self._outcome: Outcome
        self._began = means.clock()
        self._states: dict[State, Callable[[], Awaitable[Event]]] = {
            State.CHOOSING: self._choose,
            State.ASKING: self._ask,
            State.SWITCHING: self._switch,
            State.DECLINED: self._decline,
            State.HANDSHAKE: self._handshake,
        }

    @classmethod
    def set_up_at(cls, means: Means, vpn: Vpn, session: Session, gateway: Target, reason: str) -> Attempt:
        """A full handshake at one gateway, whatever else could be done."""
        attempt = cls(means, vpn, session)
        attempt.state, attempt._gateways, attempt._reason = State.HANDSHAKE, [gateway], reason
        return attempt

    async def run(self) -> Outcome:
        """What becomes of it."""
        while (work := self._states.get(self.state)) is not None:
            self.state = ATTEMPT.after(self.state, await work())
        return self._outcome

    @property
    def _connection(self) -> str | None:
        return self._sa.connection if self._sa is not None else None

    def _ends(self, event: Event, outcome: Outcome) -> Event:
        self._outcome = outcome
        return event

    async def _choose(self) -> Event:
        candidates = self._means.candidates
        await candidates.resolve(self._vpn)
        self._sa = self._origin = self._session.last if self._session is not None else None
        children = [child.name for child in self._sa.children] if self._sa is not None else []
        await self._means.charon.know_connections((gateway.connection, children) for gateway in self._vpn.gateways)
        self._gateways = list(candidates.of(self._vpn, self._session, self._to, restored=self._restored))
        self._began = self._means.clock()
        if not self._gateways:
            reason = "gateway-not-configured"
            return self._ends(Event.NO_GATEWAY, Outcome(Result.FAILED, self._connection, self._to, reason=reason))
        if self._sa is None:
            self._reason = "no-ike-sa"
        elif not self._sa.resumable:
            self._reason = "not-resumable"
        elif not self._means.charon.channel.ready():
            self._reason = "charon-unavailable"
        else:
            return Event.RESUMABLE
        return Event.NOT_RESUMABLE

    async def _ask(self) -> Event:
        session, sa = self._resumable
        # while the session works where it is, that gateway is no rival of the others
        last = [one for one in self._gateways if session.up and self._means.candidates.is_here(sa, one)]
        first = [one for one in self._gateways if one not in last]
        for some in filter(None, (first, last)):
            try:
                self._proven = await self._first_answer(session, self._asked_for, some)
            except NoAnswerError:
                continue
            except RefusedByError as refused:
                log.info(
                    "resumption-refused",
                    vpn=session.vpn,
                    gateway=refused.gateway.address,
                    connection=sa.connection,
                    reason=refused.why or refused.reason,
                    **self._asked_for.id.logged,
                )
                self._not_resumed_by(refused.gateway, refused.reason)
                previous = session.previous
                if refused.why is None and self._origin is sa and previous is not None and previous is not sa:
                    # a gateway without a stub proves nothing, and one that proves a reason has the stub
                    self._origin = previous
                    return Event.REKEYED
                return Event.REFUSED
            return Event.PROVEN
        self._reason = "no-answer"
        return Event.NO_ANSWER

    async def _first_answer(self, session: Session, sa: IkeSa, gateways: Sequence[Target]) -> tuple[Target, Answer]:
        """Raises NoAnswerError or RefusedByError."""

        def not_answering(gateway: Target) -> None:
            log.info(
                "gateway-not-answering",
                gateway=gateway.address,
                connection=sa.connection,
                vpn=session.vpn,
                **sa.id.logged,
            )

        requester, grace = self._means.requester, self._means.refusal_grace
        return await first_answer(gateways, lambda gateway: requester.ask(sa, gateway), not_answering, grace)

    @property
    def _resumable(self) -> tuple[Session, IkeSa]:
        """What is to be resumed, from ASKING on."""
        assert self._session is not None
        assert self._sa is not None
        return self._session, self._sa

    @property
    def _asked_for(self) -> IkeSa:
        """The IKE_SA whose stub gateways are asked to resume from."""
        assert self._origin is not None
        return self._origin

    def _not_resumed_by(self, gateway: Target, reason: str) -> None:
        """It is there, so a handshake is tried with it first."""
        self._reason = reason
        self._gateways = [gateway, *(one for one in self._gateways if one is not gateway)]

    async def _switch(self) -> Event:
        session, sa = self._resumable
        gateway, answer = self._proven
        if session.up and sa.id.spis not in session.sas:
            # charon did meanwhile what it is configured to (dpd_action)
            return self._ends(Event.SET_UP, self._set_up(session.last, "set-up-by-charon"))
        try:
            new, names, up = await self._means.switchover.resume(
                session, sa, gateway, answer, self._means.requester.confirm, stay=self._stay, origin=self._asked_for
            )
        except (ViciError, ChannelError, HaError) as error:
            log.warning(
                "resumed-sa-unusable",
                vpn=session.vpn,
                gateway=gateway.address,
                connection=sa.connection,
                reason=str(error),
                **sa.id.logged,
            )
            self._not_resumed_by(gateway, "sa-unusable")
            return Event.UNUSABLE
        self._means.resumed(session, new, answer)
        return self._ends(
            Event.WORKS,
            Outcome(
                Result.RESUMED,
                gateway.connection,
                gateway.address,
                new.id.spi_i.hex(),
                new.id.spi_r.hex(),
                tuple(names),
                _milliseconds(answer.exchange),
                _milliseconds(up - self._began),
            ),
        )

    async def _decline(self) -> Event:
        if not self._stay:
            return Event.LEAVES
        return self._ends(Event.STAYS, Outcome(Result.FAILED, self._connection, self._to, reason=self._reason))

    async def _handshake(self) -> Event:
        """draft-xu-ike-sa-sync-01 section 4, with the first connection that takes it: charon goes to the first address
        of each."""
        charon = self._means.charon
        tried: set[str] = set()
        for gateway in self._gateways:
            if gateway.connection in tried or charon.connection(gateway.connection) is None:
                continue
            tried.add(gateway.connection)
            try:
                names = await self._means.switchover.handshake(self._session, gateway)
            except (ViciError, ChannelError, HaError) as error:
                log.warning(
                    "handshake-failed",
                    gateway=gateway.address,
                    connection=gateway.connection,
                    reason=str(error),
                )
                continue
            alive = [sa for sa in charon.tracker.established() if sa.connection == gateway.connection]
            outcome = self._set_up(max(alive, key=lambda sa: sa.seen, default=None), self._reason, gateway)
            return self._ends(Event.ESTABLISHED, msgspec.structs.replace(outcome, children=tuple(names)))
        first = self._gateways[0]
        failed = Outcome(Result.FAILED, first.connection, first.address, reason=self._reason)
        return self._ends(Event.NONE_TAKES, failed)

    def _set_up(self, sa: IkeSa | None, reason: str, gateway: Target | None = None) -> Outcome:
        """There is a new IKE_SA, perhaps not known here yet."""
        known: dict[str, Any] = {}
        if sa is not None:
            children = tuple(dict.fromkeys(child.name for child in sa.children))
            known = {"spi_i": sa.id.spi_i.hex(), "spi_r": sa.id.spi_r.hex(), "children": children}
        where = sa.remote.address if sa is not None and sa.remote is not None else None
        return Outcome(
            Result.FALLBACK,
            gateway.connection if gateway is not None else sa.connection if sa is not None else None,
            where or (gateway.address if gateway is not None else None),
            total_ms=_milliseconds(self._means.clock() - self._began),
            reason=reason,
            **known,
        )


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)
