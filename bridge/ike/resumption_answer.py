"""The answer of a resumption (draft-xu-ike-sa-sync-01 section 3.1): a gateway builds it, a client parses it. No I/O.

                                  <--        HDR, Nr, SYN

Where the client asks for forward secrecy, the answer has KEr in front of Nr. A gateway that does not resume may answer
a client that asked for that with N(RESUMPTION_REFUSED). The request is in bridge.ike.resumption_request.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Final

from bridge.ike.message import (
    NO_SPI,
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
from bridge.ike.resumption_request import parse_request
from bridge.ike.sync_messages import (
    MAX_REASON,
    CookieChallenge,
    OrdinaryResponse,
    SyncRefusal,
    SyncRequest,
    SyncResponse,
)
from bridge.ike.sync_payload import Attribute, SyncPayload, encode_child, encode_gateways
from bridge.ike.transforms import least_nonce

_FIRST_STATUS: Final = 16384
AUTH_LIFETIME_OCTETS: Final = 4
_MAX_COOKIE: Final = 64
"""octets (RFC 7296 section 2.6)"""


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
        spi_r=NO_SPI,
        exchange=ExchangeType.IKE_SA_INIT,
        flags=Flag.RESPONSE,
        message_id=0,
        payloads=payloads,
    )
    if prf is None:
        return message
    return prove(message, prf, sk_d_old, from_gateway=True, before=request.blank)


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
    if header.spi_r == NO_SPI:
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
