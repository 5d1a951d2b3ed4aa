"""What a gateway publishes about itself in the bank, so that `ike-sa-sync check` finds what would make
its sessions fail there: address pools that overlap, connections and children that are missing."""

from __future__ import annotations

from ipaddress import ip_address

import msgspec

from bridge.ike.address import Pool
from bridge.stub import bank_keys

SECONDS = 20.0
"""between two publications"""
TTL = 3 * SECONDS
ADDRESSES_MAX = 16
OCTETS_MAX = 1_000_000
"""of what a gateway writes; more is not read"""


class Facts(msgspec.Struct, frozen=True):
    """One gateway's."""

    connections: dict[str, list[str]]
    """names of the children, by connection"""
    pools: list[Pool] = []
    addresses: list[str] = []
    """others under which its stubs are: its address in the index is of one family only"""
    other: str = ""
    """its address of the other family, where it has one"""


def encode(facts: Facts) -> str:
    return msgspec.json.encode(facts).decode()


def decode(text: str | bytes) -> Facts | None:
    """None where it is not what a gateway writes."""
    if len(text) > OCTETS_MAX:
        return None
    try:
        facts = msgspec.json.decode(text, type=Facts)
        facts.addresses[:] = [one for one in facts.addresses[:ADDRESSES_MAX] if bank_keys.gateway_name(one) is not None]
        for pool in facts.pools:
            ip_address(pool.base) + pool.size
        if facts.other and bank_keys.gateway_name(facts.other) is None:
            return None
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError):
        return None
    return facts
