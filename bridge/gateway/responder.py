"""The gateway's side of a resumption: from a request with IKE_SA_SYNC to a confirmed IKE_SA, or to plain charon.

Packets come in batches and stay in order; one task takes all that wait, has their stubs looked up in one round trip and
each request judged (`decision`), and gives what is to be rebuilt to the next batch that is installed (`batches`), which
answers. Requests on what was rebuilt come to `activation` until charon processes them. What was rebuilt is removed
again unless its client confirms it (`unconfirmed`). A request that is refused goes on to charon as it came; but a
client that cannot go on with charon's answer receives a notification, since charon would keep a half-open IKE_SA of its
request. What fails here goes to charon.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet

import structlog

from bridge.charon.charon import Charon
from bridge.config import SyncConfig
from bridge.gateway.activation import Activation
from bridge.gateway.admission import Admission, Demand, Verdict
from bridge.gateway.decision import NONE, Decision
from bridge.gateway.install_queue import InstallQueue
from bridge.gateway.metrics import GatewayMetrics
from bridge.gateway.rate_limit import Rate
from bridge.gateway.rebuilt import Rebuilt
from bridge.gateway.rebuilt_state import State
from bridge.gateway.recent import Recent
from bridge.gateway.refusal import Refusal, notification
from bridge.gateway.strays import Strays
from bridge.gateway.stub_lookup import Missing, StubLookup
from bridge.ike.client_requests import ESTABLISHED
from bridge.ike.cookie import glance
from bridge.ike.message import ExchangeType, MalformedMessage
from bridge.ike.resumption_request import parse_request, sync_comes_first
from bridge.ike.sync_messages import SyncRequest
from bridge.net.interface import Packet, Sender
from bridge.net.packet import EXCHANGE_OFFSET
from bridge.service.tasks import end, spawn
from bridge.stub.stub import Stub
from bridge.stub.types import Endpoint

log = structlog.get_logger()

GET_BATCH = 256
"""stubs asked of the bank together at most: opening them is work, and must not make their own answer late"""
REFUSALS_LOGGED = 20
"""lines a second at most: an attacker shall not fill the disk with them"""
WARNED_OF = (Refusal.PROOF_WRONG, Refusal.CONNECTION_MISSING, Refusal.ADDRESS_TAKEN)

SYNC_LAST_SECONDS = 86400.0
"""for so long a client counts that sends IKE_SA_SYNC last"""

Waiting = tuple[Packet, SyncRequest, bytes]
"""a packet, the request that it is, and its digest"""


def _digest(packet: Packet) -> bytes:
    return hashlib.sha256(packet.ike).digest()


class Responder:
    """Answers IKE_SA_SYNC on one gateway. `packets` takes intercepted batches; what charon says of rebuilt SAs goes to
    `unconfirmed` and `activation`."""

    def __init__(
        self,
        charon: Charon,
        lookup: StubLookup,
        admission: Admission,
        decision: Decision,
        sender: Sender,
        sync: SyncConfig,
        metrics: GatewayMetrics,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._charon = charon
        self._lookup = lookup
        self._admission = admission
        self._decision = decision
        self.unconfirmed = decision.unconfirmed
        self._sender = sender
        self._metrics = metrics
        metrics.expect(Refusal, Demand)
        self.on_stub_message: Callable[[Packet], None] = lambda _: None
        """called with messages of exchange type 240"""
        self.able: Callable[[], bool] = lambda: False
        """whether first requests on rebuilt SAs are among the packets, and the bank takes what they confirm"""
        self._clock = clock
        self.strays = Strays(metrics, clock=clock)
        self.activation = Activation(
            charon,
            metrics,
            self.strays,
            self._answer,
            lambda: self.able(),
            self._coming,
            lambda: len(self._undecided) + self._batches.unanswered,
            clock=clock,
        )
        self._batches = InstallQueue(
            charon,
            self.unconfirmed,
            self.activation,
            metrics,
            self._answer,
            self._not_installed,
            self._coming,
            clock=clock,
        )
        self._refused_is = sync.refused
        self._look_seconds = min(1.0, sync.confirm_timeout / 4)
        self._sync_last: Recent[str] = Recent(SYNC_LAST_SECONDS, clock=clock)
        self._lines = Rate(REFUSALS_LOGGED)
        self._unlogged = 0
        self._demanding = False
        self._serving = False
        self._waiting: list[Waiting] = []
        self._undecided: set[bytes] = set()
        """digests of requests whose stubs are being looked up, or that wait for it"""
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to serve; call on the event loop."""
        self._tasks = [
            spawn("serve", self._serve()),
            spawn("install", self._batches.run()),
            spawn("activate", self.activation.run()),
            spawn("unconfirmed", self._keep_looking()),
        ]

    async def close(self) -> None:
        """Stop serving; undecided packets go to charon, unconfirmed SAs are removed."""
        await end(*self._tasks)
        for packet, _, _ in self._waiting:
            if packet.held:
                self._pass_on(packet)
        self._waiting.clear()
        self._batches.close()
        await self.unconfirmed.close()
        await self.activation.close()

    @property
    def demanding(self) -> bool:
        """Whether every request must carry a cookie now."""
        return self._admission.demanding(self._load, self._clock())

    @property
    def flooded(self) -> bool:
        """Whether more comes than clients send."""
        return self.demanding or self.strays.are_a_flood

    @property
    def sync_last(self) -> int:
        """Addresses that sent a request with IKE_SA_SYNC last, as clients of release 0.1 do, within a day."""
        return len(self._sync_last)

    @property
    def _load(self) -> int:
        """SAs unconfirmed, and requests that wait to become one."""
        return len(self.unconfirmed) + len(self._waiting)

    def _coming(self) -> bool:
        return self._serving or bool(self._waiting)

    def busy(self) -> bool:
        """Whether some request is between its admission and its answer."""
        return self._coming() or self._batches.busy

    # packets

    def packets(self, batch: Sequence[Packet]) -> None:
        """Take in intercepted requests. Decides immediately on all but those that name a stub.

        In a flood almost all of them end with a cookie: up to there a packet meets nothing but `glance` and `judge`;
        and `_known`, while anything is served that it could be a repetition of.
        """
        now = self._clock()
        requests = 0
        demands: Counter[Demand] = Counter()
        for packet in batch:
            exchange = packet.ike[EXCHANGE_OFFSET]
            if exchange in ESTABLISHED:
                self.activation.packet(packet)
                continue
            if exchange == ExchangeType.STUB:
                self.on_stub_message(packet)
                continue
            try:
                seen = glance(packet.ike)
            except MalformedMessage as error:
                self._malformed(packet, error)
                continue
            if seen is None:
                self._pass_on(packet)
                continue
            requests += 1
            verdict = self._admission.judge(seen, packet.src, packet.sport, self._load, now)
            if verdict is Verdict.SERVE:
                self._take(packet)
            elif (self._undecided or self.unconfirmed) and self._known(packet, _digest(packet)):
                continue
            elif verdict is Verdict.REFUSE:
                self._refuse_unseen(packet, Refusal.SOURCE_RATE)
            else:
                packet.drop()
                self._answer(packet, self._admission.challenge(seen, packet.src, packet.sport, now))
                demands[verdict] += 1
        self._metrics.requests.inc(requests)
        for demand, count in demands.items():
            self._metrics.challenged(demand, count)
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
        if not sync_comes_first(packet.ike):
            self._sync_last.add(packet.src)
        digest = _digest(packet)
        if not self._known(packet, digest) and not self._too_late(packet, request):
            self._waiting.append((packet, request, digest))
            self._undecided.add(digest)

    def _malformed(self, packet: Packet, error: MalformedMessage) -> None:
        self._metrics.malformed.inc()
        log.debug("request-malformed", peer=packet.src, reason=str(error))
        self._pass_on(packet)

    def _known(self, packet: Packet, digest: bytes) -> bool:
        """Rule 3: one answer to one request. Same octets get the same answer, wherever they come from; while it is
        still in the making, none. They are not asked for a cookie: with it they would be another request."""
        rebuilt = self.unconfirmed.of_request(digest)
        if rebuilt is None and digest not in self._undecided:
            return False
        packet.drop()
        self._metrics.retransmissions.inc()
        if rebuilt is not None and rebuilt.state is State.UNCONFIRMED:
            self._answer(packet, rebuilt.response)
        return True

    def _too_late(self, packet: Packet, request: SyncRequest) -> bool:
        """A gateway under load drops what a client that has resumed sent before it had: charon would take it for a
        handshake."""
        if not self.unconfirmed.is_over(request.spi_i, Endpoint(packet.src, packet.sport)) or not self.demanding:
            return False
        packet.drop()
        self._metrics.retransmissions.inc()
        return True

    def _answer(self, packet: Packet, response: bytes) -> None:
        try:
            self._sender.send(packet.dst, packet.dport, packet.src, packet.sport, response, packet.marker)
        except OSError as error:
            # to an address that an attacker made up, perhaps
            if self._lines.take(self._clock()):
                log.warning("answer-not-sent", peer=packet.src, reason=error.strerror)

    async def _serve(self) -> None:
        while True:
            await self._wake.wait()
            batch, self._waiting = self._waiting[:GET_BATCH], self._waiting[GET_BATCH:]
            if not self._waiting:
                self._wake.clear()
            if not batch:
                continue
            self._serving = True
            try:
                await self._serve_batch(batch)
            except Exception:
                log.exception("batch-failed", requests=len(batch))
            finally:
                self._serving = False
                # fail open
                for packet, _, digest in batch:
                    self._undecided.discard(digest)
                    if packet.held and self.unconfirmed.of_request(digest) is None:
                        self._pass_on(packet)

    async def _serve_batch(self, batch: list[Waiting]) -> None:
        # while the bank is asked
        self._charon.know_connections_soon()
        stubs = await self._lookup.find([request for _, request, _ in batch])
        if not self._charon.ready():
            # with the stub, so that clients that prove themselves learn it, and ask another gateway
            for waiting, stub in zip(batch, stubs, strict=True):
                self._carry_out(waiting, stub, Refusal.CHARON_UNAVAILABLE)
            return
        found = [stub for stub in stubs if isinstance(stub, Stub)]
        if found:
            await self._charon.know_connections(
                (stub.connection, [child.name for child in stub.children]) for stub in found
            )
        doubtful: list[tuple[Waiting, Stub]] = []
        for waiting, stub in zip(batch, stubs, strict=True):
            made = Refusal(stub) if isinstance(stub, Missing) else self._decide(waiting, stub)
            if made is Refusal.ADDRESS_TAKEN and isinstance(stub, Stub):
                doubtful.append((waiting, stub))
            else:
                self._carry_out(waiting, stub, made)
        if doubtful:
            # rare: what holds the address may be what is left of the same session
            moved_away = await self._decision.holders.moved_away([stub for _, stub in doubtful])
            for waiting, stub in doubtful:
                self._carry_out(waiting, stub, self._decide(waiting, stub, moved_away))

    def _decide(self, waiting: Waiting, stub: Stub, moved_away: AbstractSet[bytes] = NONE) -> Rebuilt | Refusal | None:
        """None for a packet that needs no decision any more."""
        packet, request, digest = waiting
        # charon answers what the interceptor let go when it ended
        if not packet.held or self._too_late(packet, request):
            return None
        tagged = not self.activation.is_crowded()
        return self._decision.of(packet, request, digest, stub, moved_away, tagged=tagged)

    def _carry_out(self, waiting: Waiting, stub: Stub | Missing, made: Rebuilt | Refusal | None) -> None:
        packet, request, digest = waiting
        if isinstance(made, Refusal):
            self._refuse(packet, request, made, None if isinstance(stub, Missing) else stub)
        elif made is not None:
            self._batches.add(packet, made)
            self._undecided.discard(digest)

    def _pass_on(self, packet: Packet) -> None:
        """To charon, which begins a handshake."""
        self._charon.request(packet.ike[:8], packet.src)
        packet.accept()

    def _refuse_unseen(self, packet: Packet, reason: Refusal, stub: Stub | None = None) -> None:
        """Refuse a request that was not looked at as a whole yet, or is not at hand any more."""
        try:
            request = parse_request(packet.ike)
        except MalformedMessage as error:
            self._malformed(packet, error)
            return
        if request is not None:
            self._metrics.refused(reason)
            self._settle(packet, request, reason, stub)

    def _not_installed(self, packet: Packet, made: Rebuilt) -> None:
        self._refuse_unseen(packet, Refusal.CHARON_UNAVAILABLE, made.old)

    def _settle(self, packet: Packet, request: SyncRequest, reason: Refusal, stub: Stub | None) -> None:
        """What becomes of a packet that is refused, unless that was settled before."""
        if not packet.held:
            return
        if self._refused_is == "drop":
            packet.drop()
        elif request.refusable:
            packet.drop()
            self._metrics.refusals_told.inc()
            self._answer(packet, notification(request, reason, stub))
        else:
            self._pass_on(packet)

    def _refuse(self, packet: Packet, request: SyncRequest, reason: Refusal, stub: Stub | None = None) -> None:
        self._settle(packet, request, reason, stub)
        self._metrics.refused(reason)
        if not self._lines.take(self._clock()):
            self._unlogged += 1
            return
        unlogged, self._unlogged = self._unlogged, 0
        level = log.warning if reason in WARNED_OF else log.info
        level(
            "resumption-refused",
            reason=str(reason),
            peer=packet.src,
            spi_i=request.spi_i.hex(),
            old_gateway=request.sync.gateway,
            old_spi=request.sync.spi.hex(),
            **({"not_logged_before": unlogged} if unlogged else {}),
        )

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(self._look_seconds)
            await self.unconfirmed.remove_late()
            self._log_whether_demanding()

    def _log_whether_demanding(self) -> None:
        if self.demanding == self._demanding:
            return
        self._demanding = not self._demanding
        if self._demanding:
            log.warning("cookies-demanded", unconfirmed=len(self.unconfirmed), waiting=len(self._waiting))
        else:
            log.info("cookies-no-longer-demanded")
