"""The exchange that hands a client its own stub, and the one that asks it to move (docs/protocol.md), no I/O.

Exchange type 240, the SPIs of the SA in question, nothing encrypted, PROOF under its SK_d in every message:

    Client                                   Gateway
    HDR, Ni, SYN (GET Stub)       -->
                                  <--        HDR, SYN (Download Stub: SEALED_STUB, LIFETIME)

                                  <--        HDR, SYN (Move: MOVE)
    HDR, Ni, SYN (Moving: MOVE)   -->

    Client                                   Another gateway
                                  <--        HDR, SYN (Announcement: MOVE)
                                             Gateway of the SA
    HDR, Ni, SYN (Probe: MOVE)    -->
                                  <--        HDR, SYN (Here or Not here: MOVE)
                                             Another gateway
    HDR, Ni, SYN (Moving: MOVE)   -->

What a gateway sends has the flag R and what a client sends has not, whichever begins: so all of it passes the packet
rules that a resumption needs. Message IDs are from 2^31 on. A charon looks at a message ID before anything else, and
ignores what is not the one it expects: where no sidecar is in the way, nothing happens.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from ipaddress import ip_address
from typing import Final, NamedTuple

from bridge.ike.address import packed
from bridge.ike.message import NO_SPI, ExchangeType, Flag, MalformedMessage, PayloadType, build, check_nonce, parse
from bridge.ike.proof import blank, empty_proof, prove, proves
from bridge.ike.sync_payload import Attribute, SyncPayload, encode_gateways

GET_MESSAGE_ID: Final = 1 << 31
"""of GET and Download Stub; that of Move and Moving is greater"""
_ADDRESS_OCTETS: Final = (4, 16)


class MoveStatus(IntEnum):
    """What becomes of a Move."""

    ASKED = 0
    """the gateway's own message has no other"""
    MOVING = 1
    NOT_CONFIGURED = 2
    """the target is none of the client's gateways"""
    NO_ANSWER = 3
    """the target does not answer"""
    REFUSED = 4
    """the target does not resume the session"""
    BUSY = 5
    """the client moves already, elsewhere"""
    GONE = 6
    """Announcement, by another gateway, the target: the gateway of the SA has failed"""
    PROBE = 7
    """Probe, by the client: does the gateway of the SA still have it?"""
    HERE = 8
    """Here, the answer to it"""
    GATEWAY_LIVES = 9
    """Moving, to the target: the gateway of the SA has answered, and the client stays there"""
    DAEMON_ANSWERS = 10
    """Moving, to the target: the gateway's sidecar has not answered, its daemon has, without a proof; the client stays
    there"""
    NOT_HERE = 11
    """Not here, the other answer to a Probe: the gateway's sidecar lives, its daemon is gone or has lost the SA"""


REPORTS: Final = frozenset(
    {
        MoveStatus.MOVING,
        MoveStatus.NOT_CONFIGURED,
        MoveStatus.NO_ANSWER,
        MoveStatus.REFUSED,
        MoveStatus.BUSY,
        MoveStatus.GATEWAY_LIVES,
        MoveStatus.DAEMON_ANSWERS,
    }
)
"""the statuses of Moving"""


ANNOUNCING: Final = frozenset({MoveStatus.GONE, MoveStatus.HERE, MoveStatus.NOT_HERE})
"""the statuses of an answer to an announcement"""


class Move(NamedTuple):
    """The MOVE attribute: status (1), and the target gateway's address (4 or 16)."""

    status: MoveStatus
    target: str

    def encode(self) -> tuple[int, bytes]:
        """As an attribute. Raises ValueError for a target that is no address."""
        return Attribute.MOVE, bytes((self.status,)) + packed(self.target)

    @classmethod
    def decode(cls, value: bytes) -> Move:
        """Raises MalformedMessage."""
        if len(value) - 1 not in _ADDRESS_OCTETS or value[0] not in list(MoveStatus):
            raise MalformedMessage(f"a MOVE attribute of {len(value)} octets, or of unknown status")
        return cls(MoveStatus(value[0]), str(ip_address(value[1:])))


@dataclass(frozen=True, slots=True)
class StubMessage:
    """A message of exchange type 240. Nothing in it is proved before `verify`.

    `blank`: the message with the octets of PROOF zero. `sync.from_gateway` says which side sent it.
    """

    blank: bytes = field(repr=False)
    spi_i: bytes
    spi_r: bytes
    message_id: int
    sync: SyncPayload
    move: Move | None

    @property
    def spis(self) -> bytes:
        """Both SPIs of the SA that it is about."""
        return self.spi_i + self.spi_r

    @property
    def sealed_stub(self) -> bytes | None:
        """The value of SEALED_STUB."""
        return self.sync.first(Attribute.SEALED_STUB)

    @property
    def lifetime(self) -> int | None:
        """Seconds that the sealed stub is good for."""
        value = self.sync.first(Attribute.LIFETIME)
        return int.from_bytes(value) if value is not None else None


@dataclass(frozen=True, slots=True)
class StubSa:
    """What the messages about one IKE_SA need of it. `initiator`: whether this host began it."""

    spi_i: bytes
    spi_r: bytes
    initiator: bool
    index: tuple[str, bytes]
    """the gateway's address and SPI"""
    prf: int
    sk_d: bytes = field(repr=False)


def parse_stub_message(data: bytes) -> StubMessage:
    """Raises MalformedMessage for whatever is none: cut payloads, another exchange, an SPI of zero, no or several
    IKE_SA_SYNC payloads, C that is not the flag R, a client's message without a nonce of 16 to 256 octets, a message ID
    that does not fit its content."""
    message = parse(data)
    header = message.header
    if header.exchange != ExchangeType.STUB or NO_SPI in (header.spi_i, header.spi_r):
        raise MalformedMessage("not a message of exchange type 240 about an IKE_SA")
    payload = message.only(PayloadType.SYNC)
    if payload is None:
        raise MalformedMessage("no IKE_SA_SYNC payload")
    sync = SyncPayload.decode(payload.body)
    if sync.from_gateway != bool(header.flags & Flag.RESPONSE):
        raise MalformedMessage("C and the flag R differ")
    if not sync.from_gateway:
        nonce = message.only(PayloadType.NONCE)
        if nonce is None:
            raise MalformedMessage("no nonce")
        check_nonce(nonce.body)
    move = sync.first(Attribute.MOVE)
    if header.message_id < GET_MESSAGE_ID or (move is None) != (header.message_id == GET_MESSAGE_ID):
        raise MalformedMessage(f"message ID {header.message_id} with{'out' if move is None else ''} MOVE")
    return StubMessage(
        blank=blank(data, payload.offset, payload.body),
        spi_i=header.spi_i,
        spi_r=header.spi_r,
        message_id=header.message_id,
        sync=sync,
        move=Move.decode(move) if move is not None else None,
    )


def verify(message: StubMessage, prf: int, sk_d: bytes, *, before: StubMessage | None = None) -> bool:
    """Whether the other side of the SA sent it, as the answer to `before` if there is one. Constant time."""
    return proves(message.sync, message.blank, prf, sk_d, before=before.blank if before else b"")


def verify_report(report: StubMessage, prf: int, sk_d: bytes, announcement: bytes) -> bool:
    """Whether the client of the SA sent it, as the answer to an announcement of this gateway's, by the octets of that.
    Constant time. They end with PROOF, so they need not be parsed."""
    _, empty = empty_proof(prf)
    return proves(report.sync, report.blank, prf, sk_d, before=announcement[: -len(empty)] + empty)


def build_get(sa: StubSa, nonce: bytes) -> bytes:
    """GET Stub, the client's request. `nonce`: fresh, so that the answer is to this very request."""
    return _build(sa, False, GET_MESSAGE_ID, (), nonce=nonce)


def build_download(
    sa: StubSa, request: StubMessage, sealed_stub: bytes | None, lifetime: int, gateways: Sequence[str] = ()
) -> bytes:
    """Download Stub, the answer to it. `lifetime`: seconds until the stub expires; `gateways`: addresses of those that
    resume too. Without a stub it names them alone."""
    attributes: list[tuple[int, bytes]] = []
    if sealed_stub is not None:
        attributes += [(Attribute.SEALED_STUB, sealed_stub), (Attribute.LIFETIME, struct.pack("!I", lifetime))]
    if gateways:
        attributes.append(encode_gateways(gateways))
    return _build(sa, True, GET_MESSAGE_ID, tuple(attributes), before=request.blank)


def build_move(sa: StubSa, target: str, message_id: int) -> bytes:
    """Move: the gateway asks the client to go on at `target`. `message_id`: see `move_message_id`."""
    return _build(sa, True, message_id, (Move(MoveStatus.ASKED, target).encode(),))


def move_message_id(now: float) -> int:
    """Of a Move that is first sent at `now` (Unix seconds). It grows, so that a client accepts none twice."""
    return GET_MESSAGE_ID + 1 + int(now) % (GET_MESSAGE_ID - 1)


def build_moving(sa: StubSa, asked: StubMessage, status: MoveStatus, nonce: bytes) -> bytes:
    """Moving: the client reports what becomes of it."""
    assert asked.move is not None
    attributes = (Move(status, asked.move.target).encode(),)
    return _build(sa, False, asked.message_id, attributes, nonce=nonce, before=asked.blank)


def build_announcement(sa: StubSa, target: str, message_id: int) -> bytes:
    """Announcement: another gateway, `target`, says that the gateway of `sa` has failed. `sa` is that gateway's view,
    as its stub has it; `message_id`: see `move_message_id`."""
    return _build(sa, True, message_id, (Move(MoveStatus.GONE, target).encode(),))


def build_probe(sa: StubSa, announced: StubMessage, nonce: bytes) -> bytes:
    """Probe: the client asks the gateway of its SA whether it still has it. It proves itself alone: that gateway has
    not seen the announcement."""
    assert announced.move is not None
    attributes = (Move(MoveStatus.PROBE, announced.move.target).encode(),)
    return _build(sa, False, announced.message_id, attributes, nonce=nonce)


def build_here(sa: StubSa, probe: StubMessage, status: MoveStatus = MoveStatus.HERE) -> bytes:
    """Here: the gateway's answer to a Probe about an SA that its daemon has. Not here, with the status NOT_HERE: about
    one that it does not have any more."""
    assert probe.move is not None
    attributes = (Move(status, probe.move.target).encode(),)
    return _build(sa, True, probe.message_id, attributes, before=probe.blank)


def _build(
    sa: StubSa,
    from_gateway: bool,
    message_id: int,
    attributes: tuple[tuple[int, bytes], ...],
    *,
    nonce: bytes | None = None,
    before: bytes = b"",
) -> bytes:
    payloads: list[tuple[int, bytes]] = [(PayloadType.NONCE, nonce)] if nonce is not None else []
    sync = SyncPayload(from_gateway, *sa.index, (*attributes, empty_proof(sa.prf)))
    # last, so that PROOF is the end of the message
    payloads.append((PayloadType.SYNC, sync.encode()))
    message = build(
        spi_i=sa.spi_i,
        spi_r=sa.spi_r,
        exchange=ExchangeType.STUB,
        flags=(Flag.INITIATOR if sa.initiator else 0) | (Flag.RESPONSE if from_gateway else 0),
        message_id=message_id,
        payloads=payloads,
    )
    return prove(message, sa.prf, sa.sk_d, from_gateway=from_gateway, before=before)
