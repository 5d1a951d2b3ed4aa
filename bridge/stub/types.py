"""The parts of a stub: endpoints, identities, traffic selectors, CHILD_SAs."""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache
from ipaddress import ip_address, summarize_address_range

from cryptography import x509
from msgspec import Struct

from bridge.ike.transforms import child_name


class IdType(IntEnum):
    """Identification types (RFC 7296 section 3.5) that strongSwan has a text for."""

    ID_ANY = 0
    """no type of the RFC: strongSwan's own, for an identity that is not known"""
    ID_IPV4_ADDR = 1
    ID_FQDN = 2
    ID_RFC822_ADDR = 3
    ID_IPV6_ADDR = 5
    ID_DER_ASN1_DN = 9
    ID_KEY_ID = 11


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
    """`text` with every character that is not printable escaped: safe for a terminal, whatever its origin."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Endpoint(Struct, frozen=True, gc=False):
    """An IP address and a UDP port."""

    address: str
    port: int


class TrafficSelector(Struct, frozen=True, gc=False):
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


class ChildSa(Struct, frozen=True, gc=False):
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
    local_ts: tuple[TrafficSelector, ...]
    remote_ts: tuple[TrafficSelector, ...]
    initiator: bool

    @property
    def algorithms(self) -> str:
        """Its algorithms in strongSwan's notation."""
        return child_name(self.encr, self.encr_len, self.integ, self.esn)
