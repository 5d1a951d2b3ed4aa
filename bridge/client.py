"""The client's side of a resumption: one IKE_SA moved to another gateway, or set up anew when that is refused.

    IDLE --resume--> ASKING --proven answer--> INSTALLING --charon has it--> CHILDREN --all up--> resumed
                       |  '--no answer-> ASKING the next gateway                |
                       '--refused, or none answers------------------------------'--> FALLBACK --> fallback or failed

What the wire says before the keys have proved themselves is believed in nothing but the responder's nonce (protocol
rule 6): an ordinary answer ends the attempt only after the time in which a proven one could still come.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import msgspec
import structlog

from bridge.charon.channel import ChannelError
from bridge.charon.charon import Charon
from bridge.charon.ha import HaError, IkeId
from bridge.charon.install import Install
from bridge.charon.sa import Sa, new_conditions
from bridge.charon.vici import SaInfo, ViciError
from bridge.config import ClientConfig, GatewayEntry
from bridge.held import Keeper, gateway_message
from bridge.ike.exchange import (
    CookieChallenge,
    OrdinaryResponse,
    SyncResponse,
    build_request,
    nat_hash,
    parse_response,
    verify_response,
)
from bridge.ike.groups import fresh_public_value
from bridge.ike.keys import derive_sk_d, skeyseed_resume
from bridge.ike.message import ExchangeType, MalformedMessage
from bridge.ike.sync import Attribute
from bridge.metrics import ClientMetrics
from bridge.net.datagram import EXCHANGE_OFFSET, Datagram
from bridge.net.interface import Sender
from bridge.stub import Endpoint

log = structlog.get_logger()

NONCE_OCTETS = 32
BACK_OFF = 1.8
"""each retransmission waits this much longer than the one before, as charon's do"""
MAX_COOKIES = 4
"""taken in one attempt: the first may be forged, or the gateway's secret change meanwhile"""
LOST_SECONDS = 86_400.0
"""how long an SA that charon gave up can still be resumed from here, unless it expires before"""
NEWS_SECONDS = 0.05
RETURN_MIN, RETURN_MAX = 5.0, 60.0
"""between attempts to come back when no gateway can be reached"""
IKE_PORT = 500
NATT_PORT = 4500


class Result(StrEnum):
    RESUMED = "resumed"
    FALLBACK = "fallback"
    FAILED = "failed"


class Outcome(msgspec.Struct, frozen=True):
    """What became of one attempt, as `ike-sa-sync resume --json` prints it. SPIs in hex, times in milliseconds."""

    result: Result
    connection: str | None
    gateway: str | None
    spi_i: str | None = None
    spi_r: str | None = None
    children: tuple[str, ...] = ()
    exchange_ms: float | None = None
    total_ms: float | None = None
    reason: str | None = None


class RefusedError(Exception):
    """The gateway did not resume; the text is the reason."""


class NoAnswerError(Exception):
    """The gateway did not answer."""


@dataclass(slots=True, eq=False)
class Answer:
    """A proven answer, and what belongs to it."""

    ike_id: IkeId
    nonce_i: bytes = field(repr=False)
    nonce_r: bytes = field(repr=False)
    local: Endpoint
    remote: Endpoint
    nat_here: bool
    nat_there: bool
    exchange: float
    """seconds from the request to the accepted answer"""
    sealed_stub: bytes | None = field(repr=False)
    lifetime: int | None


class Client:
    """Moves the IKE_SAs of one charon. Datagrams arrive through `datagrams`, charon's news through the methods of
    bridge.charon.extract.Listener."""

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
        self._sender = sender
        self._config = config
        self._metrics = metrics
        self._random = random
        self._clock = clock
        self._wall = wall
        self._lost: dict[str, tuple[Sa, float]] = {}
        self._moving: dict[str, asyncio.Task[Outcome]] = {}
        self._listening: dict[bytes, asyncio.Queue[Datagram]] = {}
        self._leaving: set[bytes] = set()
        self._ended: deque[bytes] = deque(maxlen=64)
        self._returning: dict[str, asyncio.Task[None]] = {}
        self._restored: set[bytes] = set()
        self.keeper = Keeper(config.held, charon.tracker, sender, self._sessions, random=random, wall=wall)
        self.last: Outcome | None = None

    async def restore(self) -> None:
        """Take up the sessions that were kept in the file when this host went down. Once charon has its connections,
        one of them is resumed, unless the operator wants that otherwise or charon has begun a session by itself."""
        for sa in self.keeper.restore():
            if self._gateway_of(sa) is not None:
                self._lost[sa.connection] = (sa, self._clock() + LOST_SECONDS)
                self._restored.add(sa.id.spis)
        if not self._lost or not self._config.resume_on_down:
            return
        names = {gateway.connection for gateway in self._config.gateways}
        await self._charon.reconciled.wait()
        while not any(self._charon.connection(name) for name in names):  # noqa: ASYNC110 - nothing tells of them
            await asyncio.sleep(NEWS_SECONDS)
        begun = {info.connection for info in await self._charon.vici.list_sas()}
        if self._lost and not names & begun:
            self._come_back(next(iter(self._lost)))

    # news from charon (Listener)

    def changed(self, sa: Sa) -> None:
        """An SA that is up replaces what was lost of its connection."""
        self._lost.pop(sa.connection, None)
        if self._gateway_of(sa) is not None and sa.resumable:
            self.keeper.changed(sa)

    def gone(self, sa: Sa) -> None:
        """charon ended an SA. Until VICI says why, it may have to be resumed."""
        if (
            sa.id.spis not in self._leaving
            and sa.id.spis not in self._ended
            and sa.resumable
            and self._gateway_of(sa) is not None
        ):
            self._lost[sa.connection] = (sa, self._clock() + LOST_SECONDS)
        self.keeper.save_soon()

    def verified(self, ike_id: IkeId) -> None:
        """Nothing to do: the client's own request confirms."""

    def down(self, info: SaInfo) -> None:
        """VICI says an SA went down. In state DELETING one of the sides wanted that; else the gateway is dead."""
        if info.spis in self._leaving:
            return
        if info.state == "DELETING":
            self._wanted_down(info)
            return
        if self._config.resume_on_down and any(g.connection == info.connection for g in self._config.gateways):
            log.info("gateway-dead", connection=info.connection, gateway=info.remote.address)
            self._come_back(info.connection)

    def _come_back(self, connection: str) -> None:
        task = self._returning.get(connection)
        if task is None or task.done():
            self._returning[connection] = asyncio.create_task(self._return(connection))

    async def _return(self, connection: str) -> None:
        """Resume what went down, again and again while no gateway can be reached: the fault may be on this side."""
        # the HA message with the same news may still be on its way
        pause = NEWS_SECONDS
        while True:
            await asyncio.sleep(pause)
            if self._configured_up():
                return
            outcome = await asyncio.shield(self._begin(connection, None))
            if outcome.result is not Result.FAILED:
                return
            pause = min(max(2 * pause, RETURN_MIN), RETURN_MAX)

    def _configured_up(self) -> bool:
        names = {gateway.connection for gateway in self._config.gateways}
        return any(sa.connection in names for sa in self._charon.tracker.established())

    def _wanted_down(self, info: SaInfo) -> None:
        """One of the sides ended it: nothing to resume, nor to go on trying."""
        self._lost.pop(info.connection, None)
        self._ended.append(info.spis)
        self.keeper.save_soon()
        task = self._returning.pop(info.connection, None)
        if task is not None:
            task.cancel()

    def _sessions(self) -> list[Sa]:
        """The IKE_SAs that could be resumed now, one of each configured connection."""
        names = dict.fromkeys(gateway.connection for gateway in self._config.gateways)
        return [sa for name in names if (sa := self._find(name)) is not None]

    def _gateway_of(self, sa: Sa) -> GatewayEntry | None:
        return next((g for g in self._config.gateways if g.connection == sa.connection), None)

    # news from the wire

    def datagrams(self, batch: Sequence[Datagram]) -> None:
        """Answers to IKE_SA_INIT, and what gateways send in exchange type 240, that reached this host."""
        for datagram in batch:
            if datagram.ike[EXCHANGE_OFFSET] == ExchangeType.STUB:
                message = gateway_message(datagram.ike)
                if message is not None:
                    self.keeper.received(message)
                continue
            queue = self._listening.get(datagram.ike[:8])
            if queue is not None and queue.qsize() < 64:
                queue.put_nowait(datagram)

    # moving

    async def resume(self, connection: str | None = None, to: str | None = None) -> Outcome:
        """Move the SA of `connection` (default: the first configured one that is up or was lost), to the gateway
        `to` (default: the configured ones in order, the one it is on last)."""
        if connection is not None and all(g.connection != connection for g in self._config.gateways):
            return self._done(Outcome(Result.FAILED, connection, to, reason="connection-not-configured"))
        name = connection or self._default_connection()
        if name is None:
            return self._done(Outcome(Result.FAILED, None, None, reason="no-ike-sa"))
        return await asyncio.shield(self._begin(name, to))

    def _begin(self, connection: str, to: str | None) -> asyncio.Task[Outcome]:
        task = self._moving.get(connection)
        if task is None:
            task = asyncio.create_task(self._move(connection, to), name=f"move {connection}")
            self._moving[connection] = task
            task.add_done_callback(lambda _: self._moving.pop(connection, None))
        return task

    def _default_connection(self) -> str | None:
        """The first configured connection that is up, else the first that was lost."""
        names = [gateway.connection for gateway in self._config.gateways]
        up = {sa.connection for sa in self._charon.tracker.established() if sa.resumable}
        return next((name for name in names if name in up), None) or next(
            (name for name in names if self._find(name) is not None), None
        )

    def _find(self, connection: str) -> Sa | None:
        """The youngest SA of a connection that is up, or the one that was lost."""
        alive = [sa for sa in self._charon.tracker.established() if sa.connection == connection and sa.resumable]
        if alive:
            return max(alive, key=lambda sa: sa.seen)
        sa, until = self._lost.get(connection, (None, 0.0))
        if sa is not None and (until < self._clock() or (sa.expires and sa.expires < self._wall())):
            self._lost.pop(connection)
            return None
        return sa

    async def _move(self, connection: str, to: str | None) -> Outcome:
        try:
            return self._done(await self._attempt(connection, to))
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
        level("moved", **{key: value for key, value in msgspec.structs.asdict(outcome).items() if value})
        return outcome

    async def _attempt(self, connection: str, to: str | None) -> Outcome:
        sa = self._find(connection)
        candidates = self._candidates(sa, to)
        if not candidates:
            return Outcome(Result.FAILED, connection, to, reason="gateway-not-configured")
        began = self._clock()
        if sa is None:
            return await self._fallback(candidates, None, "no-ike-sa", began)
        if not self._charon.channel.ready():
            return await self._fallback(candidates, sa, "charon-unavailable", began)
        reason = "no-answer"
        for position, gateway in enumerate(candidates):
            try:
                answer = await self._ask(sa, gateway)
            except NoAnswerError:
                log.info("gateway-silent", gateway=gateway.address, connection=connection)
                continue
            except RefusedError as error:
                reason = str(error)
                log.info("resumption-refused", gateway=gateway.address, connection=connection, reason=reason)
                return await self._fallback([gateway, *candidates[position + 1 :]], sa, reason, began)
            try:
                return await self._complete(sa, gateway, answer, began)
            except (ViciError, ChannelError, HaError) as error:
                log.warning("resumed-sa-unusable", gateway=gateway.address, reason=str(error))
                still = sa if sa.id.spis in self._charon.tracker.sas else None
                return await self._fallback([gateway, *candidates[position + 1 :]], still, "sa-unusable", began)
        return await self._fallback(candidates, sa, reason, began)

    def _candidates(self, sa: Sa | None, to: str | None) -> list[GatewayEntry]:
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

    # the exchange

    async def _ask(self, sa: Sa, gateway: GatewayEntry) -> Answer:
        """The one round trip (draft-xu-ike-sa-sync-01 section 3.1). Raises NoAnswerError or RefusedError."""
        assert sa.local is not None
        spi_i, nonce = self._random(8), self._random(NONCE_OCTETS)
        port = NATT_PORT if sa.local.port == NATT_PORT else IKE_PORT
        marker = port == NATT_PORT
        source = _source_address(gateway.address)
        if source is None or source in sa.local_vips:
            # a tunnel that covers its own gateways: the kernel would send into it
            source = sa.local.address
        local = Endpoint(source, sa.local.port)
        index = sa.index_there()
        cookies: list[bytes] = []
        requests: list[bytes] = []
        queue: asyncio.Queue[Datagram] = asyncio.Queue()
        self._listening[spi_i] = queue
        ke_value = fresh_public_value(sa.suite.group)
        try:
            began = self._clock()
            deadline = began + self._config.resume.answer_timeout
            wait, refusal = self._config.resume.retransmit, None
            while (now := self._clock()) < deadline:
                request = build_request(
                    spi_i=spi_i,
                    suite=sa.suite,
                    ke_value=ke_value,
                    nonce=nonce,
                    sync_index=(index.gateway, index.spi),
                    prf=sa.suite.prf,
                    sk_d_old=sa.sk_d,
                    nat=(local.address, local.port, gateway.address, port),
                    cookie=cookies[-1] if cookies else None,
                    sealed_stub=self.keeper.stub_of(sa),
                )
                if request not in requests:
                    requests.append(request)
                self._send(local, Endpoint(gateway.address, port), request, marker)
                until, wait = min(now + wait, deadline), wait * BACK_OFF
                while (left := (refusal or until) - self._clock()) > 0:
                    try:
                        async with asyncio.timeout(left):
                            datagram = await queue.get()
                    except TimeoutError:
                        break
                    if datagram.src != gateway.address:
                        continue
                    answer = self._judge(datagram, requests, sa)
                    if isinstance(answer, SyncResponse):
                        return self._accepted(answer, spi_i, nonce, local, datagram, began)
                    if isinstance(answer, CookieChallenge):
                        # the answer to a retransmission holds the same one once more
                        if len(cookies) < MAX_COOKIES and answer.cookie not in cookies:
                            cookies.append(answer.cookie)
                            break
                        continue
                    if isinstance(answer, OrdinaryResponse) and refusal is None:
                        refusal = self._clock() + self._config.resume.refusal_grace
                if refusal is not None and self._clock() >= refusal:
                    raise RefusedError("refused")
            raise NoAnswerError
        finally:
            del self._listening[spi_i]

    def _judge(
        self, datagram: Datagram, requests: list[bytes], sa: Sa
    ) -> SyncResponse | OrdinaryResponse | CookieChallenge | None:
        """What an answer to the last of `requests` is; one that resumes may be to any of them, for nothing shows
        whether a cookie came from the gateway."""
        try:
            answer = parse_response(datagram.ike, requests[-1])
        except MalformedMessage as error:
            log.debug("answer-malformed", gateway=datagram.src, reason=str(error))
            return None
        if isinstance(answer, SyncResponse) and not any(
            verify_response(answer, request, sa.suite.prf, sa.sk_d) for request in requests
        ):
            log.warning("answer-proof-wrong", gateway=datagram.src)
            return None
        return answer

    def _accepted(
        self, answer: SyncResponse, spi_i: bytes, nonce: bytes, local: Endpoint, datagram: Datagram, began: float
    ) -> Answer:
        remote = Endpoint(datagram.src, datagram.sport)
        here, there = answer.nat_destination, answer.nat_source
        spi_r = answer.spi_r
        return Answer(
            ike_id=IkeId(spi_i, spi_r, True),
            nonce_i=nonce,
            nonce_r=answer.nonce,
            local=local,
            remote=remote,
            nat_here=bool(here) and nat_hash(spi_i, spi_r, local.address, local.port) not in here,
            nat_there=bool(there) and nat_hash(spi_i, spi_r, remote.address, remote.port) not in there,
            exchange=self._clock() - began,
            sealed_stub=answer.sync.first(Attribute.SEALED_STUB) if answer.sync else None,
            lifetime=answer.lifetime,
        )

    def _send(self, local: Endpoint, remote: Endpoint, request: bytes, marker: bool) -> None:
        try:
            self._sender.send(local.address, local.port, remote.address, remote.port, request, marker)
        except OSError as error:
            # no route just now: the next retransmission may have one
            log.info("request-not-sent", gateway=remote.address, reason=error.strerror)

    # after the answer

    async def _complete(self, old: Sa, gateway: GatewayEntry, answer: Answer, began: float) -> Outcome:
        new = self._rebuilt(old, gateway, answer)
        if self._charon.connection(gateway.connection) is None:
            raise ViciError(f"charon has no connection {gateway.connection!r}: add it to swanctl.conf")
        await self._charon.install_surely(self._install(old, new, answer))
        self._charon.tracker.adopt(new)
        # the new SA holds the virtual IP before the old one lets go of it
        await self._drop(old)
        wanted = self._children_of(old, gateway)
        names = await self._bring_up(gateway.connection, wanted)
        if wanted and not names:
            # the new SA never worked: the old stub stays what can be resumed (rule 6)
            await self._drop(new)
            self._lost[old.connection] = (old, self._clock() + LOST_SECONDS)
            raise ViciError(f"none of the CHILD_SAs {', '.join(wanted)} came up")
        self._lost.pop(old.connection, None)
        self.keeper.given(new, answer.sealed_stub, answer.lifetime)
        self._charon.reconcile_soon()
        return Outcome(
            Result.RESUMED,
            gateway.connection,
            gateway.address,
            new.id.spi_i.hex(),
            new.id.spi_r.hex(),
            tuple(names),
            _milliseconds(answer.exchange),
            _milliseconds(self._clock() - began),
        )

    def _rebuilt(self, old: Sa, gateway: GatewayEntry, answer: Answer) -> Sa:
        """The new SA: keys per draft-xu-ike-sa-sync-01 section 3.3, all else as in the old one."""
        suite, ike_id = old.suite, answer.ike_id
        seed = skeyseed_resume(suite.prf, old.sk_d, answer.nonce_i, answer.nonce_r)
        return Sa(
            id=ike_id,
            suite=suite,
            sk_d=derive_sk_d(suite, seed, answer.nonce_i, answer.nonce_r, ike_id.spi_i, ike_id.spi_r),
            up=True,
            local_id=old.local_id,
            remote_id=old.remote_id,
            eap_id=old.eap_id,
            local=answer.local,
            remote=answer.remote,
            connection=gateway.connection,
            conditions=new_conditions(
                old.conditions, initiator=True, nat_here=answer.nat_here, nat_there=answer.nat_there
            ),
            extensions=old.extensions,
            local_vips=old.local_vips,
            established=int(self._wall()),
            expires=old.expires,
        )

    @staticmethod
    def _install(old: Sa, new: Sa, answer: Answer) -> Install:
        assert new.local_id is not None
        assert new.remote_id is not None
        return Install(
            id=new.id,
            suite=new.suite,
            sk_d_old=old.sk_d,
            nonce_i=answer.nonce_i,
            nonce_r=answer.nonce_r,
            local_id=new.local_id,
            remote_id=new.remote_id,
            eap_id=new.eap_id,
            local=answer.local,
            remote=answer.remote,
            connection=new.connection,
            conditions=new.conditions,
            extensions=new.extensions,
            local_vips=new.local_vips,
            remote_vips=(),
        )

    def _children_of(self, old: Sa, gateway: GatewayEntry) -> list[str]:
        """Names of the CHILD_SAs to bring up: those of the old SA that the connection has; else all it has."""
        connection = self._charon.connection(gateway.connection)
        configured = [child.name for child in connection.children] if connection else []
        wanted = list(dict.fromkeys(child.name for child in old.children.values()))
        return [name for name in wanted if name in configured] or configured

    async def _drop(self, sa: Sa) -> None:
        """Remove an SA from charon in silence: no DELETE to the peer, no updown event."""
        self._leaving.add(sa.id.spis)
        try:
            self._charon.tracker.forget(sa.id)
            self._lost.pop(sa.connection, None)
            await self._charon.installer.delete([sa.id])
            await self._charon.channel.drained()
        finally:
            self._leaving.discard(sa.id.spis)

    async def _fallback(self, candidates: list[GatewayEntry], old: Sa | None, reason: str, began: float) -> Outcome:
        """The usual handshake (draft-xu-ike-sa-sync-01 section 4), at the first gateway that takes it."""
        for gateway in candidates:
            connection = self._charon.connection(gateway.connection)
            if connection is None:
                log.error(
                    "connection-missing", connection=gateway.connection, mend="add it to swanctl.conf and load it"
                )
                continue
            names = self._children_of(old, gateway) if old else [child.name for child in connection.children]
            try:
                if old is not None and old.connection == gateway.connection:
                    # charon would ask for the CHILD_SAs on the old SA
                    await self._drop(old)
                names = await self._initiate(gateway.connection, names)
                if old is not None and old.connection != gateway.connection:
                    await self._drop(old)
            except (ViciError, ChannelError, HaError) as error:
                log.warning("handshake-failed", gateway=gateway.address, reason=str(error))
                continue
            self._lost.clear()
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
            self._lost[old.connection] = (old, self._clock() + LOST_SECONDS)
        return Outcome(Result.FAILED, candidates[0].connection, candidates[0].address, reason=reason)

    async def _initiate(self, connection: str, children: list[str]) -> list[str]:
        """An IKE_SA by an ordinary handshake; names of the CHILD_SAs that came up. Raises ViciError without any: what
        did not come up in time is ended, so that it does not later."""
        up = await self._bring_up(connection, children)
        if not up:
            with contextlib.suppress(ViciError):
                await self._charon.vici.terminate(connection, 1.0, force=True)
            raise ViciError(f"{connection}: no CHILD_SA came up")
        return up

    async def _bring_up(self, connection: str, children: list[str]) -> list[str]:
        """Initiate CHILD_SAs; the names of those that came up. Where not even the first does, no other is tried."""
        up: list[str] = []
        for name in children:
            try:
                await self._charon.vici.initiate(connection, name, self._config.resume.initiate_timeout)
            except ViciError as error:
                log.warning("child-not-up", connection=connection, child=name, reason=str(error))
                if not up:
                    break
            else:
                up.append(name)
        return up

    def _spis_of(self, connection: str) -> dict[str, Any]:
        sa = self._find(connection)
        return {"spi_i": sa.id.spi_i.hex(), "spi_r": sa.id.spi_r.hex()} if sa else {}


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _source_address(gateway: str) -> str | None:
    """The local address the kernel would use towards `gateway`; None where it has no route."""
    family = socket.AF_INET6 if ":" in gateway else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((gateway, IKE_PORT))
        except OSError:
            return None
        return str(probe.getsockname()[0])
