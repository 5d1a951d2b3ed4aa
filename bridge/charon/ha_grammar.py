"""Which attributes charon writes into each message of its ha plugin, and in which order. No I/O.

The ha plugin writes the length of an identity into one octet, and then the whole identity: of one with more than 255
octets the rest reads as further attributes, which the peer chose. The plugin of each release writes every attribute at
its place, and most of them once. A message with another order, with an attribute twice, or with one that does not
belong there is malformed, and nothing of it is used.
"""

from __future__ import annotations

from typing import Final

from bridge.charon.ha_codec import decode, leading_ike_id
from bridge.charon.ha_message import (
    PRIVATE_WORDS_SINCE,
    Attr,
    HaError,
    HaMessage,
    IkeId,
    MessageType,
)


class MalformedMessage(HaError):
    """A message that is not in charon's format. `ike_id` is the IKE_SA that it is about, where that is readable: charon
    writes it in front of all that a peer could choose."""

    def __init__(self, reason: str, ike_id: IkeId | None) -> None:
        super().__init__(reason)
        self.ike_id = ike_id


_ANY_NUMBER: Final = 1 << 16

_MAY_REPEAT: Final = {
    Attr.LOCAL_VIP: _ANY_NUMBER,
    Attr.REMOTE_VIP: _ANY_NUMBER,
    Attr.PEER_ADDR: _ANY_NUMBER,
    Attr.LOCAL_TS: _ANY_NUMBER,
    Attr.REMOTE_TS: _ANY_NUMBER,
    Attr.SEGMENT: _ANY_NUMBER,
}
_TWICE_WITH_PRIVATE: Final = frozenset((Attr.CONDITIONS, Attr.EXTENSIONS))

_ALGORITHMS: Final = (Attr.ALG_ENCR, Attr.ALG_ENCR_LEN, Attr.ALG_INTEG, Attr.ALG_PRF, Attr.ALG_KE, Attr.ALG_ADD_KES)
_ENDS: Final = (Attr.LOCAL_VIP, Attr.REMOTE_VIP, Attr.PEER_ADDR)

_IDENTIFIED: Final = (
    Attr.LOCAL_ID,
    Attr.REMOTE_ID,
    Attr.LOCAL_ADDR,
    Attr.REMOTE_ADDR,
    Attr.CONDITIONS,
    Attr.EXTENSIONS,
    Attr.CONFIG_NAME,
)
"""an IKE_UPDATE that says who the peers are says all of this"""
_IDENTIFYING: Final = frozenset((Attr.LOCAL_ID, Attr.REMOTE_ID, Attr.REMOTE_EAP_ID, Attr.CONFIG_NAME))

_ORDER: Final[dict[MessageType, tuple[Attr, ...]]] = {
    MessageType.IKE_ADD: (
        Attr.IKE_VERSION,
        Attr.IKE_ID,
        Attr.IKE_REKEY_ID,
        Attr.ALG_OLD_PRF,
        Attr.OLD_SKD,
        *_ALGORITHMS,
        Attr.NONCE_I,
        Attr.NONCE_R,
        Attr.SECRET,
        Attr.ADD_SECRET,
        Attr.LOCAL_DH,
        Attr.REMOTE_DH,
        Attr.PSK,
        Attr.AUTH_METHOD,
        Attr.REMOTE_ADDR,
    ),
    MessageType.IKE_UPDATE: (
        Attr.IKE_ID,
        Attr.LOCAL_ID,
        Attr.REMOTE_ID,
        Attr.REMOTE_EAP_ID,
        Attr.LOCAL_ADDR,
        Attr.REMOTE_ADDR,
        Attr.CONDITIONS,
        Attr.EXTENSIONS,
        Attr.CONFIG_NAME,
        *_ENDS,
    ),
    MessageType.IKE_MID_INITIATOR: (Attr.IKE_ID, Attr.MID),
    MessageType.IKE_MID_RESPONDER: (Attr.IKE_ID, Attr.MID),
    MessageType.IKE_DELETE: (Attr.IKE_ID,),
    MessageType.CHILD_ADD: (
        Attr.IKE_ID,
        Attr.INITIATOR,
        Attr.INBOUND_SPI,
        Attr.OUTBOUND_SPI,
        Attr.INBOUND_CPI,
        Attr.OUTBOUND_CPI,
        Attr.IPSEC_MODE,
        Attr.IPCOMP,
        Attr.CONFIG_NAME,
        *_ALGORITHMS,
        Attr.ESN,
        Attr.NONCE_I,
        Attr.NONCE_R,
        Attr.SECRET,
        Attr.ADD_SECRET,
        Attr.LOCAL_TS,
        Attr.REMOTE_TS,
    ),
    MessageType.CHILD_DELETE: (Attr.IKE_ID, Attr.INBOUND_SPI),
    MessageType.SEGMENT_DROP: (Attr.SEGMENT,),
    MessageType.SEGMENT_TAKE: (Attr.SEGMENT,),
    MessageType.STATUS: (Attr.SEGMENT,),
    MessageType.RESYNC: (Attr.SEGMENT,),
    MessageType.IKE_IV: (Attr.IKE_ID, Attr.IV),
}
_PLACES: Final = {
    # the addresses behind the name of the connection come in any order
    kind: {name: min(place, order.index(_ENDS[0])) if name in _ENDS else place for place, name in enumerate(order)}
    for kind, order in _ORDER.items()
}
_ABOUT_AN_SA: Final = frozenset(kind for kind, order in _ORDER.items() if Attr.IKE_ID in order)


def read(data: bytes) -> HaMessage:
    """A datagram of charon, as a message. Raises MalformedMessage for what no release of charon writes."""
    try:
        message = decode(data)
        _check(message)
    except HaError as error:
        raise MalformedMessage(str(error), leading_ike_id(data)) from None
    return message


def _check(message: HaMessage) -> None:
    places = _PLACES[message.type]
    counts: dict[Attr, int] = {}
    last = 0
    for name, _ in message.attributes:
        place = places.get(name)
        if place is None:
            raise HaError(f"{message.type.name} has no {name.name}")
        if place < last:
            raise HaError(f"{name.name} of {message.type.name} is not where charon writes it")
        last = place
        counts[name] = counts.get(name, 0) + 1
    for name, count in counts.items():
        if count > _most(name, message.version):
            raise HaError(f"{name.name} is {count} times in {message.type.name}")
    if message.type in _ABOUT_AN_SA and Attr.IKE_ID not in counts:
        raise HaError(f"{message.type.name} names no IKE_SA")
    if message.type is MessageType.IKE_UPDATE and not _IDENTIFYING.isdisjoint(counts):
        missing = [name.name for name in _IDENTIFIED if name not in counts]
        if missing:
            raise HaError(f"an IKE_UPDATE with identities lacks {', '.join(missing)}")


def _most(name: Attr, version: int) -> int:
    if name in _TWICE_WITH_PRIVATE and version >= PRIVATE_WORDS_SINCE:
        return 2
    return _MAY_REPEAT.get(name, 1)
