"""What charon writes into its HA messages, and what it never does (bridge.charon.ha_grammar)."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.charon.ha_codec import encode
from bridge.charon.ha_grammar import MalformedMessage, read
from bridge.charon.ha_message import Attr, IkeId, MessageType
from bridge.stub.types import Endpoint, Identity
from vectors_support import NAMES, SIDES, VECTORS, messages

VERSIONS = (3, 4, 5)
SA = IkeId.of(b"I" * 8, b"R" * 8, False)
HERE, THERE = Endpoint("192.168.50.1", 4500), Endpoint("192.168.50.10", 4500)
ADMIN = Identity(3, b"admin@corp.example")


def update(version: int = 3) -> list[tuple[Attr, Any]]:
    """The attributes of the IKE_UPDATE that charon sends of an SA that came up."""
    words = 2 if version == 5 else 1
    return [
        (Attr.IKE_ID, SA),
        (Attr.LOCAL_ID, Identity(2, b"vpn.example.org")),
        (Attr.REMOTE_ID, Identity(2, b"client.example.org")),
        (Attr.LOCAL_ADDR, HERE),
        (Attr.REMOTE_ADDR, THERE),
        *[(Attr.CONDITIONS, number) for number in range(words)],
        *[(Attr.EXTENSIONS, number) for number in range(words)],
        (Attr.CONFIG_NAME, "gw"),
        (Attr.PEER_ADDR, THERE),
    ]


def octets(attributes: list[tuple[Attr, Any]], version: int = 3, kind: MessageType = MessageType.IKE_UPDATE) -> bytes:
    return encode(version, kind, attributes)


def overflowing(name: Attr, identity: bytes, version: int = 3) -> bytes:
    """charon's IKE_UPDATE with an identity of any length: one octet of length, then all of it."""
    parts = [bytes((version, MessageType.IKE_UPDATE))]
    for attribute, value in update(version):
        part = encode(version, MessageType.IKE_UPDATE, [(attribute, value)])[2:]
        if attribute is name:
            part = part[:1] + bytes((11, len(identity) & 0xFF)) + identity
        parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("vector", VECTORS, ids=NAMES)
def test_what_charons_of_each_release_sent_is_read(vector: dict[str, Any], side: str) -> None:
    for message in messages(vector, side):
        assert read(message).first(Attr.IKE_ID) is not None


@pytest.mark.parametrize("version", VERSIONS)
def test_an_update_as_charon_writes_it_is_read(version: int) -> None:
    assert read(octets(update(version), version)).first(Attr.REMOTE_ID) == Identity(2, b"client.example.org")


@pytest.mark.parametrize("name", [Attr.LOCAL_ID, Attr.REMOTE_ID])
@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_behind_the_255th_octet_of_an_identity_is_no_attribute(name: Attr, version: int) -> None:
    forged = encode(
        version, MessageType.IKE_UPDATE, [(Attr.REMOTE_ID, ADMIN), (Attr.REMOTE_VIP, Endpoint("10.20.2.77", 0))]
    )[2:]
    identity = b"C" * (309 - len(forged)) + forged
    with pytest.raises(MalformedMessage) as raised:
        read(overflowing(name, identity, version))
    assert raised.value.ike_id == SA


def test_an_honest_identity_of_289_octets_is_malformed_and_names_its_sa() -> None:
    with pytest.raises(MalformedMessage) as raised:
        read(overflowing(Attr.REMOTE_ID, b"CN=" + b"x" * 286))
    assert raised.value.ike_id == SA


@given(st.binary(max_size=400).map(lambda tail: bytes(256 - min(len(tail), 256)) + tail))
def test_no_identity_of_more_than_255_octets_makes_another_identity_of_its_peer(identity: bytes) -> None:
    """Whatever is behind its 255th octet: malformed, or an EAP identity more, which VICI does not confirm."""
    try:
        message = read(overflowing(Attr.REMOTE_ID, identity))
    except MalformedMessage:
        return
    assert [name for name, _ in message.attributes].count(Attr.REMOTE_ID) == 1
    assert message.first(Attr.REMOTE_ID).data == identity[: len(identity) & 0xFF]


@pytest.mark.parametrize(
    "name", [Attr.LOCAL_ID, Attr.REMOTE_ID, Attr.LOCAL_ADDR, Attr.CONFIG_NAME, Attr.CONDITIONS, Attr.IKE_ID]
)
@pytest.mark.parametrize("version", VERSIONS)
def test_an_attribute_that_charon_never_repeats_makes_a_message_malformed(name: Attr, version: int) -> None:
    attributes = update(version)
    at = max(place for place, (attribute, _) in enumerate(attributes) if attribute is name)
    attributes.insert(at, attributes[at])
    with pytest.raises(MalformedMessage, match=name.name):
        read(octets(attributes, version))


def test_attributes_in_another_order_are_malformed() -> None:
    attributes = update()
    for place in range(len(attributes) - 1):
        swapped = [*attributes]
        swapped[place], swapped[place + 1] = swapped[place + 1], swapped[place]
        with pytest.raises(MalformedMessage):
            read(octets(swapped))


@pytest.mark.parametrize("name", [Attr.LOCAL_ID, Attr.REMOTE_ID, Attr.LOCAL_ADDR, Attr.CONDITIONS, Attr.CONFIG_NAME])
def test_an_update_with_identities_has_all_that_charon_writes_beside_them(name: Attr) -> None:
    with pytest.raises(MalformedMessage, match=name.name):
        read(octets([(attribute, value) for attribute, value in update() if attribute is not name]))


@pytest.mark.parametrize("foreign", [(Attr.SECRET, b"x"), (Attr.OLD_SKD, b"x"), (Attr.MID, 7)])
def test_an_attribute_of_another_message_is_malformed(foreign: tuple[Attr, Any]) -> None:
    with pytest.raises(MalformedMessage, match=foreign[0].name):
        read(octets([*update(), foreign]))


def test_virtual_ips_peer_addresses_and_segments_may_repeat() -> None:
    vips = [(Attr.REMOTE_VIP, Endpoint(f"10.20.0.{number}", 0)) for number in range(1, 4)]
    assert len(read(octets([(Attr.IKE_ID, SA), *vips])).all(Attr.REMOTE_VIP)) == 3
    assert read(octets([*update(), (Attr.PEER_ADDR, HERE)])).all(Attr.PEER_ADDR) == (THERE, HERE)
    segments = [(Attr.SEGMENT, number) for number in (1, 2)]
    assert read(octets(segments, kind=MessageType.STATUS)).all(Attr.SEGMENT) == (1, 2)


def test_a_message_about_an_sa_names_it() -> None:
    with pytest.raises(MalformedMessage, match="names no IKE_SA"):
        read(octets([(Attr.MID, 1)], kind=MessageType.IKE_MID_RESPONDER))


@pytest.mark.parametrize("cut", [1, 2, 10, 20, 22, 25, 30, 60])
def test_a_cut_message_names_its_sa_where_that_is_still_there(cut: int) -> None:
    whole = octets(update())
    with pytest.raises(MalformedMessage) as raised:
        read(whole[:cut])
    assert raised.value.ike_id == (SA if cut >= 21 else None)


def test_a_message_of_a_type_that_is_not_known_names_its_sa() -> None:
    message = bytearray(octets([(Attr.IKE_ID, SA)], kind=MessageType.IKE_DELETE))
    message[1] = 13
    with pytest.raises(MalformedMessage) as raised:
        read(bytes(message))
    assert raised.value.ike_id == SA


@given(st.binary(max_size=200))
def test_arbitrary_octets_raise_nothing_but_malformed(data: bytes) -> None:
    with suppress(MalformedMessage):
        read(data)
