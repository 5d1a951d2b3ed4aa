"""The HA messages that the sidecar sends to charon: install, update, activate, delete."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from bridge.charon.ha_codec import encode
from bridge.charon.ha_message import ADDITIONAL_KEY_EXCHANGES_SINCE, PRIVATE_WORDS_SINCE, Attr, IkeId, MessageType
from bridge.charon.ike_sa import Condition
from bridge.charon.install import Install
from bridge.stub.child_sa import NewChild
from bridge.stub.types import Endpoint

_PRIVATE = int(Condition.PRIVATE)

Attributes = list[tuple[Attr, Any]]


def add_message(version: int, install: Install, landing: str) -> bytes:
    """IKE_ADD: keys. charon derives as for a rekey, which is the SKEYSEED of forward secrecy; with an empty shared
    secret that is the draft's (draft-xu-ike-sa-sync-01 section 3.3). Without an old SK_d it derives as for a first
    IKE_SA (RFC 7296 section 2.14)."""
    suite = install.suite
    attributes: Attributes = [
        (Attr.IKE_VERSION, 2),
        (Attr.IKE_ID, install.id),
    ]
    if install.sk_d_old:
        attributes += [(Attr.ALG_OLD_PRF, install.prf_old or suite.prf), (Attr.OLD_SKD, install.sk_d_old)]
    attributes.append((Attr.ALG_ENCR, suite.encr))
    if suite.encr_len:
        attributes.append((Attr.ALG_ENCR_LEN, suite.encr_len))
    if suite.integ:
        attributes.append((Attr.ALG_INTEG, suite.integ))
    attributes += [
        (Attr.ALG_PRF, suite.prf),
        (Attr.ALG_KE, suite.group),
    ]
    if suite.additional and version >= ADDITIONAL_KEY_EXCHANGES_SINCE:
        # what the SA was made with; none of them is done again
        attributes.append((Attr.ALG_ADD_KES, struct.pack(f"!{len(suite.additional)}H", *suite.additional)))
    attributes += [
        (Attr.NONCE_I, install.nonce_i),
        (Attr.NONCE_R, install.nonce_r),
        (Attr.SECRET, install.g_ir),
        *([(Attr.ADD_SECRET, install.additional)] if install.additional else []),
        (Attr.REMOTE_ADDR, Endpoint(landing, install.remote.port)),
    ]
    return encode(version, MessageType.IKE_ADD, attributes)


def update_message(version: int, install: Install, landing: str) -> bytes:
    """IKE_UPDATE: who the peers are; makes the SA PASSIVE. charon wants IKE_ID first."""
    attributes: Attributes = [
        (Attr.IKE_ID, install.id),
        (Attr.LOCAL_ID, install.local_id),
        (Attr.REMOTE_ID, install.remote_id),
    ]
    if install.eap_id is not None:
        attributes.append((Attr.REMOTE_EAP_ID, install.eap_id))
    attributes += [
        (Attr.LOCAL_ADDR, install.local),
        (Attr.REMOTE_ADDR, Endpoint(landing, install.remote.port)),
    ]
    attributes += [(Attr.CONDITIONS, word) for word in _words(version, install.conditions)]
    attributes += [(Attr.EXTENSIONS, word) for word in _words(version, install.extensions)]
    attributes.append((Attr.CONFIG_NAME, install.connection))
    attributes += [(Attr.LOCAL_VIP, Endpoint(vip, 0)) for vip in install.local_vips]
    attributes += [(Attr.REMOTE_VIP, Endpoint(vip, 0)) for vip in install.remote_vips]
    return encode(version, MessageType.IKE_UPDATE, attributes)


def _words(version: int, words: tuple[int, ...]) -> tuple[int, ...]:
    """Those words of conditions or extensions that a charon of this version takes for what they are. An older one
    reads the private word of a newer one's SA as another plain word, which takes NAT_ANY back."""
    return words if version >= PRIVATE_WORDS_SINCE else tuple([word for word in words if not word & _PRIVATE])


def message_id_messages(version: int, install: Install) -> Iterator[bytes]:
    """Where the requests of both sides go on. charon starts with 0, and ignores a message that says so."""
    if install.message_ids is not None:
        own, peers = install.message_ids
    else:
        # of a rebuilt SA the client's requests go on; the gateway's first is 0
        own, peers = (install.message_id, 0) if install.id.initiator else (0, install.message_id)
    for kind, number in ((MessageType.IKE_MID_INITIATOR, own), (MessageType.IKE_MID_RESPONDER, peers)):
        if number:
            yield next_id_message(version, install.id, kind, number)


def next_id_message(version: int, ike_id: IkeId, kind: MessageType, number: int) -> bytes:
    """IKE_MID_INITIATOR: the message ID of this host's next request; IKE_MID_RESPONDER: of the peer's."""
    return encode(version, kind, [(Attr.IKE_ID, ike_id), (Attr.MID, number)])


def address_message(version: int, ike_id: IkeId, remote: Endpoint) -> bytes:
    """IKE_UPDATE that only moves the SA to `remote`; charon applies it in any state."""
    return encode(version, MessageType.IKE_UPDATE, [(Attr.IKE_ID, ike_id), (Attr.REMOTE_ADDR, remote)])


def vips_message(version: int, ike_id: IkeId, addresses: tuple[str, ...]) -> bytes:
    """IKE_UPDATE that gives the SA these virtual IPs in the place of those it has; charon applies it in any state. An
    HA pool reserves them, and does not release the others."""
    vips = [(Attr.REMOTE_VIP, Endpoint(address, 0)) for address in addresses]
    return encode(version, MessageType.IKE_UPDATE, [(Attr.IKE_ID, ike_id), *vips])


def child_message(version: int, ike_id: IkeId, new: NewChild) -> bytes:
    """CHILD_ADD: charon derives its keys from SK_d and the nonces (RFC 7296 section 2.17) and installs it."""
    child = new.child
    attributes: Attributes = [
        (Attr.IKE_ID, ike_id),
        (Attr.INITIATOR, int(child.initiator)),
        (Attr.INBOUND_SPI, child.spi_in),
        (Attr.OUTBOUND_SPI, child.spi_out),
        (Attr.INBOUND_CPI, 0),
        (Attr.OUTBOUND_CPI, 0),
        (Attr.IPSEC_MODE, child.mode),
        (Attr.IPCOMP, child.ipcomp),
        (Attr.CONFIG_NAME, child.name),
        (Attr.ALG_ENCR, child.encr),
    ]
    if child.encr_len:
        attributes.append((Attr.ALG_ENCR_LEN, child.encr_len))
    if child.integ:
        attributes.append((Attr.ALG_INTEG, child.integ))
    attributes += [(Attr.ESN, child.esn), (Attr.NONCE_I, new.nonce_i), (Attr.NONCE_R, new.nonce_r)]
    attributes += [(Attr.LOCAL_TS, selector) for selector in child.local_ts]
    attributes += [(Attr.REMOTE_TS, selector) for selector in child.remote_ts]
    return encode(version, MessageType.CHILD_ADD, attributes)


def delete_message(version: int, ike_id: IkeId) -> bytes:
    """IKE_DELETE: charon drops the SA without a DELETE to the peer or an updown event."""
    return encode(version, MessageType.IKE_DELETE, [(Attr.IKE_ID, ike_id)])


def segment_message(version: int, kind: MessageType, segment: int) -> bytes:
    """SEGMENT_TAKE, SEGMENT_DROP or RESYNC of one segment."""
    return encode(version, kind, [(Attr.SEGMENT, segment)])
