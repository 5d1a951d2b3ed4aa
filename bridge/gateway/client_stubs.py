"""Stubs that clients hold themselves (draft-xu-ike-sa-sync-01 section 3.5, fourth form), on the gateway's side.

The client gets its stub sealed with the gateways' key and can only hand it back. It is bound to its index, and to being
held by a client: one out of the bank does not open here, nor one of these in the bank. GET Stub is answered without
any state but when that was, to the address that the SA's peer has, and not often: a replay gives no host
more than what was on the wire before, sealed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final, Literal

import structlog
from msgspec.structs import replace

from bridge.charon.ike_sa import IkeSa, Trait, stub_sa
from bridge.charon.sa_tracker import SaTracker
from bridge.gateway.lost_sas import LostSas
from bridge.gateway.metrics import GatewayMetrics
from bridge.gateway.rate_limit import Rate
from bridge.gateway.recent import Recent
from bridge.ike.message import MalformedMessage
from bridge.ike.stub_exchange import MoveStatus, StubMessage, build_download, build_here, parse_stub_message, verify
from bridge.net.interface import Packet, Sender
from bridge.stub.codec import decode, encode
from bridge.stub.keyring import Keyring, SealError
from bridge.stub.stub import Index, Stub, StubError

log = structlog.get_logger()

Policy = Literal["off", "fallback", "prefer"]

HELD_OCTETS: Final = 2000
"""a sealed stub at most: with the largest public value beside it, a request still passes NFQUEUE whole
(bridge.net.nfqueue.COPY_OCTETS)"""
HELD_SECONDS: Final = 86_400
"""how long a client's stub is good for, at most: the bank remembers an ended session no longer (redis/delete.lua)"""
ANSWER_SECONDS: Final = 0.2
"""between two answers to GET Stub about one SA"""
SPIS_OCTETS: Final = 16
"""at the beginning of an IKE header"""
PROBED_SECONDS: Final = 0.05
"""between two answers to Probes about one SA: its client sends them 0.1 s apart"""
ANSWERS_A_SECOND: Final = 2000
"""to all clients together"""


class ClientStubs:
    """Seals stubs for their clients, opens what clients present, and answers GET Stub. `address` is this gateway's in
    the index, or None for the local address of each SA."""

    def __init__(
        self,
        policy: Policy,
        keyring: Keyring,
        tracker: SaTracker,
        sender: Sender,
        address: str | None,
        metrics: GatewayMetrics,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.policy: Policy = policy
        self._keyring = keyring
        self._tracker = tracker
        self._sender = sender
        self._address = address
        self._metrics = metrics
        self.gateways: Callable[[], Sequence[str]] = tuple
        """the addresses of the other gateways, which clients receive"""
        self.expected: Callable[[bytes], bool] = lambda _: False
        """whether a client may send messages about an SA, by both SPIs, that is not here"""
        self.alive: Callable[[], bool | None] = lambda: True
        """whether charon runs; None while it does not answer"""
        self._clock = clock
        self._rate = Rate(ANSWERS_A_SECOND)
        self._answered: Recent[bytes] = Recent(ANSWER_SECONDS, clock=clock)
        """the SAs, by both SPIs, whose clients got an answer to GET Stub"""
        self.lost = LostSas()
        self._probed_lately: Recent[bytes] = Recent(PROBED_SECONDS, clock=clock)

    # sealing

    def index(self, sa: IkeSa) -> Index:
        """The index of an SA's stub."""
        return sa.published or sa.index_here(self._address)

    def seal(self, sa: IkeSa) -> bytes | None:
        """The stub of an SA of this gateway, for its client: without the shared secret, and without what takes the SA
        over as it is. None where clients get none, or where it is too large."""
        if self.policy == "off":
            return None
        stub = sa.stub(self.index(sa), with_secret=False, expires=self.expiry(sa))
        stub = replace(stub, derivation=None)
        try:
            sealed = self._keyring.seal(encode(stub), _place(stub.index))
        except StubError as error:
            log.warning("stub-not-encodable", index=str(stub.index), reason=str(error))
            return None
        if len(sealed) > HELD_OCTETS:
            log.info("stub-too-large-for-client", index=str(stub.index), octets=len(sealed), limit=HELD_OCTETS)
            return None
        return sealed

    def expiry(self, sa: IkeSa) -> int:
        """Until when a client's stub of an SA is good (Unix seconds): no longer than the one in the bank, by which the
        bank remembers that the session ended."""
        return min(sa.stub_expires or sa.expires, int(time.time()) + HELD_SECONDS)

    def open(self, sealed: bytes, index: Index) -> Stub | None:
        """What a client presents; None where that is allowed to count for nothing: another index's, expired, altered,
        sealed with another key."""
        if self.policy == "off":
            return None
        try:
            stub = decode(self._keyring.open(sealed, _place(index)))
        except (SealError, StubError) as error:
            log.debug("client-stub-unreadable", index=str(index), reason=str(error))
            return None
        return stub if stub.index == index and stub.expires > time.time() else None

    # GET Stub

    def concerns(self, packet: Packet) -> bool:
        """Whether a message is about an SA that is here or expected. A flood of others shall cost no more than this."""
        spis = packet.ike[:SPIS_OCTETS]
        return spis in self._tracker.sas or self.lost.get(spis) is not None or self.expected(spis)

    def received(self, packet: Packet) -> StubMessage | None:
        """Take in a message of exchange type 240. Answers GET Stub and Probe; gives a Moving, which is not proved
        yet."""
        spis = packet.ike[:SPIS_OCTETS]
        expected = self.expected(spis)
        lost = self.lost.get(spis) if spis not in self._tracker.sas else None
        try:
            message = parse_stub_message(packet.ike)
        except MalformedMessage as error:
            self._metrics.malformed.inc()
            log.debug("stub-message-malformed", peer=packet.src, reason=str(error))
            packet.accept()
            return None
        packet.drop()
        if expected and message.move is not None and not message.sync.from_gateway:
            return message
        sa = lost or self._tracker.sas.get(message.spis)
        if message.sync.from_gateway or sa is None or not sa.up or not sa.resumable:
            return None
        if message.move is not None and message.move.status is MoveStatus.PROBE:
            self._probed(packet, message, sa, self.alive() if lost is None else False)
            return None
        if lost is not None:
            return None
        now = self._clock()
        if message.move is not None:
            return message
        if (
            (self.policy != "off" or self.gateways())
            and sa.remote is not None
            and packet.src == sa.remote.address
            and message.spis not in self._answered
            and verify(message, sa.suite.prf, sa.sk_d)
        ):
            sa.traits |= Trait.COMPANION
            if self._rate.take(now):
                self._answered.add(message.spis)
                self._answer(packet, message, sa)
        return None

    def _probed(self, packet: Packet, probe: StubMessage, sa: IkeSa, there: bool | None) -> None:
        """A client asks whether its SA is here. While charon does not answer this gateway does not either: the client
        finds out by a version probe."""
        # of a charon that is gone the tracker still has the SAs: it may be back before they are resumed elsewhere
        spis = sa.id.spis
        if there is None or spis in self._probed_lately or sa.remote is None or packet.src != sa.remote.address:
            return
        if not verify(probe, sa.suite.prf, sa.sk_d):
            return
        # a Probe that is repeated costs the other SAs nothing
        self._probed_lately.add(spis)
        if not self._rate.take(self._clock()):
            return
        status = MoveStatus.HERE if there else MoveStatus.NOT_HERE
        self._send(packet, build_here(stub_sa(sa, (probe.sync.gateway, probe.sync.spi)), probe, status))

    def _answer(self, packet: Packet, request: StubMessage, sa: IkeSa) -> None:
        sealed, gateways = self.seal(sa), self.gateways()
        if sealed is None and not gateways:
            return
        lifetime = max(self.expiry(sa) - int(time.time()), 0)
        index = (request.sync.gateway, request.sync.spi)
        answer = build_download(stub_sa(sa, index), request, sealed, lifetime, gateways)
        if self._send(packet, answer) and sealed is not None:
            self._metrics.handed.inc()

    def _send(self, packet: Packet, answer: bytes) -> bool:
        try:
            self._sender.send(packet.dst, packet.dport, packet.src, packet.sport, answer, packet.marker)
        except OSError as error:
            log.warning("answer-not-sent", peer=packet.src, reason=error.strerror)
            return False
        return True


def _place(index: Index) -> bytes:
    """The associated data: what a client holds is not what the bank keeps under the same index."""
    return b"client-held " + index.key.encode()
