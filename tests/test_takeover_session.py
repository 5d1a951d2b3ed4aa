"""Where the keys of a session come from, and what charon is told to take it over (bridge.gateway.takeover_session)."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from bank_support import stub_of
from bridge.charon.ha_codec import decode
from bridge.charon.ha_commands import add_message, message_id_messages
from bridge.charon.ha_message import Attr, MessageType
from bridge.charon.ike_sa import IkeSa
from bridge.charon.install import Install
from bridge.charon.sa_tracker import SaTracker
from bridge.charon.vici_types import ChildConfig, ConnectionInfo
from bridge.gateway import takeover_session as reasons
from bridge.gateway.takeover_session import obstacle, owned, session_of
from bridge.ike.transforms import Suite
from bridge.stub.derivation import Derivation
from bridge.stub.stub import Stub
from test_sa_tracker import feed, tracker
from vectors_support import NAMES, SIDES, VECTORS

NOW = 1_700_000_100.0
NET = ConnectionInfo("gw", 14400, 0, (ChildConfig("net"),))


def shared(vector: dict[str, Any], side: str, until: MessageType | None = None) -> list[IkeSa]:
    """The IKE_SAs of a gateway that shares the address of the vector's host."""
    known, _, _ = tracker()
    plain: SaTracker = tracker()[0]
    feed(plain, vector, side, until)
    known.shared = {sa.local.address for sa in plain.sas.values() if sa.local is not None}
    known.owner = "192.0.2.1"
    feed(known, vector, side, until)
    return [sa for sa in known.sas.values() if sa.up]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("vector", VECTORS, ids=NAMES)
def test_the_keys_come_from_what_the_stub_says(vector: dict[str, Any], side: str) -> None:
    """By the keys that real charons derived, after a first exchange and after rekeying."""
    for until in (MessageType.IKE_UPDATE, None):
        for sa in shared(vector, side, until):
            assert sa.derivation is not None
            assert sa.derivation.keys(sa.suite, sa.id.spi_i, sa.id.spi_r).sk_d == sa.sk_d
            assert sa.derivation.owner == "192.0.2.1"


def test_only_an_ike_sa_at_a_shared_address_says_where_its_keys_come_from() -> None:
    known, _, _ = tracker()
    known.shared = {"203.0.113.1"}
    feed(known, VECTORS[0], "gateway", MessageType.IKE_UPDATE)
    assert [sa.derivation for sa in known.sas.values() if sa.up] == [None]
    [sa] = shared(VECTORS[0], "gateway", MessageType.IKE_UPDATE)
    assert sa.derivation is not None


def test_an_ike_sa_at_a_shared_address_is_indexed_under_it() -> None:
    [sa] = shared(VECTORS[0], "gateway", MessageType.IKE_UPDATE)
    assert sa.local is not None
    assert sa.index_here("192.0.2.1").gateway == sa.local.address


def takeable(**changes: Any) -> Stub:
    derivation = Derivation(b"i" * 32, b"r" * 32, b"s" * 32, b"", b"d" * 32, 5, 4, 7, "192.0.2.1", 2)
    return replace(stub_of(b"gateways"), **{"derivation": derivation, "expires": int(NOW) + 3600, **changes})


def test_the_new_owner_raises_the_epoch_and_the_revision() -> None:
    before = takeable()
    after = owned(before, "192.0.2.2", now=NOW)
    assert after.derivation is not None
    assert (after.derivation.owner, after.derivation.epoch) == ("192.0.2.2", 3)
    assert after.revision > before.revision


def install_of(stub: Stub) -> Install:
    """What charon is given of a session."""
    install = session_of(stub, NET, began=0.0, now=NOW).install
    assert install is not None
    return install


def test_charon_is_given_the_keys_and_both_message_ids() -> None:
    stub = takeable()
    install = install_of(stub)
    add = decode(add_message(3, install, "198.18.0.8"))
    said = {name: add.first(name) for name in (Attr.NONCE_I, Attr.NONCE_R, Attr.SECRET, Attr.OLD_SKD, Attr.ALG_OLD_PRF)}
    assert list(said.values()) == [b"i" * 32, b"r" * 32, b"s" * 32, b"d" * 32, 5]
    assert add.first(Attr.IKE_REKEY_ID) is None
    ids = [decode(octets) for octets in message_id_messages(3, install)]
    assert [(message.type, message.first(Attr.MID)) for message in ids] == [
        (MessageType.IKE_MID_INITIATOR, 4),
        (MessageType.IKE_MID_RESPONDER, 7),
    ]


def test_the_first_ike_sa_of_a_session_has_no_old_keys() -> None:
    derivation = Derivation(b"i" * 32, b"r" * 32, b"s" * 32, b"", b"", 0)
    install = install_of(takeable(derivation=derivation))
    add = decode(add_message(3, install, "198.18.0.8"))
    assert add.first(Attr.OLD_SKD) is None
    assert add.first(Attr.ALG_OLD_PRF) is None
    assert list(message_id_messages(3, install)) == []


def test_child_sas_keep_their_spis_under_keys_that_no_host_has() -> None:
    one, other = install_of(takeable()), install_of(takeable())
    assert [new.child for new in one.children] == list(takeable().children)
    nonces = [nonce for made in (one, other) for new in made.children for nonce in (new.nonce_i, new.nonce_r)]
    assert len(set(nonces)) == len(nonces) > 0


@pytest.mark.parametrize(
    ("changes", "connection", "version", "reason"),
    [
        ({}, NET, 5, ""),
        ({"derivation": None}, NET, 5, reasons.NO_DERIVATION),
        ({"expires": int(NOW)}, NET, 5, reasons.EXPIRED),
        ({"authenticated_until": int(NOW)}, NET, 5, reasons.AUTHENTICATION_ENDED),
        ({}, None, 5, reasons.CONNECTION_MISSING),
        ({"suite": Suite(encr=3, encr_len=0, integ=2, prf=2, group=2)}, NET, 5, reasons.SUITE),
        ({"suite": Suite(encr=12, encr_len=128, integ=1, prf=5, group=31)}, NET, 5, reasons.SUITE),
        ({"suite": Suite(encr=20, encr_len=128, integ=0, prf=5, group=31)}, NET, 5, ""),
        ({}, ConnectionInfo("gw", 14400, 0, (ChildConfig("other"),)), 5, reasons.CHILD_MISSING),
    ],
)
def test_a_session_that_cannot_be_taken_over_has_a_reason(
    changes: dict[str, Any], connection: ConnectionInfo | None, version: int, reason: str
) -> None:
    children = [child.name for child in connection.children] if connection is not None else []
    assert obstacle(takeable(**changes), connection, children, version=version, now=NOW) == reason


def test_additional_key_exchanges_need_a_charon_that_knows_them() -> None:
    derivation = takeable().derivation
    assert derivation is not None
    stub = takeable(derivation=replace(derivation, additional=b"k" * 32))
    assert obstacle(stub, NET, ["net"], version=3, now=NOW) == reasons.OLD_CHARON
    assert obstacle(stub, NET, ["net"], version=4, now=NOW) == ""


def test_the_authentication_of_a_session_ends_when_it_would_have_at_its_gateway_before() -> None:
    until = int(NOW) + 600
    made = session_of(takeable(authenticated_until=until), NET, began=0.0, now=NOW)
    assert made.sa.authenticated_until == until
    # charon's own timers begin again
    assert (made.sa.established, made.sa.expires) == (int(NOW), int(NOW) + NET.lifetime)
