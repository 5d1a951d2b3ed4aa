"""Indexes, identities for people, and the encoding of stubs."""

from __future__ import annotations

import contextlib
from ipaddress import IPv4Address, IPv6Address, ip_address

import msgspec
import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from bank_support import stub_of
from bridge.ike.transforms import Suite
from bridge.stub.codec import decode, encode
from bridge.stub.stub import Index, Stub, StubError
from bridge.stub.types import ChildSa, Endpoint, Identity, TrafficSelector

octet = st.integers(0, 255)
word = st.integers(0, 2**16 - 1)
long = st.integers(0, 2**32 - 1)
spi = st.binary(min_size=8, max_size=8)
addresses = st.ip_addresses().map(str)
identities = st.builds(Identity, octet, st.binary(max_size=40))
endpoints = st.builds(Endpoint, addresses, word)
times = st.integers(1, 2**33)
maybe_never = st.just(0) | times


@st.composite
def selectors(draw: st.DrawFn) -> TrafficSelector:
    kind, family = draw(st.sampled_from([(7, IPv4Address), (8, IPv6Address)]))
    bound = st.ip_addresses(v=4 if family is IPv4Address else 6).map(str)
    first = draw(bound)
    last = draw(st.just(first) | bound)
    return TrafficSelector(kind, draw(octet), draw(word), draw(word), draw(st.booleans()), first, last)


children = st.builds(
    ChildSa,
    name=st.text(max_size=20),
    mode=octet,
    ipcomp=octet,
    encr=word,
    encr_len=word,
    integ=word,
    esn=octet,
    groups=st.lists(word, max_size=3).map(tuple),
    spi_in=long,
    spi_out=long,
    local_ts=st.lists(selectors(), max_size=3).map(tuple),
    remote_ts=st.lists(selectors(), max_size=3).map(tuple),
    initiator=st.booleans(),
)
suites = st.builds(
    Suite, encr=word, encr_len=word, integ=word, prf=word, group=word, additional=st.lists(word, max_size=7).map(tuple)
)
stubs = st.builds(
    Stub,
    index=st.builds(Index, addresses, spi),
    spi_i=spi,
    spi_r=spi,
    initiator=st.booleans(),
    local_id=identities,
    remote_id=identities,
    eap_id=st.none() | identities,
    suite=suites,
    sk_d=st.binary(min_size=16, max_size=64),
    shared_secret=st.none() | st.binary(max_size=600),
    local=endpoints,
    remote=endpoints,
    connection=st.text(max_size=30),
    local_vips=st.lists(addresses, max_size=2).map(tuple),
    remote_vips=st.lists(addresses, max_size=2).map(tuple),
    conditions=st.lists(long, max_size=2).map(tuple),
    extensions=st.lists(long, max_size=2).map(tuple),
    peer_addresses=st.lists(endpoints, max_size=3).map(tuple),
    children=st.lists(children, max_size=3).map(tuple),
    established=times,
    rekey_at=maybe_never,
    reauth_at=maybe_never,
    expires=times,
    revision=st.integers(0, 2**53),
    ike_version=octet,
)


@given(stubs)
def test_every_stub_survives_the_encoding(stub: Stub) -> None:
    assert decode(encode(stub)) == stub


@given(stubs)
def test_a_gateways_own_stub_survives_the_encoding(stub: Stub) -> None:
    own = Index(stub.local.address, stub.spi_i if stub.initiator else stub.spi_r)
    stub = msgspec.structs.replace(stub, index=own, peer_addresses=(stub.remote,))
    assert decode(encode(stub)) == stub


@given(st.binary(max_size=400))
def test_arbitrary_octets_raise_nothing_but_stub_error(octets: bytes) -> None:
    for candidate in (octets, b"\x01" + octets):
        with contextlib.suppress(StubError):
            decode(candidate)


@given(stubs, st.data())
def test_damaged_stubs_raise_nothing_but_stub_error(stub: Stub, data: st.DataObject) -> None:
    octets = bytearray(encode(stub))
    octets[data.draw(st.integers(0, len(octets) - 1))] = data.draw(octet)
    del octets[data.draw(st.integers(1, len(octets))) :]
    with contextlib.suppress(StubError):
        decode(bytes(octets))


def test_deeply_nested_octets_are_no_stub() -> None:
    with pytest.raises(StubError):
        decode(b"\x01" + b"\x91" * 100_000)


def test_another_format_version_is_refused_by_its_number() -> None:
    with pytest.raises(StubError, match="format 9"):
        decode(b"\x09" + encode(stub_of())[1:])


def test_a_stub_with_more_fields_than_known_is_refused() -> None:
    plain = encode(stub_of())
    fields = msgspec.msgpack.decode(plain[1:])
    with pytest.raises(StubError):
        decode(plain[:1] + msgspec.msgpack.encode([*fields, 1]))


@pytest.mark.parametrize(
    "change",
    [
        {"spi_i": b"short"},
        {"local": Endpoint("no address", 1)},
        {"remote": Endpoint("192.0.2.1", 70_000)},
        {"remote_vips": ("10.0.0.256",)},
        {"local_id": Identity(300, b"")},
        {"conditions": (2**70,)},
    ],
)
def test_a_stub_that_the_encoding_cannot_hold_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(StubError):
        encode(msgspec.structs.replace(stub_of(), **change))


def test_a_traffic_selector_of_mixed_families_is_refused() -> None:
    stub = stub_of()
    mixed = TrafficSelector(7, 0, 0, 65535, False, "10.0.0.0", "2001:db8::1")
    child = msgspec.structs.replace(stub.children[0], local_ts=(mixed,))
    with pytest.raises(StubError):
        encode(msgspec.structs.replace(stub, children=(child,)))


def test_the_encoding_of_an_ordinary_stub_is_small() -> None:
    assert len(encode(stub_of())) <= 240


def test_a_stub_never_shows_its_keys() -> None:
    stub = msgspec.structs.replace(stub_of(), sk_d=b"SK_D" * 8, shared_secret=b"G_IR" * 8)
    shown = repr(stub) + str(stub) + repr(stub.__rich_repr__()) + f"{[stub]}"
    assert "SK_D" not in shown
    assert "G_IR" not in shown


# indexes


@given(st.builds(Index, addresses, spi))
def test_an_index_is_read_back_from_its_key_and_its_short_form(index: Index) -> None:
    assert Index.parse(index.key) == index
    assert Index.parse(str(index)) == index


def test_the_key_names_gateway_bucket_and_spi() -> None:
    index = Index("192.0.2.1", bytes.fromhex("ab00000000000001"))
    assert index.key == "ike:stub:{192.0.2.1/ab}:ab00000000000001"
    assert index.bucket == "ike:stubs:{192.0.2.1/ab}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "192.0.2.1",
        "192.0.2.1/ab",
        "ike:stub:{192.0.2.1/cd}:ab00000000000001",
        "ike:stub:{gateway/ab}:ab00000000000001",
        "ike:stub:{2001:DB8::1/ab}:ab00000000000001",
        "ike:stubs:{192.0.2.1/ab}",
        "\x1b[2J/ab00000000000001",
    ],
)
def test_other_text_is_no_index(text: str) -> None:
    with pytest.raises(StubError) as caught:
        Index.parse(text)
    assert str(caught.value).isprintable()


@given(st.text(max_size=60))
def test_arbitrary_text_raises_nothing_but_stub_error(text: str) -> None:
    with contextlib.suppress(StubError):
        Index.parse(text)


# for people

DN = x509.Name(
    [x509.NameAttribute(NameOID.COUNTRY_NAME, "CH"), x509.NameAttribute(NameOID.COMMON_NAME, "gw1.example")]
).public_bytes()


@pytest.mark.parametrize(
    ("identity", "text"),
    [
        (Identity(1, ip_address("192.0.2.1").packed), "192.0.2.1"),
        (Identity(5, ip_address("2001:db8::1").packed), "2001:db8::1"),
        (Identity(2, b"gw1.example"), "gw1.example"),
        (Identity(3, b"client@example"), "client@example"),
        (Identity(9, DN), "CN=gw1.example,C=CH"),
        (Identity(11, b"\x01\xff"), "01ff"),
        (Identity(1, b"\x01"), "01"),
        (Identity(9, b"no DER"), "6e6f20444552"),
        (Identity(2, b"\x1b[2Jgw"), "\\x1b[2Jgw"),
    ],
)
def test_an_identity_has_a_form_for_people(identity: Identity, text: str) -> None:
    assert identity.text == text


@given(identities)
def test_the_text_of_an_identity_is_fit_for_a_terminal(identity: Identity) -> None:
    assert identity.text.isprintable()


@pytest.mark.parametrize(
    ("selector", "text"),
    [
        (TrafficSelector(7, 0, 0, 65535, False, "10.1.0.0", "10.1.255.255"), "10.1.0.0/16"),
        (TrafficSelector(7, 0, 0, 65535, True, "10.1.0.7", "10.1.0.7"), "10.1.0.7/32"),
        (TrafficSelector(7, 0, 0, 65535, False, "10.1.0.7", "10.1.0.9"), "10.1.0.7..10.1.0.9"),
        (TrafficSelector(8, 17, 0, 65535, False, "2001:db8::", "2001:db8::ffff"), "2001:db8::/112[17]"),
        (TrafficSelector(7, 6, 443, 443, False, "10.1.0.0", "10.1.255.255"), "10.1.0.0/16[6/443]"),
        (TrafficSelector(7, 0, 1024, 2048, False, "10.1.0.0", "10.1.255.255"), "10.1.0.0/16[any/1024-2048]"),
        (TrafficSelector(7, 0, 65535, 0, False, "10.1.0.9", "10.1.0.7"), "10.1.0.9..10.1.0.7[any/65535-0]"),
    ],
)
def test_a_traffic_selector_has_a_form_for_people(selector: TrafficSelector, text: str) -> None:
    assert selector.text == text


def test_a_child_sa_names_its_algorithms() -> None:
    assert stub_of().children[0].algorithms.startswith("AES_CBC_128/HMAC_SHA2_256_128")
