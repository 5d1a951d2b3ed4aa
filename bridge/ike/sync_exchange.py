"""The one round trip of a resumption (draft-xu-ike-sa-sync-01 section 3.1), both sides of it, no I/O.

    Initiator                                Responder (target gateway)
    HDR, SYN, SAi1, KEi, Ni       -->
                                  <--        HDR, Nr, SYN

The draft has SYN last in the request; in front, a packet filter sees it. SYN carries PROOF, which the draft lacks: see
bridge.ike.proof. Where the client asks for forward secrecy, the answer has KEr in front of Nr. A gateway that does not
resume may answer a client that asked for that with N(RESUMPTION_REFUSED).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from msgspec import Struct

from bridge.ike.message import (
    HEADER,
    PAYLOAD_HEADER,
    ExchangeType,
    Flag,
    MalformedMessage,
    Message,
    NotifyType,
    Payload,
    PayloadType,
    build,
    check_nonce,
    decode_ke,
    decode_notify,
    encode_ke,
    encode_notify,
    parse,
)
from bridge.ike.nat_detection import Addresses, nat_notifies
from bridge.ike.proof import blank, empty_proof, prove, proves
from bridge.ike.sync_payload import Attribute, SyncPayload, encode_child, encode_gateways, encode_old_children
from bridge.ike.transforms import Suite, least_nonce, proposes

_NO_SPI: Final = bytes(8)
_FIRST_STATUS: Final = 16384
AUTH_LIFETIME_OCTETS: Final = 4
_MAX_COOKIE: Final = 64
"""octets (RFC 7296 section 2.6)"""
MAX_REASON: Final = 64
"""octets of a refusal's reason"""


# the client's request


def build_request(
    *,
    spi_i: bytes,
    suite: Suite,
    ke_value: bytes,
    nonce: bytes,
    sync_index: tuple[str, bytes],
    prf: int,
    sk_d_old: bytes | None,
    children: Sequence[tuple[int, int]] = (),
    old_children: Sequence[int] = (),
    sealed_stub: bytes | None = None,
    refusable: bool = False,
    forward_secrecy: bool = False,
    nat: Addresses | None = None,
    cookie: bytes | None = None,
) -> bytes:
    """The client's IKE_SA_INIT request. Without `sk_d_old` the plain draft form: no attributes, and SYN last.

    `sync_index` is (old gateway's address, its SPI); `children` are (child number, the client's inbound ESP SPI), and
    `old_children` by that number the old gateway's inbound ESP SPIs. `refusable`: the sender does not go on with
    IKE_AUTH, so a gateway that does not resume shall say so with a notification. `forward_secrecy`: it holds the
    private key of `ke_value` and wants KEr.
    """
    attributes: list[tuple[int, bytes]] = []
    if sk_d_old is not None:
        attributes += [encode_child(number, spi) for number, spi in children]
        if old_children:
            attributes.append(encode_old_children(old_children))
        if sealed_stub is not None:
            attributes.append((Attribute.SEALED_STUB, sealed_stub))
        if refusable:
            attributes.append((Attribute.REFUSAL, b""))
        if forward_secrecy:
            attributes.append((Attribute.FORWARD_SECRECY, b""))
        attributes.append(empty_proof(prf))
    payloads: list[tuple[int, bytes]] = []
    if cookie is not None:
        payloads.append((PayloadType.NOTIFY, encode_notify(NotifyType.COOKIE, cookie)))
    sync = (int(PayloadType.SYNC), SyncPayload(False, *sync_index, tuple(attributes)).encode())
    if sk_d_old is not None:
        payloads.append(sync)
    # PROOF is the end of SYN
    proof_ends = HEADER.size + sum(PAYLOAD_HEADER.size + len(body) for _, body in payloads)
    payloads += [
        (PayloadType.SA, suite.proposal()),
        (PayloadType.KE, encode_ke(suite.group, ke_value)),
        (PayloadType.NONCE, nonce),
    ]
    if nat is not None:
        payloads += nat_notifies(spi_i, _NO_SPI, nat)
    if sk_d_old is None:
        payloads.append(sync)
    message = build(
        spi_i=spi_i,
        spi_r=_NO_SPI,
        exchange=ExchangeType.IKE_SA_INIT,
        flags=Flag.INITIATOR,
        message_id=0,
        payloads=payloads,
    )
    if sk_d_old is None:
        return message
    return prove(message, prf, sk_d_old, from_gateway=False, end=proof_ends)


class SyncRequest(Struct, frozen=True, gc=False):
    """An IKE_SA_INIT request with IKE_SA_SYNC. Nothing in it is proved before `verify_request`."""

    blank: bytes
    """the message with the octets of PROOF zero"""
    spi_i: bytes
    group: int
    """of KEi"""
    public_value: bytes
    """in KEi"""
    nonce: bytes
    sync: SyncPayload
    cookie: bytes | None
    nat_source: tuple[bytes, ...]
    nat_destination: tuple[bytes, ...]
    proposal: bytes
    """the body of SAi1"""

    def __repr__(self) -> str:
        return f"SyncRequest({self.spi_i.hex()})"

    @property
    def proof(self) -> bytes | None:
        """The value of PROOF."""
        return self.sync.first(Attribute.PROOF)

    @property
    def sealed_stub(self) -> bytes | None:
        """The value of SEALED_STUB."""
        return self.sync.first(Attribute.SEALED_STUB)

    @property
    def refusable(self) -> bool:
        """Whether its sender accepts a notification of a refusal, and does not go on with IKE_AUTH."""
        return self.sync.first(Attribute.REFUSAL) is not None

    @property
    def forward_secrecy(self) -> bool:
        """Whether its sender asks for KEr."""
        return self.sync.first(Attribute.FORWARD_SECRECY) is not None


_UNDERSTOOD: Final = frozenset(map(int, PayloadType))
"""payload types that may be critical: those of RFC 7296, and ours"""
# plain numbers: comparing with enums takes far longer
_INIT, _RESPONSE, _INITIATOR = int(ExchangeType.IKE_SA_INIT), int(Flag.RESPONSE), int(Flag.INITIATOR)
_SYNC, _NONCE, _NOTIFY, _KE = (
    int(kind) for kind in (PayloadType.SYNC, PayloadType.NONCE, PayloadType.NOTIFY, PayloadType.KE)
)
_COOKIE = int(NotifyType.COOKIE)
_NAT_SOURCE, _NAT_DESTINATION = int(NotifyType.NAT_DETECTION_SOURCE_IP), int(NotifyType.NAT_DETECTION_DESTINATION_IP)
_SA = int(PayloadType.SA)
_EXPECTED: Final = frozenset((_SYNC, _NONCE, _SA, _KE))
"""there once each"""
_SYNC_MARK: Final = bytes((_SYNC,))


def parse_request(data: bytes) -> SyncRequest | None:
    """A request with IKE_SA_SYNC; None for any other message, which goes to charon unchanged.

    Raises MalformedMessage for one that has the payload and breaks a rule: cut payloads; IKE_SA_SYNC, SAi1, KEi, Ni or
    a cookie twice, or one of the first four not there; an unknown critical payload; C = 1; an SPIi of zero, an SPIr, a
    message ID other than 0, the flag I not set.
    """
    if len(data) < HEADER.size or data[18] != _INIT or data[19] & _RESPONSE or _SYNC_MARK not in data:
        # charon judges requests for a full handshake
        return None
    header, payloads = parse(data)
    if not any(one.type == _SYNC for one in payloads):
        return None
    if header.spi_i == _NO_SPI or header.spi_r != _NO_SPI or header.message_id != 0 or not header.flags & _INITIATOR:
        raise MalformedMessage("a first request has an SPIi, no SPIr, message ID 0, and the flag I")
    once: dict[int, Payload] = {}
    notified: dict[int, list[bytes]] = {_COOKIE: [], _NAT_SOURCE: [], _NAT_DESTINATION: []}
    for one in payloads:
        kind = one.type
        if kind == _NOTIFY:
            number, value = decode_notify(one.body)
            if number in notified:
                notified[number].append(value)
        elif kind in _EXPECTED:
            if kind in once:
                raise MalformedMessage(f"several payloads of type {kind}")
            once[kind] = one
        elif one.critical and kind not in _UNDERSTOOD:
            raise MalformedMessage(f"a critical payload of unknown type {kind}")
    if len(once) < len(_EXPECTED):
        raise MalformedMessage("not all of SAi1, KEi and Ni are there")
    payload = once[_SYNC]
    sync = SyncPayload.decode(payload.body)
    if sync.from_gateway:
        raise MalformedMessage("a request from a gateway")
    cookies = notified[_COOKIE]
    if len(cookies) > 1:
        raise MalformedMessage("several cookies")
    group, public_value = decode_ke(once[_KE].body)
    return SyncRequest(
        blank=blank(data, payload.offset, payload.body),
        spi_i=header.spi_i,
        group=group,
        public_value=public_value,
        nonce=check_nonce(once[_NONCE].body),
        sync=sync,
        cookie=cookies[0] if cookies else None,
        nat_source=tuple(notified[_NAT_SOURCE]),
        nat_destination=tuple(notified[_NAT_DESTINATION]),
        proposal=once[_SA].body,
    )


def sync_comes_first(data: bytes) -> bool:
    """Whether the packet filter finds IKE_SA_SYNC in a request that has it: in front, or right after a cookie."""
    if data[16] == _NOTIFY:
        return len(data) > HEADER.size and data[HEADER.size] == _SYNC
    return data[16] == _SYNC


def is_for(request: SyncRequest, suite: Suite) -> bool:
    """Whether SAi1 is the proposal of the old SA, and KEi of its group (draft-xu-ike-sa-sync-01 section 5)."""
    return request.group == suite.group and proposes(request.proposal, suite)


def verify_request(request: SyncRequest, prf: int, sk_d_old: bytes) -> bool:
    """Whether the sender of the request holds SK_d of the old SA. Constant time; False without PROOF."""
    return proves(request.sync, request.blank, prf, sk_d_old)


# the gateway's response


def build_response(
    request: SyncRequest,
    *,
    spi_r: bytes,
    nonce: bytes,
    prf: int,
    sk_d_old: bytes,
    lifetime: int | None = None,
    children: Sequence[tuple[int, int]] = (),
    sealed_stub: bytes | None = None,
    gateways: Sequence[str] = (),
    key_exchange: tuple[int, bytes] | None = None,
    nat: Addresses | None = None,
    auth_lifetime: int | None = None,
) -> bytes:
    """The answer: `HDR, Nr` to a request without attributes (draft), else `HDR, [KEr,] Nr, SYN`.

    `lifetime` and `auth_lifetime` are in seconds, `gateways` are addresses, `key_exchange` is (group, public value) of
    KEr. NAT detection is answered where the request asked for it.
    """
    payloads: list[tuple[int, bytes]] = []
    if key_exchange is not None:
        payloads.append((PayloadType.KE, encode_ke(*key_exchange)))
    payloads.append((PayloadType.NONCE, nonce))
    proven = bool(request.sync.attributes)
    if nat is not None and request.nat_source and request.nat_destination:
        payloads += nat_notifies(request.spi_i, spi_r, nat)
    if proven and auth_lifetime is not None:
        seconds = struct.pack("!I", min(auth_lifetime, 0xFFFFFFFF))
        payloads.append((PayloadType.NOTIFY, encode_notify(NotifyType.AUTH_LIFETIME, seconds)))
    if proven:
        attributes = [encode_child(number, spi) for number, spi in children]
        if sealed_stub is not None:
            attributes.append((Attribute.SEALED_STUB, sealed_stub))
        if lifetime is not None:
            attributes.append((Attribute.LIFETIME, struct.pack("!I", min(lifetime, 0xFFFFFFFF))))
        if gateways:
            attributes.append(encode_gateways(gateways))
        attributes.append(empty_proof(prf))
        sync = SyncPayload(True, request.sync.gateway, request.sync.spi, tuple(attributes))
        payloads.append((PayloadType.SYNC, sync.encode()))
    message = build(
        spi_i=request.spi_i,
        spi_r=spi_r,
        exchange=ExchangeType.IKE_SA_INIT,
        flags=Flag.RESPONSE,
        message_id=0,
        payloads=payloads,
    )
    if not proven:
        return message
    return prove(message, prf, sk_d_old, from_gateway=True, before=request.blank)


def build_refusal(request: SyncRequest, reason: str = "", *, prf: int | None = None, sk_d_old: bytes = b"") -> bytes:
    """The answer of a gateway that does not resume, to a request that is `refusable`: N(RESUMPTION_REFUSED); and, with
    `prf` and `sk_d_old` of the stub, SYN with the reason (ASCII, for the log) and PROOF."""
    payloads: list[tuple[int, bytes]] = [(PayloadType.NOTIFY, encode_notify(NotifyType.RESUMPTION_REFUSED))]
    if prf is not None:
        attributes = ((int(Attribute.REFUSAL), reason.encode()[:MAX_REASON]), empty_proof(prf))
        payloads.append(
            (PayloadType.SYNC, SyncPayload(True, request.sync.gateway, request.sync.spi, attributes).encode())
        )
    message = build(
        spi_i=request.spi_i,
        spi_r=_NO_SPI,
        exchange=ExchangeType.IKE_SA_INIT,
        flags=Flag.RESPONSE,
        message_id=0,
        payloads=payloads,
    )
    if prf is None:
        return message
    return prove(message, prf, sk_d_old, from_gateway=True, before=request.blank)


class SyncResponse(Struct, frozen=True, gc=False):
    """An answer that claims to resume. Nothing in it is proved before `verify_response`."""

    blank: bytes
    spi_r: bytes
    key_exchange: tuple[int, bytes] | None
    """group and public value of KEr; None without forward secrecy"""
    nonce: bytes
    sync: SyncPayload | None
    """None in the plain draft form"""
    nat_source: tuple[bytes, ...]
    nat_destination: tuple[bytes, ...]
    auth_lifetime: int | None
    """seconds until the client has to authenticate again"""

    def __repr__(self) -> str:
        return f"SyncResponse({self.spi_r.hex()})"

    @property
    def lifetime(self) -> int | None:
        """Seconds that the gateway grants."""
        value = self.sync.first(Attribute.LIFETIME) if self.sync else None
        return int.from_bytes(value) if value is not None else None


class CookieChallenge(NamedTuple):
    """The gateway wants the request again, with this cookie in front (RFC 7296 section 2.6)."""

    cookie: bytes


class SyncRefusal(Struct, frozen=True, gc=False):
    """A gateway's refusal that claims to prove itself. Nothing in it is proved before `verify_refusal`."""

    blank: bytes
    sync: SyncPayload

    @property
    def reason(self) -> str:
        """What of it is printable ASCII."""
        value = (self.sync.first(Attribute.REFUSAL) or b"")[:MAX_REASON]
        return "".join(chr(octet) for octet in value if 0x20 < octet < 0x7F)


class OrdinaryResponse(NamedTuple):
    """What a gateway answers that does not resume: an IKE_SA_INIT response, or an error notification."""

    error: int | None
    """the notification's type, None for a normal response"""


Response = SyncResponse | SyncRefusal | OrdinaryResponse | CookieChallenge


def parse_response(data: bytes, request_raw: bytes) -> Response:
    """An answer to `request_raw`. Raises MalformedMessage, also when it answers another request."""
    message = parse(data)
    header = message.header
    if (
        header.exchange != ExchangeType.IKE_SA_INIT
        or not header.flags & Flag.RESPONSE
        or header.flags & Flag.INITIATOR
        or header.message_id != 0
        or header.spi_i != request_raw[:8]
    ):
        raise MalformedMessage("not the answer to this request")
    cookies = message.notifies(NotifyType.COOKIE)
    if cookies:
        if not 1 <= len(cookies[0]) <= _MAX_COOKIE:
            raise MalformedMessage(f"a cookie of {len(cookies[0])} octets")
        return CookieChallenge(cookies[0])
    nonce = message.only(PayloadType.NONCE)
    payload = message.only(PayloadType.SYNC)
    if nonce is None or message.only(PayloadType.SA) is not None:
        if not message.payloads:
            raise MalformedMessage("an answer with nothing in it")
        error = next(_errors(message), None) if nonce is None else None
        if payload is not None and error == NotifyType.RESUMPTION_REFUSED:
            return SyncRefusal(*_from_gateway(data, payload))
        return OrdinaryResponse(error)
    if header.spi_r == _NO_SPI:
        raise MalformedMessage("an answer that resumes has an SPIr")
    blanked, sync = (data, None) if payload is None else _from_gateway(data, payload)
    exchange = message.only(PayloadType.KE)
    return SyncResponse(
        blank=blanked,
        spi_r=header.spi_r,
        key_exchange=None if exchange is None else decode_ke(exchange.body),
        nonce=check_nonce(nonce.body),
        sync=sync,
        nat_source=tuple(message.notifies(NotifyType.NAT_DETECTION_SOURCE_IP)),
        nat_destination=tuple(message.notifies(NotifyType.NAT_DETECTION_DESTINATION_IP)),
        auth_lifetime=_auth_lifetime(message),
    )


def _auth_lifetime(message: Message) -> int | None:
    """Seconds in AUTH_LIFETIME (RFC 4478 section 3). Raises MalformedMessage."""
    values = message.notifies(NotifyType.AUTH_LIFETIME)
    if not values:
        return None
    if len(values) > 1 or len(values[0]) != AUTH_LIFETIME_OCTETS:
        raise MalformedMessage("AUTH_LIFETIME is there once, and has 4 octets")
    return int.from_bytes(values[0])


def _from_gateway(data: bytes, payload: Payload) -> tuple[bytes, SyncPayload]:
    """The message blank, and its IKE_SA_SYNC. Raises MalformedMessage."""
    sync = SyncPayload.decode(payload.body)
    if not sync.from_gateway:
        raise MalformedMessage("an answer from a client")
    return blank(data, payload.offset, payload.body), sync


def _errors(message: Message) -> Iterator[int]:
    """The error types among the notifications; status types begin at 16384 (RFC 7296 section 3.10.1)."""
    for payload in message.payloads:
        if payload.type == PayloadType.NOTIFY:
            kind, _ = decode_notify(payload.body)
            if kind < _FIRST_STATUS:
                yield kind


def verify_response(response: SyncResponse, request_raw: bytes, prf: int, sk_d_old: bytes) -> bool:
    """Whether the gateway holds the stub that the request names, and answered this very request. Constant time;
    False without PROOF, for another index, or with a nonce too short for `prf`."""
    if response.sync is None or len(response.nonce) < least_nonce(prf):
        return False
    return _answers(response.sync, response.blank, request_raw, prf, sk_d_old)


def verify_refusal(refusal: SyncRefusal, request_raw: bytes, prf: int, sk_d_old: bytes) -> bool:
    """Whether the gateway holds the stub that the request names, and refused this very request. Constant time; False
    for another index."""
    return _answers(refusal.sync, refusal.blank, request_raw, prf, sk_d_old)


def _answers(sync: SyncPayload, blanked: bytes, request_raw: bytes, prf: int, sk_d_old: bytes) -> bool:
    request = parse_request(request_raw)
    if request is None or (sync.gateway, sync.spi) != (request.sync.gateway, request.sync.spi):
        return False
    return proves(sync, blanked, prf, sk_d_old, before=request.blank)
