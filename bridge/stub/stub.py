"""A stub: what another gateway needs to continue an IKE_SA (draft-xu-ike-sa-sync-01 section 3.2).

"Local" is always the host that made the stub. Addresses are canonical text, times whole Unix seconds.
"""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import Any, NamedTuple

from msgspec import Struct

from bridge.ike.transforms import Suite
from bridge.stub import bank_keys
from bridge.stub.derivation import Derivation
from bridge.stub.types import ChildSa, Endpoint, Identity, printable


class StubError(ValueError):
    """Octets that are no stub, text that is no index, or a stub that the encoding cannot hold."""


class Index(NamedTuple):
    """What names a stub: the gateway's address, and the gateway's own SPI (8 octets) of the IKE_SA."""

    gateway: str
    spi: bytes

    @property
    def tag(self) -> str:
        """`<gateway>/<first SPI octet>`: what keeps a stub and its bucket on one Cluster node."""
        return bank_keys.tag(self.gateway, self.spi[:1].hex())

    @property
    def key(self) -> str:
        """The stub's key in Redis."""
        return bank_keys.stub_key(self.gateway, self.spi)

    @property
    def bucket(self) -> str:
        """The key of the sorted set, by expiry, that lists the stub."""
        return bank_keys.bucket_key(self.gateway, self.spi[:1].hex())

    @property
    def gone(self) -> str:
        """The key of the sorted set, by expiry, of the bucket's sessions that have ended."""
        return bank_keys.gone_key(self.gateway, self.spi[:1].hex())

    @property
    def moved(self) -> str:
        """The key of the mark that says as which IKE_SA of another gateway the session went on."""
        return bank_keys.moved_key(self.gateway, self.spi)

    def __str__(self) -> str:
        return f"{self.gateway}/{self.spi.hex()}"

    @classmethod
    def parse(cls, text: str) -> Index:
        """The index that a key names, or its short form `<gateway>/<SPI hex>`, as `str` gives it.

        Raises StubError.
        """
        if (named := bank_keys.read_stub_key(text)) is not None:
            return cls(*named)
        match = _SHORT.fullmatch(text)
        if match is None:
            raise StubError(f"{printable(text)!r} is no stub index: ADDRESS/SPI, the SPI as 16 hex digits")
        try:
            return cls(str(ip_address(match["gateway"])), bytes.fromhex(match["spi"]))
        except ValueError:
            raise StubError(f"{printable(match['gateway'])!r} is not an IP address") from None


_SHORT = re.compile(r"(?P<gateway>[^{}/]+)/(?P<spi>[0-9A-Fa-f]{16})")


class Stub(Struct, frozen=True, gc=False):
    """One IKE_SA, in the fields of draft-xu-ike-sa-sync-01 section 3.2 and those of docs/protocol.md."""

    index: Index
    spi_i: bytes
    spi_r: bytes
    initiator: bool
    """whether the host that made the stub initiated the IKE_SA"""
    local_id: Identity
    remote_id: Identity
    eap_id: Identity | None
    suite: Suite
    sk_d: bytes
    shared_secret: bytes | None
    local: Endpoint
    remote: Endpoint
    connection: str
    local_vips: tuple[str, ...]
    remote_vips: tuple[str, ...]
    conditions: tuple[int, ...]
    extensions: tuple[int, ...]
    peer_addresses: tuple[Endpoint, ...]
    children: tuple[ChildSa, ...]
    established: int
    rekey_at: int
    """0: never"""
    reauth_at: int
    """0: never"""
    expires: int
    revision: int
    """grows with every change; the bank keeps the greatest"""
    ike_version: int = 2
    authenticated_until: int = 0
    """when the peer's authentication ends, whatever resumed or rekeyed the session since; 0: never"""
    predecessor: Index | None = None
    """the stub of the session that this one was resumed from"""
    session_spi: bytes = b""
    """the SPI, at the host that made the stub, of the IKE_SA that the session began with there, where it was rekeyed
    since and the gateway has a program for its sessions; else none"""
    derivation: Derivation | None = None
    """what another gateway takes it over with, where gateways share the address"""

    def __repr__(self) -> str:
        return f"Stub({self.index}, revision={self.revision}, connection={self.connection!r})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        # msgspec's own would show the keys
        return [("index", str(self.index)), ("revision", self.revision), ("connection", self.connection)]
