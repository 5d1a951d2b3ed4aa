"""Whether HA messages and VICI agree on the peers of an IKE_SA."""

from __future__ import annotations

from bridge.charon.identity_text import is_named
from bridge.charon.ike_sa import IkeSa
from bridge.charon.vici_types import SaInfo


def differs(sa: IkeSa, info: SaInfo) -> str:
    """In what HA messages contradict VICI about who the peers of an SA are; empty where they agree."""
    if sa.connection != info.connection:
        return "HA messages name another connection than VICI"
    for identity, text, whose in (
        (sa.local_id, info.local_id, "another identity of this host"),
        (sa.remote_id, info.remote_id, "another identity of the peer"),
        (sa.eap_id, info.eap_id, "another EAP identity of the peer"),
    ):
        if identity is None and not text:
            continue
        if identity is None or not text or not is_named(identity, text):
            return f"HA messages name {whose} than VICI"
    return ""
