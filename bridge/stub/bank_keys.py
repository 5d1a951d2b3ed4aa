"""The name of every key in the bank, and how names are read back.

| key | what it holds |
|---|---|
| `ike:stub:{<gateway>/<first octet>}:<SPI>` | a stub: a hash |
| `ike:stubs:{<gateway>/<first octet>}` | a bucket: the SPIs of its stubs, by expiry |
| `ike:gone:{<gateway>/<first octet>}` | the SPIs of the bucket's ended sessions, by when they may be forgotten |
| `ike:moved:{<gateway>/<first octet>}:<SPI>` | a mark: the session went on at another gateway; sealed |
| `ike:addresses:{<network>}` | which stubs have a virtual IP of that IPv4 /26 or IPv6 /122: a sorted set |
| `ike:gateways` | the addresses of gateways, by the time of their last heartbeat |
| `ike:gateway:<gateway>` | a heartbeat |
| `ike:<kind>:<gateway>` | what a gateway posts: see the kinds below |
| `ike:takeover:<address>` | which gateway takes the sessions at a shared address over |
| `ike:{revoked}` | the sealed marks of locked-out identities, by expiry |
| `ike:{revoked}:stamp` | random, another one after every change of them; on the same node of a Cluster |
| `ike:check:<token>` | `ike-sa-sync check` tries whether events are received |

A gateway is named by its IP address in canonical text, an SPI by 16 hex digits in small letters. The braces are Redis
Cluster's hash tag: a stub, its bucket and the bucket's ended sessions are on one node. Anyone with write access to the
bank can make keys and members of any form, so every reader gives None for a name that no gateway would write.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from ipaddress import ip_address
from typing import Final

from bridge.ike.address import address_text, packed

BUCKETS: Final = 256
"""buckets of a gateway, one for each first octet of an SPI"""

STUB: Final = "ike:stub:"
BUCKET: Final = "ike:stubs:"
GONE: Final = "ike:gone:"
MOVED: Final = "ike:moved:"
ADDRESSES: Final = "ike:addresses:"
GATEWAYS: Final = "ike:gateways"
HEARTBEAT: Final = "ike:gateway:"
FETCH: Final = "ike:fetch:"
CHECK: Final = "ike:check:"
TAKEOVER: Final = "ike:takeover:"
REVOKED: Final = "ike:{revoked}"
REVOKED_STAMP: Final = "ike:{revoked}:stamp"
REVOKED_KIND: Final = "ike:{revoked}:"

FETCH_KIND: Final = "fetch"
"""an operator wants all other gateways to fetch the stubs of this one"""
STATS_KIND: Final = "stats"
"""a gateway's counters, for monitors"""
FACTS_KIND: Final = "facts"
"""its connections and pools, for `check` and `drain`"""
TRAFFIC_KIND: Final = "traffic"
"""which of its sessions had traffic last, for those that announce its failure"""
FAILOVERS_KIND: Final = "failovers"
"""how far it is with announcing failures of others, for monitors"""
LOCKOUT_KIND: Final = "lockout"
"""which mark of a locked-out identity it enforces, and how many SAs it ended for it, for `revoke`"""
TAKEOVER_KIND: Final = "takeover"
"""which gateway takes the sessions at a shared address over; of the address, not of a gateway"""
SEALS_KIND: Final = "seals"
"""how many stubs it has sealed with each key"""

_STUB_KEY: Final = re.compile(r"ike:stub:\{(?P<gateway>[^{}/]+)/(?P<octet>[0-9a-f]{2})\}:(?P<spi>[0-9a-f]{16})")
_MOVED_KEY: Final = re.compile(r"ike:moved:\{(?P<gateway>[^{}/]+)/(?P<octet>[0-9a-f]{2})\}:(?P<spi>[0-9a-f]{16})")
_TAGGED: Final = re.compile(r"(?:ike:stubs:|ike:gone:)\{(?P<gateway>[^{}/]+)/(?P<octet>[0-9a-f]{2})\}")
_SPI: Final = re.compile(rb"[0-9a-f]{16}")
_ADDRESS_MEMBERS: Final = (1 + 4 + 8, 1 + 16 + 8)
"""their octets: of a gateway with an IPv4 and an IPv6 address"""
NETWORK: Final = 64
"""addresses in the set of a network. Redis keeps a small set in its compact form, and looks through all of it"""
NETWORKS_MAX: Final = 65_536
"""that one range may span: an IPv4 /10"""
_ADDRESS_OCTETS: Final = 45
"""of the longest text of an IP address"""


def tag(gateway: str, octet: str) -> str:
    """What keeps a stub and its bucket on one Cluster node; `octet` is the first one of the SPI, in hex."""
    return f"{gateway}/{octet}"


def stub_key(gateway: str, spi: bytes) -> str:
    """The key of a stub."""
    digits = spi.hex()
    return f"{STUB}{{{gateway}/{digits[:2]}}}:{digits}"


def moved_key(gateway: str, spi: bytes) -> str:
    """The key of the mark that a session went on at another gateway."""
    digits = spi.hex()
    return f"{MOVED}{{{tag(gateway, digits[:2])}}}:{digits}"


def stub_prefix(bucket: str) -> str:
    """What the keys of a bucket's stubs begin with; the SPI in hex follows."""
    return f"{STUB}{bucket.removeprefix(BUCKET)}:"


def bucket_key(gateway: str, octet: str) -> str:
    """The key of the bucket of the SPIs that begin with `octet` (hex)."""
    return f"{BUCKET}{{{tag(gateway, octet)}}}"


def buckets(gateway: str) -> list[str]:
    """The keys of all buckets of a gateway."""
    return [bucket_key(gateway, f"{octet:02x}") for octet in range(BUCKETS)]


def gone_key(gateway: str, octet: str) -> str:
    """The key of a bucket's ended sessions."""
    return f"{GONE}{{{tag(gateway, octet)}}}"


def gone_of(bucket: str) -> str:
    """The key of a bucket's ended sessions, by the bucket's own."""
    return f"{GONE}{bucket.removeprefix(BUCKET)}"


def heartbeat_key(gateway: str) -> str:
    """The key of a gateway's heartbeat."""
    return f"{HEARTBEAT}{gateway}"


def posted_key(kind: str, gateway: str) -> str:
    """The key of what a gateway posts."""
    return f"ike:{kind}:{gateway}"


def check_key(token: str) -> str:
    """A key to try something with."""
    return f"{CHECK}{token}"


# which stubs have an address


def addresses_key(address: str) -> str:
    """The key of the set that an address is in."""
    octets = packed(address)
    return _addresses_key(octets[:-1], octets[-1] // NETWORK)


def addresses_ranges(first: str, last: str) -> Iterator[tuple[str, int, int]]:
    """The keys of the sets that the addresses from `first` to `last` are in, NETWORKS_MAX at most, each with the last
    octets of the first and of the last address in it."""
    low, high = packed(first), packed(last)
    begin, end = int.from_bytes(low, "big") // NETWORK, int.from_bytes(high, "big") // NETWORK
    for number in range(begin, min(end, begin + NETWORKS_MAX - 1) + 1):
        base = (number * NETWORK).to_bytes(len(low), "big")
        key = _addresses_key(base[:-1], base[-1] // NETWORK)
        yield key, low[-1] if number == begin else base[-1], high[-1] if number == end else base[-1] + NETWORK - 1


def _addresses_key(octets: bytes, part: int) -> str:
    return f"{ADDRESSES}{{{4 if len(octets) == 3 else 6}/{octets.hex()}{part * NETWORK:02x}}}"


def address_member(address: str, gateway: str, spi: bytes) -> bytes:
    """The member that says that a stub has an address: the last octet of the address, the gateway's address, the
    SPI."""
    return packed(address)[-1:] + packed(gateway) + spi


def read_address_member(key: str, member: bytes) -> tuple[str, str, bytes] | None:
    """The address, and gateway and SPI of the stub, that a member of the set `key` names."""
    if len(member) not in _ADDRESS_MEMBERS:
        return None
    network = bytes.fromhex(key.removeprefix(ADDRESSES).strip("{}").partition("/")[2])
    return address_text(network[:-1] + member[:1]), address_text(member[1:-8]), member[-8:]


# patterns for SCAN and for keyspace notifications


def stubs_pattern(gateway: str) -> str:
    """The keys of all stubs of a gateway."""
    return f"{STUB}{{{gateway}/*"


def buckets_pattern(gateway: str | None) -> str:
    """The keys of all buckets of a gateway, or of all gateways."""
    return f"{BUCKET}{{{'*' if gateway is None else gateway}/??}}"


def moved_pattern(gateway: str) -> str:
    """The keys of all marks about sessions of a gateway."""
    return f"{MOVED}{{{gateway}/*"


def gone_pattern(gateway: str | None) -> str:
    """The keys of all ended sessions of a gateway, or of all gateways."""
    return f"{GONE}{{{'*' if gateway is None else gateway}/??}}"


# names read back


@lru_cache(maxsize=1024)
def gateway_name(name: bytes | str) -> str | None:
    """A gateway's address in canonical text; None for anything else."""
    if len(name) > _ADDRESS_OCTETS:
        return None
    try:
        text = name.decode("ascii") if isinstance(name, bytes) else name
        # a zone could hold a glob
        return text if str(ip_address(text)) == text and "%" not in text else None
    except ValueError:
        return None


def read_stub_key(key: str) -> tuple[str, bytes] | None:
    """Gateway and SPI of a stub's key."""
    return _read_key(_STUB_KEY, key)


def read_moved_key(key: str) -> tuple[str, bytes] | None:
    """Gateway and SPI of the key of a mark."""
    return _read_key(_MOVED_KEY, key)


def _read_key(form: re.Pattern[str], key: str) -> tuple[str, bytes] | None:
    match = form.fullmatch(key)
    if match is None or match["octet"] != match["spi"][:2] or gateway_name(match["gateway"]) is None:
        return None
    return match["gateway"], bytes.fromhex(match["spi"])


def read_tagged(key: bytes | str) -> tuple[str, str] | None:
    """Gateway and first octet (hex) in the key of a bucket, or of a bucket's ended sessions."""
    try:
        match = _TAGGED.fullmatch(key.decode("ascii") if isinstance(key, bytes) else key)
    except UnicodeDecodeError:
        return None
    if match is None or gateway_name(match["gateway"]) is None:
        return None
    return match["gateway"], match["octet"]


def read_spi(member: bytes, octet: str) -> bytes | None:
    """The SPI that a member of the bucket of `octet` (hex) names."""
    if _SPI.fullmatch(member) is None or member[:2] != octet.encode():
        return None
    return bytes.fromhex(member.decode())
