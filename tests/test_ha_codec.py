"""The message format of strongSwan's ha plugin (bridge.charon.ha_codec)."""

from __future__ import annotations

from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.charon.ha_codec import decode, encode
from bridge.charon.ha_message import Attr, HaError, IkeId, MessageType
from bridge.charon.releases import version_for
from bridge.stub.types import Endpoint, Identity, TrafficSelector
from vectors_support import NAMES, SIDES, VECTORS, messages

VERSIONS = (3, 4, 5)
ADDED_IN_4 = {Attr.ADD_SECRET, Attr.ALG_ADD_KES}

spis = st.binary(min_size=8, max_size=8)
ike_ids = st.builds(IkeId.of, spis, spis, st.booleans())
identities = st.builds(Identity, st.integers(0, 255), st.binary(max_size=255))
addresses = st.one_of(
    st.integers(0, 2**32 - 1).map(lambda n: str(IPv4Address(n))),
    st.integers(0, 2**128 - 1).map(lambda n: str(IPv6Address(n))),
)
endpoints = st.builds(Endpoint, addresses, st.integers(0, 65535))
texts = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=40)
ports = st.integers(0, 65535)


def _selectors(kind: int, bits: int, form: Any) -> st.SearchStrategy[TrafficSelector]:
    address = st.integers(0, 2**bits - 1).map(lambda n: str(form(n)))
    return st.builds(TrafficSelector, st.just(kind), st.integers(0, 255), ports, ports, st.booleans(), address, address)


selectors = st.one_of(_selectors(7, 32, IPv4Address), _selectors(8, 128, IPv6Address))
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "ike_id": ike_ids,
    "identity": identities,
    "endpoint": endpoints,
    "text": texts,
    "u8": st.integers(0, 255),
    "u16": st.integers(0, 65535),
    "u32": st.integers(0, 2**32 - 1),
    "chunk": st.binary(max_size=100),
    "selector": selectors,
}
KINDS = {
    "ike_id": {Attr.IKE_ID, Attr.IKE_REKEY_ID},
    "identity": {Attr.LOCAL_ID, Attr.REMOTE_ID, Attr.REMOTE_EAP_ID},
    "endpoint": {Attr.LOCAL_ADDR, Attr.REMOTE_ADDR, Attr.LOCAL_VIP, Attr.REMOTE_VIP, Attr.PEER_ADDR},
    "text": {Attr.CONFIG_NAME},
    "u8": {Attr.IKE_VERSION, Attr.INITIATOR, Attr.IPSEC_MODE, Attr.IPCOMP},
    "u32": {Attr.CONDITIONS, Attr.EXTENSIONS, Attr.MID, Attr.INBOUND_SPI, Attr.OUTBOUND_SPI},
    "chunk": {
        Attr.NONCE_I,
        Attr.NONCE_R,
        Attr.SECRET,
        Attr.ADD_SECRET,
        Attr.OLD_SKD,
        Attr.LOCAL_DH,
        Attr.REMOTE_DH,
        Attr.PSK,
        Attr.IV,
        Attr.ALG_ADD_KES,
    },
    "selector": {Attr.LOCAL_TS, Attr.REMOTE_TS},
}


def _value(name: Attr) -> st.SearchStrategy[tuple[Attr, Any]]:
    kind = next((kind for kind, names in KINDS.items() if name in names), "u16")
    return VALUES[kind].map(lambda value: (name, value))


def _attributes(version: int) -> st.SearchStrategy[list[tuple[Attr, Any]]]:
    names = [name for name in Attr if version >= 4 or name not in ADDED_IN_4]
    return st.lists(st.sampled_from(names).flatmap(_value), max_size=12)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("vector", VECTORS, ids=NAMES)
def test_what_charon_sends_is_decoded_and_encoded_to_the_same_octets(vector: dict[str, Any], side: str) -> None:
    for octets in messages(vector, side):
        message = decode(octets)
        assert encode(message.version, message.type, message.attributes) == octets


def test_an_ike_add_of_charon_reads_as_documented() -> None:
    message = decode(messages(VECTORS[0], "gateway")[0])
    assert (message.version, message.type) == (3, MessageType.IKE_ADD)
    assert message.first(Attr.IKE_VERSION) == 2
    assert message.first(Attr.IKE_ID) == IkeId.of(
        bytes.fromhex("6222a7538824bda6"), bytes.fromhex("dc263ead37fa6d70"), False
    )
    assert message.first(Attr.ALG_ENCR) == 12
    assert message.first(Attr.ALG_ENCR_LEN) == 128
    assert message.first(Attr.ALG_INTEG) == 12
    assert message.first(Attr.ALG_PRF) == 5
    assert message.first(Attr.ALG_KE) == 31
    assert message.first(Attr.REMOTE_ADDR) == Endpoint("192.168.50.10", 500)


@pytest.mark.parametrize("vector", VECTORS, ids=NAMES)
def test_a_releases_messages_have_the_version_that_vici_foretells(vector: dict[str, Any]) -> None:
    assert {octets[0] for side in SIDES for octets in messages(vector, side)} == {version_for(vector["strongswan"])}


def test_an_ike_add_of_a_rekey_with_several_key_exchanges_reads_as_documented() -> None:
    [vector] = [vector for vector in VECTORS if vector["proposal"].endswith("-x25519-ke1_mlkem768")]
    [rekey] = [
        message
        for message in map(decode, messages(vector, "gateway"))
        if message.type is MessageType.IKE_ADD and message.first(Attr.IKE_REKEY_ID)
    ]
    assert rekey.version == 5
    assert rekey.first(Attr.ALG_KE) == 31
    assert rekey.first(Attr.ALG_ADD_KES)[:2] == (36).to_bytes(2)
    assert len(rekey.first(Attr.SECRET)) == len(rekey.first(Attr.ADD_SECRET)) == 32
    assert len(rekey.first(Attr.OLD_SKD)) == 48


def test_from_version_5_on_conditions_and_extensions_come_twice() -> None:
    for vector in VECTORS:
        update = next(m for m in map(decode, messages(vector, "gateway")) if m.type is MessageType.IKE_UPDATE)
        words = 2 if update.version == 5 else 1
        assert len(update.all(Attr.CONDITIONS)) == len(update.all(Attr.EXTENSIONS)) == words
        assert [word >> 31 for word in update.all(Attr.CONDITIONS)] == [0, 1][:words]


@pytest.mark.parametrize("version", VERSIONS)
@given(data=st.data())
def test_every_message_survives_the_round_trip(version: int, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(MessageType))
    attributes = data.draw(_attributes(version))
    assert decode(encode(version, kind, attributes)) == (version, kind, attributes)


@given(st.binary(max_size=200))
def test_arbitrary_octets_raise_nothing_but_ha_error(octets: bytes) -> None:
    with suppress(HaError):
        decode(octets)


@given(st.sampled_from(VERSIONS), st.sampled_from(MessageType), st.binary(max_size=200))
def test_arbitrary_attributes_raise_nothing_but_ha_error(version: int, kind: MessageType, octets: bytes) -> None:
    with suppress(HaError):
        decode(bytes((version, kind)) + octets)


@pytest.mark.parametrize("vector", VECTORS[:1], ids=NAMES[:1])
def test_a_message_cut_anywhere_is_an_error_or_a_shorter_list(vector: dict[str, Any]) -> None:
    for octets in messages(vector, "gateway"):
        whole = decode(octets)
        for end in range(2, len(octets)):
            try:
                cut = decode(octets[:end])
            except HaError:
                continue
            assert cut.attributes == whole.attributes[: len(cut.attributes)]


def test_numbers_shift_behind_what_version_4_added() -> None:
    conditions = [(Attr.CONDITIONS, 1)]
    assert encode(3, MessageType.IKE_UPDATE, conditions)[1:] == encode(5, MessageType.IKE_UPDATE, conditions)[1:]
    skd = [(Attr.OLD_SKD, b"x")]
    assert encode(3, MessageType.IKE_ADD, skd)[2] == 18
    assert encode(4, MessageType.IKE_ADD, skd)[2] == encode(5, MessageType.IKE_ADD, skd)[2] == 19
    assert encode(3, MessageType.IKE_ADD, [(Attr.MID, 1)])[2] == 33
    assert encode(4, MessageType.IKE_ADD, [(Attr.MID, 1)])[2] == 35


@pytest.mark.parametrize(
    ("version", "attributes"),
    [
        (2, []),
        (6, []),
        (3, [(Attr.ADD_SECRET, b"")]),
        (3, [(Attr.ALG_PRF, 65536)]),
        (3, [(Attr.CONFIG_NAME, "a\0b")]),
        (3, [(Attr.REMOTE_ADDR, Endpoint("nowhere", 1))]),
        (3, [(Attr.LOCAL_ID, Identity(2, bytes(256)))]),
        (3, [(Attr.IKE_ID, IkeId.of(bytes(7), bytes(8), True))]),
        (3, [(Attr.SECRET, bytes(2048))]),
    ],
)
def test_what_the_format_cannot_hold_is_refused(version: int, attributes: list[tuple[Attr, Any]]) -> None:
    with pytest.raises(HaError):
        encode(version, MessageType.IKE_ADD, attributes)


def test_a_message_shows_no_value() -> None:
    message = decode(encode(3, MessageType.IKE_ADD, [(Attr.OLD_SKD, b"secret octets")]))
    assert "OLD_SKD" in repr(message)
    assert "secret" not in repr(message)


@pytest.mark.parametrize(
    ("release", "version"),
    [("5.9.8", 3), ("5.9.14", 3), ("6.0.0", 3), ("6.0.1", 4), ("6.0.2", 5), ("6.1.0", 5), ("6.1.0dr1", 5)],
)
def test_the_version_follows_from_charons_release(release: str, version: int) -> None:
    assert version_for(release) == version
