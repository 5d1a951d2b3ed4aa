"""The request of a resumption (draft-xu-ike-sa-sync-01 section 3.1): a client builds it, a gateway parses it. No I/O.

    HDR, SYN, SAi1, KEi, Ni       -->

The draft has SYN last; in front, a packet filter sees it. SYN carries PROOF, which the draft lacks: see
bridge.ike.proof. The answer is in bridge.ike.resumption_answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from bridge.ike.message import (
    HEADER,
    NO_SPI,
    PAYLOAD_HEADER,
    ExchangeType,
    Flag,
    MalformedMessage,
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
from bridge.ike.sync_messages import SyncRequest
from bridge.ike.sync_payload import Attribute, SyncPayload, encode_child, encode_old_children
from bridge.ike.transforms import Suite, proposes


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
        payloads += nat_notifies(spi_i, NO_SPI, nat)
    if sk_d_old is None:
        payloads.append(sync)
    message = build(
        spi_i=spi_i,
        spi_r=NO_SPI,
        exchange=ExchangeType.IKE_SA_INIT,
        flags=Flag.INITIATOR,
        message_id=0,
        payloads=payloads,
    )
    if sk_d_old is None:
        return message
    return prove(message, prf, sk_d_old, from_gateway=False, end=proof_ends)


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
    if header.spi_i == NO_SPI or header.spi_r != NO_SPI or header.message_id != 0 or not header.flags & _INITIATOR:
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
