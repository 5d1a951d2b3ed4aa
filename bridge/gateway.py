"""The gateway's side of a resumption: from a request with IKE_SA_SYNC to a confirmed IKE_SA, or to plain charon.

Packets come in batches and stay in order; one task takes all that wait, asks the bank for their stubs in one round
trip, installs what is to be rebuilt as one batch, and answers. Whatever is not answered here goes on to charon as it
came. An SA that was rebuilt here is in one of these states (protocol rules 2 and 3):

    INSTALLING --charon has it, answer sent--> UNCONFIRMED --first verified request--> confirmed: an SA like any other
                                                    '-----confirm_timeout------------> removed in silence
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import structlog

from bridge.admission import Admission, Demand, Verdict
from bridge.bank.writer import Writer
from bridge.charon.channel import ChannelError
from bridge.charon.charon import Charon
from bridge.charon.ha import HaError, IkeId
from bridge.charon.install import Install
from bridge.charon.sa import Sa, new_conditions
from bridge.config import Sync
from bridge.handout import Handout
from bridge.ike.cookie import Cookies, glance
from bridge.ike.exchange import SyncRequest, build_response, nat_hash, parse_request, verify_request
from bridge.ike.keys import derive_sk_d, skeyseed_resume
from bridge.ike.message import ExchangeType, MalformedMessage
from bridge.lookup import Lookup, Missing
from bridge.metrics import GatewayMetrics
from bridge.net.datagram import EXCHANGE_OFFSET
from bridge.net.interface import Packet, Sender
from bridge.rates import Rate
from bridge.stub import Endpoint, Index, Stub

log = structlog.get_logger()

NONCE_OCTETS = 32
"""at least half the key size of every prf (RFC 7296 section 2.10)"""
ATTEMPTS_PER_STUB = 4
"""unconfirmed SAs from one stub at most: a client may start anew, and an old request of its may be replayed"""
GET_BATCH = 256
"""stubs asked of the bank at once at most: opening them is work, and must not make their own answer late"""
INSTALL_BATCH = 512
"""SAs installed with one activation at most: what comes first shall not wait long for what comes last"""
ANY_REVISION = 2**53
"""more than any revision, which is milliseconds of Unix time"""
REFUSALS_LOGGED = 20
"""lines a second at most: whoever sends nonsense shall not fill the disk with it"""


class Refusal(StrEnum):
    """Why a request with IKE_SA_SYNC went on to charon."""

    NO_STUB = "no-stub"
    STUB_EXPIRED = "stub-expired"
    PROOF_MISSING = "proof-missing"
    PROOF_WRONG = "proof-wrong"
    BANK_UNAVAILABLE = "bank-unavailable"
    CHARON_UNAVAILABLE = "charon-unavailable"
    CONNECTION_MISSING = "connection-missing"
    TOO_MANY_UNCONFIRMED = "too-many-unconfirmed"
    SOURCE_UNCONFIRMED = "source-unconfirmed"
    SOURCE_RATE = "source-rate"


class State(StrEnum):
    INSTALLING = "installing"
    UNCONFIRMED = "unconfirmed"


@dataclass(slots=True, eq=False)
class Rebuilt:
    """An SA that was rebuilt here and has not carried a verified message yet."""

    digest: bytes
    response: bytes
    old: Stub
    sa: Sa
    install: Install
    state: State = State.INSTALLING
    deadline: float = field(default=0.0)


Waiting = tuple[Packet, SyncRequest, bytes]


class Gateway:
    """Answers IKE_SA_SYNC on one gateway. `packets` takes intercepted batches; charon's messages arrive through
    `verified` (see bridge.charon.extract.Listener)."""

    def __init__(
        self,
        charon: Charon,
        lookup: Lookup,
        handout: Handout,
        writer: Writer,
        sender: Sender,
        sync: Sync,
        metrics: GatewayMetrics,
        publish: Callable[[Sa], None],
        *,
        random: Callable[[int], bytes] = os.urandom,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._charon = charon
        self._lookup = lookup
        self._handout = handout
        self._writer = writer
        self._sender = sender
        self._sync = sync
        self._cookies = Cookies(random=random)
        self._admission = Admission(sync, self._cookies)
        self._metrics = metrics
        metrics.expect(Refusal, Demand)
        self._publish = publish
        self._random = random
        self._clock = clock
        self._wall = wall
        self._lines = Rate(REFUSALS_LOGGED)
        self._unlogged = 0
        self._demanding = False
        self._waiting: list[Waiting] = []
        self._wake = asyncio.Event()
        self._prepared: list[tuple[Packet, Rebuilt]] = []
        self._installable = asyncio.Event()
        self._by_digest: dict[bytes, Rebuilt] = {}
        self._by_spis: OrderedDict[bytes, Rebuilt] = OrderedDict()
        self._by_index: dict[Index, list[Rebuilt]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to serve; call on the event loop."""
        self._tasks = [
            asyncio.create_task(self._serve(), name="serve"),
            asyncio.create_task(self._install_prepared(), name="install"),
            asyncio.create_task(self._remove_unconfirmed(), name="unconfirmed"),
        ]

    async def close(self) -> None:
        """Stop serving; undecided packets go to charon, unconfirmed SAs are removed."""
        for task in self._tasks:
            task.cancel()
        for packet in [*(waiting[0] for waiting in self._waiting), *(ready[0] for ready in self._prepared)]:
            packet.accept()
        self._waiting.clear()
        self._prepared.clear()
        with contextlib.suppress(ChannelError):
            await self._remove(list(self._by_spis.values()))

    @property
    def unconfirmed(self) -> int:
        """SAs rebuilt here that wait for their first verified message."""
        return len(self._by_spis)

    @property
    def demanding(self) -> bool:
        """Whether every request must carry a cookie now."""
        return self._admission.demanding(self._load, self._clock())

    @property
    def _load(self) -> int:
        """SAs unconfirmed, and requests that wait to become one."""
        return len(self._by_spis) + len(self._waiting)

    # packets

    def packets(self, batch: Sequence[Packet]) -> None:
        """Take in intercepted requests. Decides at once on all but those that name a stub.

        In a flood almost all of them end with a cookie: up to there a packet meets nothing but `glance` and `judge`.
        """
        now = self._clock()
        requests = 0
        for packet in batch:
            if packet.ike[EXCHANGE_OFFSET] == ExchangeType.STUB:
                self._handout.received(packet)
                continue
            try:
                seen = glance(packet.ike)
            except MalformedMessage as error:
                self._malformed(packet, error)
                continue
            if seen is None:
                self._charon.landing.handshake_seen(packet.src, now)
                packet.accept()
                continue
            requests += 1
            verdict = self._admission.judge(seen, packet.src, packet.sport, self._load, now)
            if verdict is Verdict.SERVE:
                self._take(packet)
            elif verdict is Verdict.REFUSE:
                packet.accept()
                self._metrics.refused(Refusal.SOURCE_RATE)
            else:
                packet.drop()
                self._answer(packet, self._cookies.challenge(seen, packet.src, packet.sport, now))
                self._metrics.challenged(verdict)
        self._metrics.requests.inc(requests)
        if self._waiting:
            self._wake.set()

    def _take(self, packet: Packet) -> None:
        """A request that may be served."""
        try:
            request = parse_request(packet.ike)
        except MalformedMessage as error:
            self._malformed(packet, error)
            return
        # what a first look takes for a request with IKE_SA_SYNC is one, or malformed
        assert request is not None
        digest = hashlib.sha256(packet.ike).digest()
        if not self._answered_before(packet, digest):
            self._waiting.append((packet, request, digest))

    def _malformed(self, packet: Packet, error: MalformedMessage) -> None:
        self._metrics.malformed.inc()
        log.debug("request-malformed", peer=packet.src, reason=str(error))
        packet.accept()

    def _answered_before(self, packet: Packet, digest: bytes) -> bool:
        """Rule 3: one answer to one request. Same octets get the same answer, wherever they come from; while it is
        still in the making, none."""
        rebuilt = self._by_digest.get(digest)
        if rebuilt is None:
            return False
        packet.drop()
        self._metrics.retransmissions.inc()
        if rebuilt.state is State.UNCONFIRMED:
            self._answer(packet, rebuilt.response)
        return True

    def _answer(self, packet: Packet, response: bytes) -> None:
        try:
            self._sender.send(packet.dst, packet.dport, packet.src, packet.sport, response, packet.marker)
        except OSError as error:
            log.warning("answer-not-sent", peer=packet.src, reason=error.strerror)

    async def _serve(self) -> None:
        while True:
            await self._wake.wait()
            batch, self._waiting = self._waiting[:GET_BATCH], self._waiting[GET_BATCH:]
            if not self._waiting:
                self._wake.clear()
            if not batch:
                continue
            try:
                await self._serve_batch(batch)
            except Exception:
                log.exception("batch-failed", requests=len(batch))
            finally:
                # fail open; for packets that were decided on this does nothing
                for packet, _, digest in batch:
                    if digest not in self._by_digest:
                        packet.accept()

    async def _serve_batch(self, batch: list[Waiting]) -> None:
        if not self._charon.ready():
            self._refuse_all(batch, Refusal.CHARON_UNAVAILABLE)
            return
        stubs = await self._lookup.find([request for _, request, _ in batch])
        for (packet, request, digest), stub in zip(batch, stubs, strict=True):
            if self._answered_before(packet, digest):
                continue
            made = Refusal(stub) if isinstance(stub, Missing) else self._consider(packet, request, digest, stub)
            if isinstance(made, Refusal):
                self._refuse(packet, request, made)
            else:
                self._prepare(packet, made)

    def _refuse_all(self, batch: list[Waiting], reason: Refusal) -> None:
        for packet, request, _ in batch:
            self._refuse(packet, request, reason)

    def _refuse(self, packet: Packet, request: SyncRequest, reason: Refusal) -> None:
        packet.accept()
        self._metrics.refused(reason)
        if not self._lines.take(self._clock()):
            self._unlogged += 1
            return
        unlogged, self._unlogged = self._unlogged, 0
        level = log.warning if reason in (Refusal.PROOF_WRONG, Refusal.CONNECTION_MISSING) else log.info
        level(
            "resumption-refused",
            reason=str(reason),
            peer=packet.src,
            gateway=request.sync.gateway,
            spi=request.sync.spi.hex(),
            **({"not_logged_before": unlogged} if unlogged else {}),
        )

    # one request

    def _consider(self, packet: Packet, request: SyncRequest, digest: bytes, stub: Stub) -> Rebuilt | Refusal:
        """Rules 1 and 7: a proven request and the sealed stub alone decide."""
        if stub.index in self._lookup.spent:
            # while the stubs of this batch were fetched
            return Refusal.NO_STUB
        if stub.expires <= self._wall():
            return Refusal.STUB_EXPIRED
        if request.proof is None:
            if self._sync.proof == "required" or request.sync.attributes:
                return Refusal.PROOF_MISSING
        elif not verify_request(request, stub.suite.prf, stub.sk_d):
            return Refusal.PROOF_WRONG
        if self._charon.connection(stub.connection) is None:
            return Refusal.CONNECTION_MISSING
        if (
            len(self._by_spis) >= self._sync.max_unconfirmed
            or len(self._by_index.get(stub.index, ())) >= ATTEMPTS_PER_STUB
        ):
            return Refusal.TOO_MANY_UNCONFIRMED
        if self._admission.full(packet.src):
            return Refusal.SOURCE_UNCONFIRMED
        return self._rebuild(packet, request, digest, stub)

    def _rebuild(self, packet: Packet, request: SyncRequest, digest: bytes, stub: Stub) -> Rebuilt:
        ike_id = IkeId(request.spi_i, self._random(8), False)
        nonce = self._random(NONCE_OCTETS)
        suite = stub.suite
        local, remote = Endpoint(packet.dst, packet.dport), Endpoint(packet.src, packet.sport)
        seed = skeyseed_resume(suite.prf, stub.sk_d, request.nonce, nonce)
        lifetime = self._lifetime(stub)
        conditions = new_conditions(
            stub.conditions,
            initiator=False,
            nat_here=_differs(request.nat_destination, request.spi_i, local),
            nat_there=_differs(request.nat_source, request.spi_i, remote),
        )
        now = int(self._wall())
        sa = Sa(
            id=ike_id,
            suite=suite,
            sk_d=derive_sk_d(suite, seed, request.nonce, nonce, ike_id.spi_i, ike_id.spi_r),
            local_id=stub.local_id,
            remote_id=stub.remote_id,
            eap_id=stub.eap_id,
            local=local,
            remote=remote,
            connection=stub.connection,
            conditions=conditions,
            extensions=stub.extensions,
            remote_vips=stub.remote_vips,
            established=now,
            expires=now + lifetime,
            companion=True,
        )
        response = build_response(
            request,
            spi_r=ike_id.spi_r,
            nonce=nonce,
            prf=suite.prf,
            sk_d_old=stub.sk_d,
            lifetime=lifetime,
            sealed_stub=self._handout.seal(sa) if request.sync.attributes else None,
            nat=(local.address, local.port, remote.address, remote.port),
        )
        install = Install(
            id=ike_id,
            suite=suite,
            sk_d_old=stub.sk_d,
            nonce_i=request.nonce,
            nonce_r=nonce,
            local_id=stub.local_id,
            remote_id=stub.remote_id,
            eap_id=stub.eap_id,
            local=local,
            remote=remote,
            connection=stub.connection,
            conditions=conditions,
            extensions=stub.extensions,
            local_vips=stub.local_vips,
            remote_vips=stub.remote_vips,
        )
        return Rebuilt(digest, response, stub, sa, install)

    def _lifetime(self, stub: Stub) -> int:
        """What charon will give the rebuilt SA: that of a fresh one of its connection."""
        connection = self._charon.connection(stub.connection)
        return connection.lifetime if connection and connection.lifetime else int(stub.expires - self._wall())

    def _prepare(self, packet: Packet, made: Rebuilt) -> None:
        self._by_digest[made.digest] = made
        self._by_index.setdefault(made.old.index, []).append(made)
        self._by_spis[made.sa.id.spis] = made
        self._admission.rebuilt(packet.src)
        self._charon.tracker.adopt(made.sa)
        self._prepared.append((packet, made))
        self._installable.set()

    async def _install_prepared(self) -> None:
        """All that is ready becomes one batch with one activation; meanwhile the next stubs are fetched."""
        while True:
            await self._installable.wait()
            await self._charon.installer.turn()
            batch, self._prepared = self._prepared[:INSTALL_BATCH], self._prepared[INSTALL_BATCH:]
            if not self._prepared:
                self._installable.clear()
            if not batch:
                continue
            try:
                await self._install(batch)
            except HaError:
                # one stub that charon cannot be told must not cost the others their turn
                for one in batch:
                    await self._install_alone(one)
            except Exception:
                log.exception("install-failed", sas=len(batch))
                self._give_up(batch)

    async def _install_alone(self, one: tuple[Packet, Rebuilt]) -> None:
        try:
            await self._install([one])
        except HaError as error:
            log.warning("stub-not-installable", index=str(one[1].old.index), reason=str(error))
            self._give_up([one])

    def _give_up(self, batch: list[tuple[Packet, Rebuilt]]) -> None:
        for packet, made in batch:
            self._forget(made)
            packet.accept()
            self._metrics.refused(Refusal.CHARON_UNAVAILABLE)

    async def _install(self, rebuilt: list[tuple[Packet, Rebuilt]]) -> None:
        void = [pair for pair in rebuilt if not self._wanted(pair[1])]
        self._give_up(void)
        rebuilt = [pair for pair in rebuilt if self._wanted(pair[1])]
        if not rebuilt:
            return
        began = self._clock()
        try:
            await self._charon.installer.install([made.install for _, made in rebuilt])
        except ChannelError as error:
            log.error("install-failed", sas=len(rebuilt), reason=str(error))
            self._give_up(rebuilt)
            return
        now = self._clock()
        self._metrics.install_seconds.observe(now - began)
        self._metrics.activation_seconds.observe(self._charon.installer.toggle_seconds)
        # another attempt of the same client may have been confirmed meanwhile
        void = [pair for pair in rebuilt if not self._wanted(pair[1])]
        if void:
            await self._drop([made.sa.id for _, made in void])
            self._give_up(void)
            rebuilt = [pair for pair in rebuilt if self._wanted(pair[1])]
        for packet, made in rebuilt:
            made.state = State.UNCONFIRMED
            made.deadline = now + self._sync.confirm_timeout
            packet.drop()
            self._answer(packet, made.response)
            log.debug(
                "sa-rebuilt",
                peer=packet.src,
                connection=made.sa.connection,
                spi_i=made.sa.id.spi_i.hex(),
                spi_r=made.sa.id.spi_r.hex(),
                old_gateway=made.old.index.gateway,
                old_spi=made.old.index.spi.hex(),
            )

    def _wanted(self, made: Rebuilt) -> bool:
        return self._by_spis.get(made.sa.id.spis) is made

    # what becomes of it

    def verified(self, ike_id: IkeId) -> None:
        """Rule 2: the first request that verified under the new keys confirms the SA."""
        made = self._by_spis.get(ike_id.spis)
        if made is None:
            return
        self._forget(made, keep_sa=True)
        index, sa = made.old.index, made.sa
        others = self._by_index.get(index, [])[:]
        for other in others:
            self._forget(other)
        self._lookup.spent.add(index)
        # whatever the old gateway may have written since: the session is here now
        self._writer.submit_delete(index, ANY_REVISION)
        void = [other.sa.id for other in others]
        old_id = IkeId(made.old.spi_i, made.old.spi_r, made.old.initiator)
        if self._charon.tracker.forget(old_id) is not None:
            # the old SA is here too: the client lost its path, not this gateway
            void.append(old_id)
        if void:
            self._drop_later(void)
        sa.up = True
        self._metrics.resumed.inc()
        self._publish(sa)
        self._charon.reconcile_soon()
        log.info(
            "sa-resumed",
            connection=sa.connection,
            spi_i=sa.id.spi_i.hex(),
            spi_r=sa.id.spi_r.hex(),
            peer=sa.remote.address if sa.remote else "",
            old_gateway=index.gateway,
            old_spi=index.spi.hex(),
        )

    def gone(self, sa: Sa) -> None:
        """charon ended an SA: nothing waits for it any more."""
        if self._handout.policy != "off":
            # its client may still hold a stub, and the bank be away
            self._lookup.spent.add(self._handout.index(sa))
        made = self._by_spis.get(sa.id.spis)
        if made is not None:
            self._forget(made)

    def _forget(self, made: Rebuilt, *, keep_sa: bool = False) -> None:
        self._by_digest.pop(made.digest, None)
        if self._by_spis.pop(made.sa.id.spis, None) is not None:
            self._admission.settled(made.install.remote.address)
        attempts = self._by_index.get(made.old.index, [])
        if made in attempts:
            attempts.remove(made)
        if not attempts:
            self._by_index.pop(made.old.index, None)
        if not keep_sa:
            self._charon.tracker.forget(made.sa.id)
            if made.state is State.UNCONFIRMED and self._handout.policy != "off":
                # its client got a stub of it: worth nothing now
                self._lookup.spent.add(self._handout.index(made.sa))
                self._writer.submit_delete(self._handout.index(made.sa), ANY_REVISION)

    async def _remove(self, gone: list[Rebuilt]) -> None:
        """Raises ChannelError, and then has forgotten none: the next attempt is soon."""
        if gone and self._charon.channel.ready():
            await self._charon.installer.delete([made.sa.id for made in gone])
        for made in gone:
            self._forget(made)

    def _drop_later(self, ike_ids: list[IkeId]) -> None:
        task = asyncio.ensure_future(self._drop(ike_ids))
        self._tasks.append(task)
        task.add_done_callback(self._tasks.remove)

    async def _drop(self, ike_ids: list[IkeId]) -> None:
        try:
            await self._charon.installer.delete(ike_ids)
        except ChannelError as error:
            log.warning("old-sa-not-removed", reason=str(error))

    async def _remove_unconfirmed(self) -> None:
        """Removes what was not confirmed in time; the table is in order of age."""
        while True:
            await asyncio.sleep(min(1.0, self._sync.confirm_timeout / 4))
            now = self._clock()
            late = []
            for made in self._by_spis.values():
                if made.state is State.UNCONFIRMED:
                    if made.deadline > now:
                        break
                    late.append(made)
            try:
                await self._remove(late)
            except ChannelError as error:
                log.warning("unconfirmed-not-removed", reason=str(error))
                late = []
            for made in late:
                self._metrics.removed.inc()
                log.info(
                    "sa-unconfirmed-removed",
                    spi_i=made.sa.id.spi_i.hex(),
                    spi_r=made.sa.id.spi_r.hex(),
                    peer=made.install.remote.address,
                )
            self._tell_whether_demanding()

    def _tell_whether_demanding(self) -> None:
        if self.demanding == self._demanding:
            return
        self._demanding = not self._demanding
        if self._demanding:
            log.warning("cookies-demanded", unconfirmed=len(self._by_spis), waiting=len(self._waiting))
        else:
            log.info("cookies-no-longer-demanded")


def _differs(hashes: Sequence[bytes], spi_i: bytes, seen: Endpoint) -> bool:
    """NAT detection (RFC 7296 section 2.23): the peer sent hashes and none is of the address seen here."""
    return bool(hashes) and nat_hash(spi_i, bytes(8), seen.address, seen.port) not in hashes
