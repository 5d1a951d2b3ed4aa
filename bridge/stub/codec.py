"""The encoding of a stub: one octet of format version, then one MessagePack array.

Format 2 is format 1 with a map of extensions at the end of the array. A stub without extensions is written in format 1,
which gateways of release 0.1 read.

Redis holds one for every client, so it is made small: addresses are octets, what repeats another field is left out,
times are differences.

What many stubs have in common is worked out once: algorithms, addresses of gateways, the networks behind them.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from functools import lru_cache
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from bridge.ike.address import address_text, packed
from bridge.ike.transforms import Suite
from bridge.stub import derivation
from bridge.stub.derivation import Derivation
from bridge.stub.stub import Index, Stub, StubError
from bridge.stub.types import ChildSa, Endpoint, Identity, TrafficSelector

FORMAT = 1
"""Version of the encoding without extensions, the only one that release 0.1 reads."""
FORMAT_EXTENDED = 2
"""Version of the encoding whose array ends with a map of extensions. A reader refuses any other version."""


class Extension(IntEnum):
    """Numbers of extensions. A reader ignores an unknown one below `CRITICAL` and refuses a stub with any other."""

    AUTHENTICATED_UNTIL = 1
    """integer, Unix seconds"""
    PREDECESSOR = 2
    """octets: SPI and address, as the index"""
    TAKEOVER = 3
    """octets: where the keys come from, message IDs, owner and epoch (bridge.stub.derivation)"""
    SESSION = 4
    """8 octets: the first SPI of the session at its gateway"""


CRITICAL = 128
"""from this number on an extension has to be known to its reader; none is defined yet, so a stub with one is refused"""

_Spis = Annotated[bytes, Meta(min_length=16, max_length=16)]
_ChildSpis = Annotated[bytes, Meta(min_length=8, max_length=8)]
_IdOctets = Annotated[bytes, Meta(min_length=1)]


class _WireChild(Struct, array_like=True, forbid_unknown_fields=True, gc=False):
    name: str
    initiator: bool
    mode: int
    ipcomp: int
    encr: int
    encr_len: int
    integ: int
    esn: int
    groups: tuple[int, ...]
    spis: _ChildSpis
    local_ts: bytes
    remote_ts: bytes


class _WireStub(Struct, array_like=True, forbid_unknown_fields=True, gc=False):
    index: bytes | None
    """SPI and address; none where they are the maker's own, as on a gateway"""
    spis: _Spis
    initiator: bool
    local_id: _IdOctets
    remote_id: _IdOctets
    eap_id: _IdOctets | None
    suite: Annotated[tuple[int, ...], Meta(min_length=5)]
    sk_d: bytes
    shared_secret: bytes | None
    local: bytes
    remote: bytes
    connection: str
    local_vips: tuple[bytes, ...]
    remote_vips: tuple[bytes, ...]
    conditions: tuple[int, ...]
    extensions: tuple[int, ...]
    peer_addresses: tuple[bytes, ...] | None
    """none: the remote endpoint alone"""
    children: tuple[_WireChild, ...]
    established: int
    rekey_after: int | None
    reauth_after: int | None
    expires_after: int
    revision: int
    """as the difference to `established` in milliseconds, which is small where revisions are a time"""
    ike_version: int


class _ExtendedWireStub(_WireStub, array_like=True, forbid_unknown_fields=True, gc=False):
    more: dict[int, int | bytes]
    """extensions by their number"""


SHARED = 256
"""values kept of each kind that many stubs have in common"""

_CHILD_SPIS = struct.Struct(">II")

_encoder = msgspec.msgpack.Encoder()
_decoders: dict[int, msgspec.msgpack.Decoder[_WireStub] | msgspec.msgpack.Decoder[_ExtendedWireStub]] = {
    FORMAT: msgspec.msgpack.Decoder(_WireStub),
    FORMAT_EXTENDED: msgspec.msgpack.Decoder(_ExtendedWireStub),
}


def encode(stub: Stub) -> bytes:
    """The stub as octets, its secrets in the clear: for `bridge.stub.keyring` only.

    Raises StubError where a field holds what the encoding cannot.
    """
    indexes = (stub.index,) if stub.predecessor is None else (stub.index, stub.predecessor)
    if len(stub.spi_i) != 8 or len(stub.spi_r) != 8 or any(len(index.spi) != 8 for index in indexes):
        raise StubError(f"stub {stub.index}: an IKE SPI has 8 octets")
    try:
        wire = _to_wire(stub)
        more = _extensions(stub)
        if not more:
            return bytes((FORMAT,)) + _encoder.encode(wire)
        extended = _ExtendedWireStub(**msgspec.structs.asdict(wire), more=more)
        return bytes((FORMAT_EXTENDED,)) + _encoder.encode(extended)
    except (ValueError, TypeError, OverflowError, OSError, struct.error) as error:
        raise StubError(f"stub {stub.index} cannot be encoded: {error}") from None


def decode(octets: bytes) -> Stub:
    """The stub that `encode` turned into `octets`. Raises StubError, and nothing else, on any other octets."""
    decoder = _decoders.get(octets[0]) if octets else None
    if decoder is None:
        found = f"format {octets[0]}" if octets else "no octets"
        raise StubError(f"not a stub of format {FORMAT} or {FORMAT_EXTENDED}: {found}")
    try:
        wire = decoder.decode(memoryview(octets)[1:])
        return _from_wire(wire, wire.more if isinstance(wire, _ExtendedWireStub) else {})
    except (ValueError, msgspec.MsgspecError, RecursionError, struct.error) as error:
        # the text of struct.error and msgspec's errors names places and types, never values
        raise StubError(f"not a stub: {error}") from None


def _extensions(stub: Stub) -> dict[int, int | bytes]:
    more: dict[int, int | bytes] = {}
    if stub.authenticated_until:
        more[Extension.AUTHENTICATED_UNTIL] = stub.authenticated_until
    if stub.predecessor is not None:
        more[Extension.PREDECESSOR] = pack_index(stub.predecessor)
    if stub.session_spi:
        more[Extension.SESSION] = stub.session_spi
    if stub.derivation is not None:
        more[Extension.TAKEOVER] = derivation.pack(stub.derivation)
    return more


def _authenticated_until(more: dict[int, int | bytes]) -> int:
    until = more.get(Extension.AUTHENTICATED_UNTIL, 0)
    if not isinstance(until, int) or until < 0:
        raise ValueError("the end of an authentication is Unix seconds")
    return until


def _predecessor(more: dict[int, int | bytes]) -> Index | None:
    octets = more.get(Extension.PREDECESSOR)
    if octets is None:
        return None
    if isinstance(octets, int):
        raise ValueError("a predecessor is an index in octets")
    return unpack_index(octets)


def _session_spi(more: dict[int, int | bytes]) -> bytes:
    spi = more.get(Extension.SESSION, b"")
    if not isinstance(spi, bytes) or len(spi) not in (0, 8):
        raise ValueError("an IKE SPI has 8 octets")
    return spi


def _derivation(more: dict[int, int | bytes]) -> Derivation | None:
    octets = more.get(Extension.TAKEOVER)
    if octets is None:
        return None
    if isinstance(octets, int):
        raise ValueError("a derivation is octets")
    return derivation.unpack(octets)


def _to_wire(stub: Stub) -> _WireStub:
    suite = stub.suite
    made_by_gateway = stub.index == (stub.local.address, stub.spi_i if stub.initiator else stub.spi_r)
    return _WireStub(
        None if made_by_gateway else pack_index(stub.index),
        stub.spi_i + stub.spi_r,
        stub.initiator,
        _pack_identity(stub.local_id),
        _pack_identity(stub.remote_id),
        None if stub.eap_id is None else _pack_identity(stub.eap_id),
        (suite.encr, suite.encr_len, suite.integ, suite.prf, suite.group, *suite.additional),
        stub.sk_d,
        stub.shared_secret,
        _pack_endpoint(stub.local),
        _pack_endpoint(stub.remote),
        stub.connection,
        tuple([packed(vip) for vip in stub.local_vips]),
        tuple([packed(vip) for vip in stub.remote_vips]),
        stub.conditions,
        stub.extensions,
        None
        if stub.peer_addresses == (stub.remote,)
        else tuple([_pack_endpoint(peer) for peer in stub.peer_addresses]),
        tuple([_child_to_wire(child) for child in stub.children]),
        stub.established,
        stub.rekey_at - stub.established if stub.rekey_at else None,
        stub.reauth_at - stub.established if stub.reauth_at else None,
        stub.expires - stub.established,
        stub.revision - stub.established * 1000,
        stub.ike_version,
    )


def _from_wire(wire: _WireStub, more: dict[int, int | bytes]) -> Stub:
    if more and max(more) >= CRITICAL:
        raise ValueError("it has an extension that has to be understood and is not known")
    spi_i, spi_r = wire.spis[:8], wire.spis[8:]
    local, remote = _shared_endpoint(wire.local), _unpack_endpoint(wire.remote)
    own = Index(local.address, spi_i if wire.initiator else spi_r)
    established = wire.established
    return Stub(
        own if wire.index is None else unpack_index(wire.index),
        spi_i,
        spi_r,
        wire.initiator,
        _shared_identity(wire.local_id),
        Identity(wire.remote_id[0], wire.remote_id[1:]),
        None if wire.eap_id is None else Identity(wire.eap_id[0], wire.eap_id[1:]),
        _shared_suite(wire.suite),
        wire.sk_d,
        wire.shared_secret,
        local,
        remote,
        wire.connection,
        tuple([address_text(vip) for vip in wire.local_vips]),
        tuple([address_text(vip) for vip in wire.remote_vips]),
        wire.conditions,
        wire.extensions,
        (remote,) if wire.peer_addresses is None else tuple([_unpack_endpoint(peer) for peer in wire.peer_addresses]),
        tuple([_child_from_wire(child) for child in wire.children]),
        established,
        0 if wire.rekey_after is None else established + wire.rekey_after,
        0 if wire.reauth_after is None else established + wire.reauth_after,
        established + wire.expires_after,
        established * 1000 + wire.revision,
        wire.ike_version,
        _authenticated_until(more),
        _predecessor(more),
        _session_spi(more),
        _derivation(more),
    )


def _child_to_wire(child: ChildSa) -> _WireChild:
    return _WireChild(
        child.name,
        child.initiator,
        child.mode,
        child.ipcomp,
        child.encr,
        child.encr_len,
        child.integ,
        child.esn,
        child.groups,
        _CHILD_SPIS.pack(child.spi_in, child.spi_out),
        _pack_selectors(child.local_ts),
        _pack_selectors(child.remote_ts),
    )


def _child_from_wire(wire: _WireChild) -> ChildSa:
    spi_in, spi_out = _CHILD_SPIS.unpack(wire.spis)
    return ChildSa(
        wire.name,
        wire.mode,
        wire.ipcomp,
        wire.encr,
        wire.encr_len,
        wire.integ,
        wire.esn,
        wire.groups,
        spi_in,
        spi_out,
        _unpack_selectors(wire.local_ts),
        _unpack_selectors(wire.remote_ts),
        wire.initiator,
    )


@lru_cache(maxsize=SHARED)
def _shared_suite(numbers: tuple[int, ...]) -> Suite:
    encr, encr_len, integ, prf, group, *additional = numbers
    return Suite(encr, encr_len, integ, prf, group, tuple(additional))


@lru_cache(maxsize=SHARED)
def _shared_identity(octets: bytes) -> Identity:
    return Identity(octets[0], octets[1:])


def pack_index(index: Index) -> bytes:
    """SPI and address, 12 or 24 octets."""
    return index.spi + packed(index.gateway)


def unpack_index(octets: bytes) -> Index:
    """What `pack_index` packed. Raises ValueError."""
    return Index(address_text(octets[8:]), octets[:8])


def _pack_identity(identity: Identity) -> bytes:
    return bytes((identity.type,)) + identity.data


def _pack_endpoint(endpoint: Endpoint) -> bytes:
    return packed(endpoint.address) + endpoint.port.to_bytes(2, "big")


def _unpack_endpoint(octets: bytes) -> Endpoint:
    return Endpoint(address_text(octets[:-2]), int.from_bytes(octets[-2:], "big"))


_shared_endpoint = lru_cache(maxsize=SHARED)(_unpack_endpoint)


# A selector: an octet of these flags, the first address, the last if another, protocol and ports if any.
_IPV6, _DYNAMIC, _NARROW, _RANGE = 1, 2, 4, 8
_NARROWING = struct.Struct(">BHH")
_ANY_PORT = (0, 0, 0xFFFF)
_TYPE_IPV4, _TYPE_IPV6 = 7, 8


def _pack_selectors(selectors: tuple[TrafficSelector, ...]) -> bytes:
    return b"".join([_pack_selector(s) if s.dynamic else _pack_network(s) for s in selectors])


def _pack_selector(selector: TrafficSelector) -> bytes:
    first = packed(selector.first)
    last = first if selector.last == selector.first else packed(selector.last)
    ipv6 = selector.type == _TYPE_IPV6
    if not (ipv6 or selector.type == _TYPE_IPV4) or not len(first) == len(last) == (16 if ipv6 else 4):
        raise ValueError("a traffic selector has type 7 and IPv4 addresses or type 8 and IPv6 addresses")
    narrowing = (selector.protocol, selector.from_port, selector.to_port)
    flags = (_IPV6 if ipv6 else 0) | (_DYNAMIC if selector.dynamic else 0)
    octets = first
    if first != last:
        flags |= _RANGE
        octets += last
    if narrowing != _ANY_PORT:
        flags |= _NARROW
        octets += _NARROWING.pack(*narrowing)
    return bytes((flags,)) + octets


_pack_network = lru_cache(maxsize=SHARED)(_pack_selector)


def _unpack_selectors(octets: bytes) -> tuple[TrafficSelector, ...]:
    # a client's virtual IP is its own; networks recur
    return _parse_selectors(octets) if octets and octets[0] & _DYNAMIC else _shared_selectors(octets)


def _parse_selectors(octets: bytes) -> tuple[TrafficSelector, ...]:
    selectors = []
    offset = 0
    while offset < len(octets):
        flags = octets[offset]
        size = 16 if flags & _IPV6 else 4
        first = last = address_text(octets[offset + 1 : offset + 1 + size])
        offset += 1 + size
        if flags & _RANGE:
            last = address_text(octets[offset : offset + size])
            offset += size
        narrowing = _ANY_PORT
        if flags & _NARROW:
            narrowing = _NARROWING.unpack_from(octets, offset)
            offset += _NARROWING.size
        kind = _TYPE_IPV6 if flags & _IPV6 else _TYPE_IPV4
        selectors.append(TrafficSelector(kind, *narrowing, bool(flags & _DYNAMIC), first, last))
    return tuple(selectors)


_shared_selectors = lru_cache(maxsize=SHARED)(_parse_selectors)
