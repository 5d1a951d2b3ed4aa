"""The client's side of a resumption: one session moved to another gateway, or set up again when that is refused.

    IDLE --resume--> ASKING --proven answer--> INSTALLING --charon has it--> CHILDREN --all up--> resumed
                       |  '--no answer-> ASKING the next gateway                |
                       '--refused, or none answers------------------------------'--> FALLBACK --> fallback or failed

ASKING is `sync_request`, what follows the answer `switchover`; which sessions there are is known to `sessions`, where
they may go to `candidates`, and when that begins by itself to `auto_resume`.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import msgspec
import structlog

from bridge.charon.charon import Charon
from bridge.charon.ha_channel import ChannelError
from bridge.charon.ha_message import HaError, IkeId
from bridge.charon.ike_sa import Condition, IkeSa
from bridge.charon.vici_types import SaInfo, ViciError
from bridge.client.auto_resume import AutoResume
from bridge.client.candidates import Candidates
from bridge.client.gateway_probe import GatewayProbe
from bridge.client.metrics import ClientMetrics
from bridge.client.move_handler import MoveHandler
from bridge.client.outcome import Outcome, Result
from bridge.client.race import RefusedByError, first_answer
from bridge.client.sessions import Session, Sessions
from bridge.client.stub_keeper import StubKeeper, gateway_message
from bridge.client.switchover import Switchover
from bridge.client.sync_request import Answer, NoAnswerError, SyncRequester, Target
from bridge.client.traffic_watch import TrafficWatch
from bridge.client.vpns import Vpn, vpns_of
from bridge.config import ClientConfig
from bridge.ike.message import ExchangeType
from bridge.ike.stub_exchange import ANNOUNCING
from bridge.net.interface import Sender
from bridge.net.packet import EXCHANGE_OFFSET, Datagram
from bridge.service.tasks import end, spawn

log = structlog.get_logger()


class UnusableError(Exception):
    """A gateway resumed, and charon does not go on with what it rebuilt."""


class Initiator:
    """Moves the sessions of one charon. Datagrams arrive through `datagrams`, charon's news through the methods of
    bridge.charon.sa_tracker.Listener."""

    def __init__(
        self,
        charon: Charon,
        sender: Sender,
        config: ClientConfig,
        metrics: ClientMetrics,
        *,
        random: Callable[[int], bytes] = os.urandom,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._charon = charon
        self._config = config
        self._metrics = metrics
        self._clock = clock
        self._vpns = vpns_of(config, charon.tracker)
        self._last_of: dict[str, Vpn] = {}
        self._sessions = Sessions(charon, self._vpns, clock=clock, wall=wall)
        self._candidates = Candidates(charon, self._sessions)
        self.keeper = StubKeeper(
            config.held, charon.tracker, sender, self._sessions.resumable_sas, self._named, random=random, wall=wall
        )
        self._switchover = Switchover(charon, self._sessions, config.resume, random=random, clock=clock, wall=wall)
        self._requester = SyncRequester(
            sender, config.resume, self.keeper.stub_of, self._switchover.offer, random=random, clock=clock
        )
        self._auto_resume = AutoResume(charon, self._sessions, lambda session: self._begin(session, None))
        self._moving: dict[Session, asyncio.Task[Outcome]] = {}
        self._move_handler = MoveHandler(charon.tracker, sender, self._targets, self._sent_away, random=random)
        self._gateway_probe = GatewayProbe(
            sender, charon.tracker.sas.get, self._targets, self._sent_away, random=random
        )
        self._traffic = TrafficWatch(charon, self._sessions, self._set_up, clock=clock)
        self._restored: set[bytes] = set()
        self._resolving: set[asyncio.Task[None]] = set()
        self.last: Outcome | None = None

    async def watch_traffic(self) -> None:
        """See that resumed sessions carry traffic, until it is cancelled."""
        await self._traffic.run()

    async def restore(self) -> None:
        """Take up the sessions that were kept in the file when this host went down, and come back to those whose VPN
        resumes by itself."""
        restored = [session for sa in self.keeper.restore() if (session := self._sessions.restore(sa)) is not None]
        self._restored |= {session.last.id.spis for session in restored}
        wanted = [session for session in restored if self._vpn(session).resume_on_down]
        if wanted:
            await self._auto_resume.restored(wanted)

    async def close(self) -> None:
        """Stop; what is held on disk stays."""
        await self._gateway_probe.close()
        await self._auto_resume.close()
        await end(*self._moving.values(), *self._resolving)
        await self.keeper.close()

    def initiated(self, sa: IkeSa) -> bool:
        """Whether this host initiated an IKE_SA, or the one that it came from by rekeying, in one of its VPNs."""
        by_us = sa.id.initiator or sa.has(Condition.ORIGINAL_INITIATOR)
        return by_us and self._vpns.of(sa.connection) is not None

    def vpn_of(self, spis: bytes) -> str | None:
        """The VPN of an IKE_SA; None where it is of none."""
        session = self._sessions.of(spis)
        return session.vpn if session is not None else None

    def _vpn(self, session: Session) -> Vpn:
        """The VPN of a session, as it was last where its connection is not loaded any more."""
        vpn = self._vpns.of(session.connection)
        if vpn is not None:
            self._last_of[session.vpn] = vpn
        return vpn or self._last_of[session.vpn]

    def _named(self, sa: IkeSa, gateways: Sequence[str]) -> None:
        """The gateway of an IKE_SA names others that resume too."""
        if gateways:
            log.debug("gateways-named", connection=sa.connection, gateways=",".join(gateways), **sa.id.logged)
            self._vpns.named(sa.connection, gateways)

    # news from charon (Listener)

    def changed(self, sa: IkeSa) -> None:
        """An IKE_SA is up, or another than before."""
        known = self._sessions.of(sa.id.spis)
        if known is None and self._vpns.by_initiative and not self.initiated(sa):
            return
        session = self._sessions.changed(sa)
        if session is None:
            return
        if session is not known:
            # a Move may name a gateway by its address before the first attempt
            task = spawn("resolve", self._candidates.resolve(self._vpn(session)))
            self._resolving.add(task)
            task.add_done_callback(self._resolving.discard)
        if sa.resumable:
            self.keeper.changed(sa)

    def gone(self, sa: IkeSa) -> None:
        """charon ended an IKE_SA."""
        self._sessions.gone(sa)
        self.keeper.save_soon()

    def verified(self, ike_id: IkeId) -> None:
        """Nothing to do: the client's own request confirms."""

    def down(self, info: SaInfo) -> None:
        """VICI says an IKE_SA went down. In state DELETING one of the sides wanted that; else the gateway is dead."""
        if self._sessions.is_own(info.spis):
            return
        if info.state == "DELETING":
            session = self._sessions.ended(info)
            self.keeper.save_soon()
            if session is not None:
                self._auto_resume.stop(session)
            return
        session = self._sessions.of(info.spis)
        if session is not None and self._vpn(session).resume_on_down:
            log.info(
                "gateway-dead",
                vpn=session.vpn,
                connection=info.connection,
                gateway=info.remote.address,
                spi_i=info.spi_i.hex(),
                spi_r=info.spi_r.hex(),
            )
            self._auto_resume.start(session)

    # news from the wire

    def datagrams(self, batch: Sequence[Datagram]) -> None:
        """What reached this host: answers to IKE_SA_INIT and INFORMATIONAL, and all of exchange type 240."""
        for datagram in batch:
            if datagram.ike[EXCHANGE_OFFSET] == ExchangeType.STUB:
                message = gateway_message(datagram.ike)
                if message is not None and message.move is not None and message.move.status in ANNOUNCING:
                    self._gateway_probe.received(message, datagram)
                elif message is not None and message.move is not None:
                    self._move_handler.asked(message)
                elif message is not None:
                    self.keeper.received(message)
            else:
                self._requester.datagram(datagram)

    # moving

    async def resume(self, connection: str | None = None, vpn: str | None = None, to: str | None = None) -> Outcome:
        """Move a session, to the gateway `to` or the first of its VPN that takes it: one of `vpn` and `connection`,
        where they are given; a session that was lost rather than one that is up; where there is none, a full handshake
        in that VPN."""
        group = next((one for one in self._vpns if self._is_meant(one, connection, vpn)), None)
        if group is None:
            reason = "vpn-not-configured" if vpn is not None else "connection-not-configured"
            if vpn is None and connection is None:
                reason = "no-ike-sa"
            return self._done(Outcome(Result.FAILED, connection, to, reason=reason, vpn=vpn))
        session = self._sessions.chosen(vpn, connection)
        if session is not None:
            return await asyncio.shield(self._begin(session, to))
        if vpn is None and connection is None:
            return self._done(Outcome(Result.FAILED, None, None, reason="no-ike-sa"))
        return await self._move(group, None, to, stay=False)

    @staticmethod
    def _is_meant(vpn: Vpn, connection: str | None, name: str | None) -> bool:
        return name in (None, vpn.name) and (connection is None or vpn.has(connection))

    def _targets(self, sa: IkeSa) -> set[str] | None:
        """The addresses that the session of an IKE_SA may go to; None where it is no session of ours."""
        session = self._sessions.of(sa.id.spis)
        if session is None:
            return None
        return {target.address for target in self._candidates.of(self._vpn(session), session, None, restored=False)}

    def _sent_away(self, sa: IkeSa, to: str) -> asyncio.Task[Outcome] | None:
        """Move a session whose gateway asked for it; None where it moves already."""
        session = self._sessions.of(sa.id.spis)
        return None if session is None or session in self._moving else self._begin(session, to, stay=True)

    def _begin(self, session: Session, to: str | None, *, stay: bool = False) -> asyncio.Task[Outcome]:
        """`stay`: its gateway lives, so it stays there where the other one does not resume it."""
        task = self._moving.get(session)
        if task is None:
            work = self._move(self._vpn(session), session, to, stay=stay)
            task = spawn(f"move {session.connection}", work)
            self._moving[session] = task
            task.add_done_callback(lambda _: self._moving.pop(session, None))
        return task

    def _set_up(self, session: Session) -> None:
        """A session that does not work gets a new IKE_SA from the gateway that it is at."""
        if session not in self._moving and session.last.remote is not None:
            here = Target(session.last.remote.address, session.connection)
            work = self._finish(
                self._vpn(session), session, self._fallback([here], session, "no-traffic", self._clock())
            )
            self._moving[session] = task = spawn(f"set up {session.connection}", work)
            task.add_done_callback(lambda _: self._moving.pop(session, None))

    async def _move(self, vpn: Vpn, session: Session | None, to: str | None, *, stay: bool) -> Outcome:
        return await self._finish(vpn, session, self._attempt(vpn, session, to, stay))

    async def _finish(self, vpn: Vpn, session: Session | None, work: Coroutine[Any, Any, Outcome]) -> Outcome:
        """What becomes of an attempt, noted; nothing that goes wrong in it leaves it."""
        try:
            outcome = await work
        except Exception as error:
            connection = session.connection if session is not None else None
            log.exception("move-failed", vpn=vpn.name, connection=connection)
            outcome = Outcome(Result.FAILED, connection, None, reason=f"internal: {type(error).__name__}")
        if outcome.result is not Result.FAILED and session is not None and session.up:
            await self._alone(vpn, session)
        return self._done(msgspec.structs.replace(outcome, vpn=vpn.name))

    async def _alone(self, vpn: Vpn, session: Session) -> None:
        try:
            await self._switchover.end_half_open(session, vpn)
        except ViciError as error:
            log.warning("half-open-not-ended", vpn=vpn.name, reason=str(error))

    def _done(self, outcome: Outcome) -> Outcome:
        self.last = outcome
        self._metrics.outcome(outcome.result, outcome.reason)
        if outcome.exchange_ms is not None:
            self._metrics.exchange_seconds.observe(outcome.exchange_ms / 1000)
        if outcome.total_ms is not None:
            self._metrics.total_seconds.observe(outcome.total_ms / 1000)
        level = log.warning if outcome.result is Result.FAILED else log.info
        told = msgspec.structs.asdict(outcome) | {"children": ",".join(outcome.children)}
        level("moved", **{key: value for key, value in told.items() if value})
        return outcome

    async def _attempt(self, vpn: Vpn, session: Session | None, to: str | None, stay: bool) -> Outcome:
        await self._candidates.resolve(vpn)
        sa = session.last if session is not None else None
        children = [child.name for child in sa.children] if sa is not None else []
        await self._charon.know_connections((gateway.connection, children) for gateway in vpn.gateways)
        restored = sa is not None and sa.id.spis in self._restored
        candidates = self._candidates.of(vpn, session, to, restored=restored)
        connection = sa.connection if sa is not None else None
        if not candidates:
            return Outcome(Result.FAILED, connection, to, reason="gateway-not-configured")
        began = self._clock()
        if session is None or sa is None:
            reason = "no-ike-sa"
        elif not sa.resumable:
            reason = "not-resumable"
        elif not self._charon.channel.ready():
            reason = "charon-unavailable"
        else:
            try:
                gateway, answer = await self._ask(sa, session, candidates)
                return await self._switch(session, sa, gateway, answer, began, stay)
            except NoAnswerError:
                reason = "no-answer"
            except RefusedByError as refused:
                reason, gateway = refused.reason, refused.gateway
                log.info(
                    "resumption-refused",
                    vpn=vpn.name,
                    gateway=gateway.address,
                    connection=connection,
                    reason=refused.why or reason,
                    **sa.id.logged,
                )
                candidates = [gateway, *(one for one in candidates if one is not gateway)]
            except UnusableError:
                reason = "sa-unusable"
                candidates = [gateway, *(one for one in candidates if one is not gateway)]
        if stay:
            return Outcome(Result.FAILED, connection, to, reason=reason)
        return await self._fallback(candidates, session, reason, began)

    async def _ask(self, sa: IkeSa, session: Session, candidates: Sequence[Target]) -> tuple[Target, Answer]:
        """The first proven answer. Raises NoAnswerError or RefusedByError."""

        def silent(gateway: Target) -> None:
            log.info(
                "gateway-silent", gateway=gateway.address, connection=sa.connection, vpn=session.vpn, **sa.id.logged
            )

        # while the session works where it is, that gateway is no rival of the others
        last = [one for one in candidates if session.up and self._candidates.is_here(sa, one)]
        first = [one for one in candidates if one not in last]
        for some in filter(None, (first, last)):
            try:
                return await first_answer(
                    some, lambda gateway: self._requester.ask(sa, gateway), silent, self._config.resume.refusal_grace
                )
            except NoAnswerError:
                continue
        raise NoAnswerError

    async def _switch(
        self, session: Session, sa: IkeSa, gateway: Target, answer: Answer, began: float, stay: bool
    ) -> Outcome:
        """Go on at a gateway that resumes. Raises UnusableError where that fails."""
        if session.up and sa.id.spis not in session.sas:
            # charon did meanwhile what it is configured to (dpd_action)
            return self._set_up_again(session, "set-up-by-charon", began)
        try:
            new, names, up = await self._switchover.resume(
                session, sa, gateway, answer, self._requester.confirm, stay=stay
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
            raise UnusableError from error
        self._traffic.resumed(session)
        self._named(new, answer.gateways)
        self.keeper.given(new, answer.sealed_stub, answer.lifetime)
        return Outcome(
            Result.RESUMED,
            gateway.connection,
            gateway.address,
            new.id.spi_i.hex(),
            new.id.spi_r.hex(),
            tuple(names),
            _milliseconds(answer.exchange),
            _milliseconds(up - began),
        )

    async def _fallback(
        self, candidates: Sequence[Target], session: Session | None, reason: str, began: float
    ) -> Outcome:
        """A full handshake (draft-xu-ike-sa-sync-01 section 4), with the first connection that takes it: charon goes to
        the first address of each."""
        tried: set[str] = set()
        for gateway in candidates:
            if gateway.connection in tried or self._charon.connection(gateway.connection) is None:
                continue
            tried.add(gateway.connection)
            try:
                names = await self._switchover.handshake(session, gateway)
            except (ViciError, ChannelError, HaError) as error:
                log.warning(
                    "handshake-failed",
                    gateway=gateway.address,
                    connection=gateway.connection,
                    reason=str(error),
                )
                continue
            sa = self._youngest(gateway.connection)
            return Outcome(
                Result.FALLBACK,
                gateway.connection,
                sa.remote.address if sa is not None and sa.remote is not None else gateway.address,
                children=tuple(names),
                total_ms=_milliseconds(self._clock() - began),
                reason=reason,
                **_spis(sa),
            )
        return Outcome(Result.FAILED, candidates[0].connection, candidates[0].address, reason=reason)

    def _set_up_again(self, session: Session, reason: str, began: float) -> Outcome:
        sa = session.last
        return Outcome(
            Result.FALLBACK,
            sa.connection,
            sa.remote.address if sa.remote is not None else None,
            children=tuple(dict.fromkeys(child.name for child in sa.children)),
            total_ms=_milliseconds(self._clock() - began),
            reason=reason,
            **_spis(sa),
        )

    def _youngest(self, connection: str) -> IkeSa | None:
        """The IKE_SA of a connection that came up last."""
        alive = [sa for sa in self._charon.tracker.established() if sa.connection == connection]
        return max(alive, key=lambda sa: sa.seen, default=None)


def _spis(sa: IkeSa | None) -> dict[str, Any]:
    return {"spi_i": sa.id.spi_i.hex(), "spi_r": sa.id.spi_r.hex()} if sa is not None else {}


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)
