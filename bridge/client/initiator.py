"""The client's side of a resumption: one IKE_SA moved to another gateway, or set up anew when that is refused.

    IDLE --resume--> ASKING --proven answer--> INSTALLING --charon has it--> CHILDREN --all up--> resumed
                       |  '--no answer-> ASKING the next gateway                |
                       '--refused, or none answers------------------------------'--> FALLBACK --> fallback or failed

ASKING is `asking`, what follows the answer `handover`; which SAs there are to resume is known to `sessions`, and when
that begins by itself to `comeback`.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import structlog

from bridge.charon.charon import Charon
from bridge.charon.ha_channel import ChannelError
from bridge.charon.ha_message import HaError, IkeId
from bridge.charon.ike_sa import IkeSa
from bridge.charon.vici_types import SaInfo, ViciError
from bridge.client.auto_resume import AutoResume
from bridge.client.metrics import ClientMetrics
from bridge.client.move_handler import MoveHandler
from bridge.client.outcome import Outcome, Result
from bridge.client.sessions import Sessions
from bridge.client.stub_keeper import StubKeeper, gateway_message
from bridge.client.switchover import Switchover
from bridge.client.sync_request import NoAnswerError, RefusedError, SyncRequester
from bridge.config import ClientConfig, GatewayEntry
from bridge.ike.message import ExchangeType
from bridge.net.interface import Sender
from bridge.net.packet import EXCHANGE_OFFSET, Datagram
from bridge.service.tasks import end, spawn

log = structlog.get_logger()


class Initiator:
    """Moves the IKE_SAs of one charon. Datagrams arrive through `datagrams`, charon's news through the methods of
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
        self._sessions = Sessions(charon, config.gateways, clock=clock, wall=wall)
        self.keeper = StubKeeper(config.held, charon.tracker, sender, lambda: self._sessions, random=random, wall=wall)
        self._handover = Switchover(charon, self._sessions, config.resume, random=random, clock=clock, wall=wall)
        self._asker = SyncRequester(
            sender, config.resume, self.keeper.stub_of, self._handover.offer, random=random, clock=clock
        )
        self._comeback = AutoResume(charon, self._sessions, lambda connection: self._begin(connection, None))
        self._moving: dict[str, asyncio.Task[Outcome]] = {}
        self._mover = MoveHandler(charon.tracker, sender, config.gateways, self._sent_away, random=random)
        self._restored: set[bytes] = set()
        self.last: Outcome | None = None

    async def restore(self) -> None:
        """Take up the sessions that were kept in the file when this host went down, and come back to one of them unless
        the operator wants that otherwise."""
        for sa in self.keeper.restore():
            if self._sessions.configured(sa.connection):
                self._sessions.lose(sa)
                self._restored.add(sa.id.spis)
        if self._restored and self._config.resume_on_down:
            await self._comeback.restored(self._config.gateways)

    async def close(self) -> None:
        """Stop; what is held on disk stays."""
        await self._comeback.close()
        await end(*self._moving.values())
        await self.keeper.close()

    # news from charon (Listener)

    def changed(self, sa: IkeSa) -> None:
        """An SA that is up replaces what was lost of its connection."""
        self._sessions.replaced(sa.connection)
        if self._sessions.configured(sa.connection) and sa.resumable:
            self.keeper.changed(sa)

    def gone(self, sa: IkeSa) -> None:
        """charon ended an SA."""
        self._sessions.gone(sa)
        self.keeper.save_soon()

    def verified(self, ike_id: IkeId) -> None:
        """Nothing to do: the client's own request confirms."""

    def down(self, info: SaInfo) -> None:
        """VICI says an SA went down. In state DELETING one of the sides wanted that; else the gateway is dead."""
        if self._sessions.is_leaving(info.spis):
            return
        if info.state == "DELETING":
            self._sessions.ended(info)
            self.keeper.save_soon()
            self._comeback.stop(info.connection)
        elif self._config.resume_on_down and self._sessions.configured(info.connection):
            log.info(
                "gateway-dead",
                connection=info.connection,
                gateway=info.remote.address,
                spi_i=info.spi_i.hex(),
                spi_r=info.spi_r.hex(),
            )
            self._comeback.start(info.connection)

    # news from the wire

    def datagrams(self, batch: Sequence[Datagram]) -> None:
        """What reached this host: answers to IKE_SA_INIT and INFORMATIONAL, and all of exchange type 240."""
        for datagram in batch:
            if datagram.ike[EXCHANGE_OFFSET] == ExchangeType.STUB:
                message = gateway_message(datagram.ike)
                if message is not None and message.move is not None:
                    self._mover.asked(message)
                elif message is not None:
                    self.keeper.received(message)
            else:
                self._asker.datagram(datagram)

    # moving

    async def resume(self, connection: str | None = None, to: str | None = None) -> Outcome:
        """Move the SA of `connection` (default: the first configured one that is up or was lost), to the gateway
        `to` (default: the configured ones in order, the one it is on last)."""
        if connection is not None and not self._sessions.configured(connection):
            return self._done(Outcome(Result.FAILED, connection, to, reason="connection-not-configured"))
        name = connection or self._sessions.default()
        if name is None:
            return self._done(Outcome(Result.FAILED, None, None, reason="no-ike-sa"))
        return await asyncio.shield(self._begin(name, to))

    def _sent_away(self, connection: str, to: str) -> asyncio.Task[Outcome] | None:
        """Move a session whose gateway asked for it; None where it moves already."""
        return None if connection in self._moving else self._begin(connection, to, stay=True)

    def _begin(self, connection: str, to: str | None, *, stay: bool = False) -> asyncio.Task[Outcome]:
        """`stay`: its gateway lives, so it stays there where the other one does not resume it."""
        task = self._moving.get(connection)
        if task is None:
            task = spawn(f"move {connection}", self._move(connection, to, stay))
            self._moving[connection] = task
            task.add_done_callback(lambda _: self._moving.pop(connection, None))
        return task

    async def _move(self, connection: str, to: str | None, stay: bool) -> Outcome:
        try:
            return self._done(await self._attempt(connection, to, stay))
        except Exception as error:
            log.exception("move-failed", connection=connection)
            return self._done(Outcome(Result.FAILED, connection, None, reason=f"internal: {type(error).__name__}"))

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

    async def _attempt(self, connection: str, to: str | None, stay: bool) -> Outcome:
        sa = self._sessions.find(connection)
        candidates = self._candidates(sa, to)
        if not candidates:
            return Outcome(Result.FAILED, connection, to, reason="gateway-not-configured")
        began = self._clock()
        if sa is None:
            old = self._sessions.unresumable(connection)
            return await self._fallback(candidates, old, "no-ike-sa" if old is None else "not-resumable", began)
        if not self._charon.channel.ready():
            if stay:
                return Outcome(Result.FAILED, connection, to, reason="charon-unavailable")
            return await self._fallback(candidates, sa, "charon-unavailable", began)
        reason = "no-answer"
        for position, gateway in enumerate(candidates):
            try:
                answer = await self._asker.ask(sa, gateway)
            except NoAnswerError:
                log.info("gateway-silent", gateway=gateway.address, connection=connection, **sa.id.logged)
                continue
            except RefusedError as error:
                reason = str(error)
                log.info(
                    "resumption-refused",
                    gateway=gateway.address,
                    connection=connection,
                    reason=reason,
                    **sa.id.logged,
                )
                if stay:
                    return Outcome(Result.FAILED, connection, to, reason=reason)
                return await self._fallback([gateway, *candidates[position + 1 :]], sa, reason, began)
            try:
                new, names, up = await self._handover.resume(sa, gateway, answer, self._asker.confirm)
            except (ViciError, ChannelError, HaError) as error:
                log.warning(
                    "resumed-sa-unusable",
                    gateway=gateway.address,
                    connection=connection,
                    reason=str(error),
                    **sa.id.logged,
                )
                still = sa if sa.id.spis in self._charon.tracker.sas else None
                return await self._fallback([gateway, *candidates[position + 1 :]], still, "sa-unusable", began)
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
        if stay:
            return Outcome(Result.FAILED, connection, to, reason=reason)
        return await self._fallback(candidates, sa, reason, began)

    def _candidates(self, sa: IkeSa | None, to: str | None) -> list[GatewayEntry]:
        if to is not None:
            return [g for g in self._config.gateways if g.address == to]
        here = sa.remote.address if sa and sa.remote else None
        known = [g for g in self._config.gateways if self._charon.connection(g.connection) is not None]
        for gateway in self._config.gateways:
            if gateway not in known:
                log.error(
                    "connection-missing", connection=gateway.connection, mend="add it to swanctl.conf and load it"
                )
        # a stable sort: the configured order, but the gateway that the SA is on comes last; or first, where it was this
        # host that failed
        first = sa is not None and sa.id.spis in self._restored
        return sorted(known or self._config.gateways, key=lambda g: (g.address == here) is not first)

    async def _fallback(self, candidates: list[GatewayEntry], old: IkeSa | None, reason: str, began: float) -> Outcome:
        """The usual handshake (draft-xu-ike-sa-sync-01 section 4), at the first gateway that takes it."""
        for gateway in candidates:
            if self._charon.connection(gateway.connection) is None:
                log.error(
                    "connection-missing", connection=gateway.connection, mend="add it to swanctl.conf and load it"
                )
                continue
            try:
                names = await self._handover.anew(old, gateway)
            except (ViciError, ChannelError, HaError) as error:
                log.warning(
                    "handshake-failed",
                    gateway=gateway.address,
                    connection=gateway.connection,
                    reason=str(error),
                )
                continue
            self._sessions.replaced_all()
            return Outcome(
                Result.FALLBACK,
                gateway.connection,
                gateway.address,
                children=tuple(names),
                total_ms=_milliseconds(self._clock() - began),
                reason=reason,
                **self._spis_of(gateway.connection),
            )
        if old is not None and old.id.spis not in self._charon.tracker.sas:
            self._sessions.lose(old)
        return Outcome(Result.FAILED, candidates[0].connection, candidates[0].address, reason=reason)

    def _spis_of(self, connection: str) -> dict[str, Any]:
        sa = self._sessions.find(connection)
        return {"spi_i": sa.id.spi_i.hex(), "spi_r": sa.id.spi_r.hex()} if sa else {}


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)
