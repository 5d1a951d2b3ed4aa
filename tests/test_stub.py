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
from bridge.stub.derivation import Derivation
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
derivations = st.builds(
    Derivation,
    nonce_i=st.binary(min_size=16, max_size=64),
    nonce_r=st.binary(min_size=16, max_size=64),
    secret=st.binary(max_size=300),
    additional=st.binary(max_size=40),
    sk_d_old=st.binary(max_size=64),
    prf_old=word,
    next_request=long,
    next_expected=long,
    owner=addresses,
    epoch=st.integers(0, 2**31 - 1),
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
    authenticated_until=maybe_never,
    predecessor=st.none() | st.builds(Index, addresses, spi),
    derivation=st.none() | derivations,
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
    for candidate in (octets, b"\x01" + octets, b"\x02" + octets):
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


@pytest.mark.parametrize("until", [0, 1_700_028_800])
def test_a_stub_with_more_fields_than_known_is_refused(until: int) -> None:
    plain = encode(msgspec.structs.replace(stub_of(), authenticated_until=until))
    fields = msgspec.msgpack.decode(plain[1:])
    with pytest.raises(StubError):
        decode(plain[:1] + msgspec.msgpack.encode([*fields, 1]))


# extensions, and the formats of other releases

NETWORK = TrafficSelector(7, 0, 0, 65535, False, "10.10.0.0", "10.10.255.255")
VIRTUAL_IP = TrafficSelector(7, 0, 0, 65535, True, "10.20.0.7", "10.20.0.7")
NARROW_IPV6 = TrafficSelector(8, 17, 500, 500, False, "2001:db8::1", "2001:db8::1")
CHILD = ChildSa("net", 2, 0, 12, 128, 12, 0, (31,), 0xC0010203, 0xC0040506, (NETWORK,), (VIRTUAL_IP,), False)
OF_GATEWAY = Stub(
    index=Index("192.0.2.1", b"R" * 8),
    spi_i=b"I" * 8,
    spi_r=b"R" * 8,
    initiator=False,
    local_id=Identity(2, b"gw1.example"),
    remote_id=Identity(3, b"client@example"),
    eap_id=Identity(3, b"alice"),
    suite=Suite(encr=12, encr_len=128, integ=12, prf=5, group=31),
    sk_d=b"d" * 32,
    shared_secret=b"g" * 32,
    local=Endpoint("192.0.2.1", 4500),
    remote=Endpoint("198.51.100.7", 4500),
    connection="home",
    local_vips=(),
    remote_vips=("10.20.0.7",),
    conditions=(0x41,),
    extensions=(0x1FF,),
    peer_addresses=(Endpoint("198.51.100.7", 4500),),
    children=(CHILD,),
    established=1_700_000_000,
    rekey_at=1_700_014_400,
    reauth_at=0,
    expires=1_700_015_840,
    revision=1_700_000_000_123,
)
OF_CLIENT = Stub(
    index=Index("2001:db8::2", b"R" * 8),
    spi_i=b"I" * 8,
    spi_r=b"R" * 8,
    initiator=True,
    local_id=Identity(3, b"client@example"),
    remote_id=Identity(2, b"gw1.example"),
    eap_id=None,
    suite=Suite(encr=20, encr_len=256, integ=0, prf=7, group=20, additional=(36,)),
    sk_d=b"d" * 64,
    shared_secret=None,
    local=Endpoint("2001:db8::7", 500),
    remote=Endpoint("2001:db8::2", 500),
    connection="home",
    local_vips=("10.20.0.7", "fd00::7"),
    remote_vips=(),
    conditions=(0x41, 1 << 31),
    extensions=(0x1FF, 1 << 31),
    peer_addresses=(),
    children=(
        ChildSa("net", 2, 0, 20, 256, 0, 0, (), 0xC0010203, 0xC0040506, (VIRTUAL_IP, NARROW_IPV6), (NETWORK,), True),
    ),
    established=1_700_000_000,
    rekey_at=0,
    reauth_at=1_700_010_000,
    expires=1_700_015_840,
    revision=7,
)
RECORDED_0_1 = {
    "a gateway's": (
        OF_GATEWAY,
        "01dc0018c0c41049494949494949495252525252525252c2c40c026777312e6578616d706c65c40f03636c69656e74406578616d706c65"
        "c40603616c696365950ccc800c051fc4206464646464646464646464646464646464646464646464646464646464646464c42067676767"
        "67676767676767676767676767676767676767676767676767676767c406c00002011194c406c63364071194a4686f6d659091c4040a14"
        "0007914191cd01ffc0919ca36e6574c202000ccc800c00911fc408c0010203c0040506c409080a0a00000a0affffc405020a140007ce65"
        "53f100cd3840c0cd3de07b02",
    ),
    "a client's": (
        OF_CLIENT,
        "01dc0018c418525252525252525220010db8000000000000000000000002c41049494949494949495252525252525252c3c40f03636c69"
        "656e74406578616d706c65c40c026777312e6578616d706c65c09614cd010000071424c440646464646464646464646464646464646464"
        "64646464646464646464646464646464646464646464646464646464646464646464646464646464646464646464c0c41220010db80000"
        "0000000000000000000701f4c41220010db800000000000000000000000201f4a4686f6d6592c4040a140007c410fd0000000000000000"
        "00000000000007909241ce8000000092cd01ffce8000000090919ca36e6574c3020014cd0100000090c408c0010203c0040506c41b020a"
        "1400070520010db80000000000000000000000011101f401f4c409080a0a00000a0affffce6553f100c0cd2710cd3de0d3fffffe74301a"
        "980702",
    ),
}
"""what release 0.1 wrote"""


@pytest.mark.parametrize("whose", RECORDED_0_1)
def test_stubs_that_release_0_1_wrote_are_read(whose: str) -> None:
    stub, octets = RECORDED_0_1[whose]
    assert decode(bytes.fromhex(octets)) == stub


@pytest.mark.parametrize("whose", RECORDED_0_1)
def test_a_stub_without_extensions_is_written_as_release_0_1_reads_it(whose: str) -> None:
    stub, octets = RECORDED_0_1[whose]
    assert encode(stub).hex() == octets


def test_a_stub_with_an_extension_is_of_format_2_which_release_0_1_refuses() -> None:
    octets = encode(msgspec.structs.replace(OF_GATEWAY, authenticated_until=1_700_028_800))
    assert octets[0] == 2
    assert len(octets) == len(encode(OF_GATEWAY)) + 7


def extended(more: object) -> bytes:
    """A stub of format 2 with these extensions."""
    fields = msgspec.msgpack.decode(encode(OF_GATEWAY)[1:])
    return b"\x02" + msgspec.msgpack.encode([*fields, more])


DERIVATION = Derivation(b"i" * 32, b"r" * 32, b"s" * 32, b"", b"d" * 32, 5, 4, 7, "192.0.2.1", 2)


def test_where_the_keys_of_a_session_at_a_shared_address_come_from_is_extension_3() -> None:
    octets = encode(msgspec.structs.replace(OF_GATEWAY, derivation=DERIVATION))
    *_, more = msgspec.msgpack.decode(octets[1:], strict=False)
    fields = [b"i" * 32, b"r" * 32, b"s" * 32, b"", b"d" * 32, 5, 4, 7, "192.0.2.1", 2, False]
    assert (octets[0], more) == (2, {3: msgspec.msgpack.encode(fields)})
    assert decode(octets).derivation == DERIVATION


def test_a_derivation_shows_no_key() -> None:
    assert repr(DERIVATION) == "Derivation(owner='192.0.2.1', epoch=2)"


@pytest.mark.parametrize(
    "fields",
    [
        [b"i" * 15, b"r" * 32, b"", b"", b"", 0, 0, 0, "", 1],
        [b"i" * 32, b"r" * 257, b"", b"", b"", 0, 0, 0, "", 1],
        [b"i" * 32, b"r" * 32, b"", b"", b"", 0, -1, 0, "", 1],
        [b"i" * 32, b"r" * 32, b"", b"", b"", 0, 0, 2**32, "", 1],
        [b"i" * 32, b"r" * 32, b"", b"", b"", 0, 0, 0, "vpn\n", 1],
        [b"i" * 32, b"r" * 32, b"", b"", b"", 0, 0, 0, "192.0.2.1", 2**31],
        [b"i" * 32, b"r" * 32, b"", b"", b"", 0, 0, 0, "", 1, "more"],
    ],
)
def test_a_malformed_extension_3_is_refused(fields: list[object]) -> None:
    with pytest.raises(StubError):
        decode(extended({3: msgspec.msgpack.encode(fields)}))


def test_an_extension_that_is_not_known_is_ignored() -> None:
    assert decode(extended({126: b"later", 127: 1})) == OF_GATEWAY


def test_a_stub_with_an_extension_that_must_be_known_and_is_not_is_refused() -> None:
    with pytest.raises(StubError, match="extension"):
        decode(extended({1: 1_700_028_800, 128: 1}))


@pytest.mark.parametrize(
    "more",
    [
        {1: b"octets"},
        {1: -1},
        {2: 5},
        {2: b"short"},
        {2: b"P" * 8 + b"\x01\x02\x03"},
        {3: [1]},
        {3: 5},
        {3: b"reserved"},
        {"1": 1},
        [],
        None,
    ],
)
def test_a_stub_with_a_malformed_extension_is_refused(more: object) -> None:
    with pytest.raises(StubError):
        decode(extended(more))


def test_format_2_without_its_map_is_refused() -> None:
    with pytest.raises(StubError):
        decode(b"\x02" + encode(OF_GATEWAY)[1:])


@pytest.mark.parametrize(
    "change",
    [
        {"spi_i": b"short"},
        {"predecessor": Index("192.0.2.1", b"short")},
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


def test_the_encoding_of_a_common_stub_is_small() -> None:
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
