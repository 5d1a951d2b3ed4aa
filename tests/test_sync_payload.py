"""The IKE_SA_SYNC payload (bridge.ike.sync_payload)."""

from __future__ import annotations

from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.ike.message import MalformedMessage
from bridge.ike.sync_payload import Attribute, SyncPayload, encode_child, encode_gateways, proof_offset

SPI = bytes.fromhex("0123456789abcdef")
addresses = st.one_of(
    st.integers(0, 2**32 - 1).map(lambda n: str(IPv4Address(n))),
    st.integers(0, 2**128 - 1).map(lambda n: str(IPv6Address(n))),
)
once = st.dictionaries(
    st.sampled_from([Attribute.PROOF, Attribute.SEALED_STUB, 5, 77, 65535]), st.binary(max_size=70), max_size=4
).map(lambda found: [(int(kind), value) for kind, value in found.items()])
children = st.lists(
    st.tuples(st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1)).map(lambda pair: encode_child(*pair)), max_size=3
)
lifetimes = st.lists(st.binary(min_size=4, max_size=4).map(lambda value: (int(Attribute.LIFETIME), value)), max_size=1)
attributes = st.tuples(once, children, lifetimes).map(lambda parts: tuple(parts[0] + parts[1] + parts[2]))
payloads = st.builds(SyncPayload, st.booleans(), addresses, st.binary(min_size=8, max_size=8), attributes)


def test_the_payload_is_laid_out_as_its_figure_shows() -> None:
    sync = SyncPayload(False, "192.0.2.1", SPI, ((Attribute.PROOF, b"\xaa\xbb"), encode_child(1, 0xC0010203)))
    assert sync.encode().hex() == (
        "00040000" + "0123456789abcdef" + "c0000201" + "00010002aabb" + "00020006" + "0001" + "c0010203"
    )


def test_the_direction_is_the_first_bit() -> None:
    assert SyncPayload(True, "192.0.2.1", SPI).encode()[0] == 0x80
    assert SyncPayload(False, "192.0.2.1", SPI).encode()[0] == 0x00


def test_an_ipv6_address_has_16_octets() -> None:
    body = SyncPayload(False, "2001:db8::1", SPI).encode()
    assert body[1] == 6
    assert len(body) == 12 + 16


@given(payloads)
def test_every_payload_survives_the_round_trip(sync: SyncPayload) -> None:
    assert SyncPayload.decode(sync.encode()) == sync


@given(st.binary(max_size=120))
def test_arbitrary_octets_raise_nothing_but_malformed_message(body: bytes) -> None:
    with suppress(MalformedMessage):
        SyncPayload.decode(body)


@given(payloads, st.data())
def test_a_payload_with_any_octet_altered_raises_nothing_else(sync: SyncPayload, data: st.DataObject) -> None:
    body = bytearray(sync.encode())
    body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    with suppress(MalformedMessage):
        SyncPayload.decode(bytes(body))


@given(payloads)
def test_the_place_of_the_proof_is_that_of_its_value(sync: SyncPayload) -> None:
    body = sync.encode()
    offset = proof_offset(body)
    proof = sync.first(Attribute.PROOF)
    assert (offset is None) == (proof is None)
    if offset is not None and proof is not None:
        assert body[offset : offset + len(proof)] == proof


def test_reserved_octets_are_not_looked_at_and_unknown_attributes_skipped() -> None:
    body = bytearray(SyncPayload(False, "192.0.2.1", SPI, ((999, b"?"), (Attribute.PROOF, b"p"))).encode())
    body[2:4] = b"\xff\xff"
    sync = SyncPayload.decode(bytes(body))
    assert sync.first(Attribute.PROOF) == b"p"


ONCE = [
    bytes.fromhex(text)
    for text in ("0003000100", "0004000400000e10", "0005000500c0000202", "00060004a0000001", "0008000504c0000202")
]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        bytes.fromhex("00040000") + SPI,
        bytes.fromhex("01040000") + SPI + bytes(4),
        bytes.fromhex("00050000") + SPI + bytes(16),
        bytes.fromhex("00060000") + SPI + bytes(4),
        bytes.fromhex("00040000") + SPI + bytes(4) + bytes.fromhex("0001"),
        bytes.fromhex("00040000") + SPI + bytes(4) + bytes.fromhex("00010002ff"),
        bytes.fromhex("00040000") + SPI + bytes(4) + bytes.fromhex("0001000100") * 2,
        bytes.fromhex("00040000") + SPI + bytes(4) + bytes.fromhex("0004000300000a"),
        bytes.fromhex("00040000") + SPI + bytes(4) + bytes.fromhex("00020004c0010203"),
        bytes.fromhex("00040000") + SPI + bytes(4) + bytes.fromhex("0002000800000001c0010203"),
        bytes.fromhex("00040000") + SPI + bytes(4) + bytes.fromhex("00060005a000000100"),
        bytes.fromhex("00040000") + SPI + bytes(4) + bytes.fromhex("0008000504c00002"),
        bytes.fromhex("00040000") + SPI + bytes(4) + bytes.fromhex("0008000505c0000202"),
        bytes.fromhex("00040000") + SPI + bytes(4) + bytes.fromhex("00080055") + bytes.fromhex("04c0000202") * 17,
        *(bytes.fromhex("00040000") + SPI + bytes(4) + attribute * 2 for attribute in ONCE),
    ],
    ids=[
        "empty",
        "no address",
        "version 1",
        "family 5",
        "family 6 with 4 octets",
        "attribute header cut",
        "attribute cut",
        "PROOF twice",
        "LIFETIME of 3 octets",
        "CHILD of 4 octets",
        "CHILD of 8 octets",
        "OLD_CHILDREN of 5 octets",
        "GATEWAYS with an address cut",
        "GATEWAYS with family 5",
        "GATEWAYS with 17 addresses",
        "SEALED_STUB twice",
        "LIFETIME twice",
        "MOVE twice",
        "OLD_CHILDREN twice",
        "GATEWAYS twice",
    ],
)
def test_what_breaks_the_layout_is_malformed(body: bytes) -> None:
    with pytest.raises(MalformedMessage):
        SyncPayload.decode(body)


def test_gateways_are_addresses_with_their_family_at_most_16() -> None:
    kind, value = encode_gateways(["192.0.2.1", "2001:db8::1"])
    assert (kind, value.hex()) == (8, "04c0000201" + "0620010db8000000000000000000000001")
    many = [f"192.0.2.{number}" for number in range(20)]
    for addresses in (["192.0.2.1", "2001:db8::1"], many):
        sync = SyncPayload(True, "192.0.2.9", SPI, (encode_gateways(addresses),))
        assert SyncPayload.decode(sync.encode()).gateways == tuple(addresses[:16])
    assert SyncPayload(True, "192.0.2.9", SPI).gateways == ()


def test_children_are_numbered_pairs() -> None:
    sync = SyncPayload(False, "192.0.2.1", SPI, (encode_child(0, 1), encode_child(5, 0xFFFFFFFF)))
    assert sync.children == ((0, 1), (5, 0xFFFFFFFF))


@pytest.mark.parametrize(("number", "spi"), [(2**16, 1), (0, 2**32), (-1, 1)])
def test_a_child_that_does_not_fit_cannot_be_encoded(number: int, spi: int) -> None:
    with pytest.raises(ValueError, match="16 bits"):
        encode_child(number, spi)


@pytest.mark.parametrize(("gateway", "spi"), [("gateway", SPI), ("192.0.2.1", SPI[:7])])
def test_an_index_that_is_none_cannot_be_encoded(gateway: str, spi: bytes) -> None:
    with pytest.raises(ValueError, match=r"address|octets"):
        SyncPayload(False, gateway, spi).encode()
