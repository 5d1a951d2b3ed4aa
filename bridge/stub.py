"""A stub: what another gateway needs to continue an IKE_SA (draft-xu-ike-sa-sync-01 section 3.2).

"Local" is always the host that made the stub. Addresses are canonical text, times whole Unix seconds.
"""

from __future__ import annotations

import re
from enum import IntEnum
from functools import lru_cache
from ipaddress import ip_address, summarize_address_range
from typing import Any, NamedTuple

from cryptography import x509
from msgspec import Struct

from bridge.ike.transforms import Suite, child_name


class StubError(ValueError):
    """Octets that are no stub, text that is no index, or a stub that the encoding cannot hold."""


class Index(NamedTuple):
    """What names a stub: the gateway's address, and the gateway's own SPI (8 octets) of the IKE_SA."""

    gateway: str
    spi: bytes

    @property
    def tag(self) -> str:
        """`<gateway>/<first SPI octet>`: what keeps a stub and its bucket on one Cluster node."""
        return f"{self.gateway}/{self.spi[:1].hex()}"

    @property
    def key(self) -> str:
        """The stub's key in Redis."""
        return f"ike:stub:{{{self.tag}}}:{self.spi.hex()}"

    @property
    def bucket(self) -> str:
        """The key of the sorted set, by expiry, that lists the stub."""
        return f"ike:stubs:{{{self.tag}}}"

    @property
    def gone(self) -> str:
        """The key of the sorted set, by expiry, of the bucket's sessions that have ended."""
        return f"ike:gone:{{{self.tag}}}"

    def __str__(self) -> str:
        return f"{self.gateway}/{self.spi.hex()}"

    @classmethod
    def parse(cls, text: str) -> Index:
        """The index that a key names, or its short form `<gateway>/<SPI hex>`, as `str` gives it.

        Raises StubError.
        """
        match = _KEY.fullmatch(text) or _SHORT.fullmatch(text)
        if match is None:
            raise StubError(f"{printable(text)!r} is no stub index: ADDRESS/SPI, the SPI as 16 hex digits")
        try:
            index = cls(str(ip_address(match["gateway"])), bytes.fromhex(match["spi"]))
        except ValueError:
            raise StubError(f"{printable(match['gateway'])!r} is not an IP address") from None
        if text.startswith("ike:") and index.key != text:
            raise StubError(f"{printable(text)!r} is not in the form of a stub's key")
        return index


_KEY = re.compile(r"ike:stub:\{(?P<gateway>[^{}/]+)/[0-9a-f]{2}\}:(?P<spi>[0-9a-f]{16})")
_SHORT = re.compile(r"(?P<gateway>[^{}/]+)/(?P<spi>[0-9A-Fa-f]{16})")


class IdType(IntEnum):
    """Identification types (RFC 7296 section 3.5) that have a form for people."""

    ID_IPV4_ADDR = 1
    ID_FQDN = 2
    ID_RFC822_ADDR = 3
    ID_IPV6_ADDR = 5
    ID_DER_ASN1_DN = 9


class Identity(Struct, frozen=True, gc=False):
    """An identity as RFC 7296 section 3.5 has it: `type` (IANA) and the octets."""

    type: int
    data: bytes

    @property
    def text(self) -> str:
        """For people: a name, an address, a distinguished name (RFC 4514), or hex; no control characters."""
        return _identity_text(self.type, self.data)


@lru_cache(maxsize=4096)
def _identity_text(kind: int, data: bytes) -> str:
    try:
        match kind:
            case IdType.ID_FQDN | IdType.ID_RFC822_ADDR:
                return printable(data.decode(errors="backslashreplace"))
            case IdType.ID_IPV4_ADDR | IdType.ID_IPV6_ADDR:
                return str(ip_address(data))
            case IdType.ID_DER_ASN1_DN:
                return printable(x509.Name.from_bytes(data).rfc4514_string())
    except ValueError:
        pass
    return data.hex()


def printable(text: str) -> str:
    """`text` with every character that is not printable escaped: fit for a terminal, whoever wrote it."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Endpoint(Struct, frozen=True, gc=False):
    """An IP address and a UDP port."""

    address: str
    port: int


class Selector(Struct, frozen=True, gc=False):
    """A traffic selector (RFC 7296 section 3.13.1): `type` is 7 (IPv4 range) or 8 (IPv6 range).

    Ranges include their ends. `dynamic`: charon narrows it to a host's address or virtual IP.
    """

    type: int
    protocol: int
    from_port: int
    to_port: int
    dynamic: bool
    first: str
    last: str

    @property
    def text(self) -> str:
        """As `swanctl --list-sas` has it: `10.1.0.0/16`, or a range, `[protocol/ports]` behind it if not all."""
        first, last = ip_address(self.first), ip_address(self.last)
        try:
            networks = list(summarize_address_range(first, last))
        except (ValueError, TypeError):
            networks = []
        text = str(networks[0]) if len(networks) == 1 else f"{first}..{last}"
        if (self.protocol, self.from_port, self.to_port) == (0, 0, 0xFFFF):
            return text
        ports = str(self.from_port) if self.from_port == self.to_port else f"{self.from_port}-{self.to_port}"
        return f"{text}[{self.protocol or 'any'}{'' if (self.from_port, self.to_port) == (0, 0xFFFF) else f'/{ports}'}]"


class Child(Struct, frozen=True, gc=False):
    """A CHILD_SA. `name` is its swanctl child.

    Algorithms are IANA transform ids, `encr_len` is in bits, 0 where absent. `groups`: the key exchange methods
    of its PFS policy, none without PFS. SPIs are host integers.
    """

    name: str
    mode: int
    ipcomp: int
    encr: int
    encr_len: int
    integ: int
    esn: int
    groups: tuple[int, ...]
    spi_in: int
    spi_out: int
    local_ts: tuple[Selector, ...]
    remote_ts: tuple[Selector, ...]
    initiator: bool

    @property
    def algorithms(self) -> str:
        """Its algorithms in strongSwan's notation."""
        return child_name(self.encr, self.encr_len, self.integ, self.esn)


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
    children: tuple[Child, ...]
    established: int
    rekey_at: int
    """0: never"""
    reauth_at: int
    """0: never"""
    expires: int
    revision: int
    """grows with every change; the bank keeps the greatest"""
    ike_version: int = 2

    def __repr__(self) -> str:
        return f"Stub({self.index}, revision={self.revision}, connection={self.connection!r})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("index", str(self.index)), ("revision", self.revision), ("connection", self.connection)]
