"""What a gateway tells the other ones about itself through the bank, so that `ike-sa-sync check` finds what would make
its sessions fail there: address pools that overlap, connections and children that are missing."""

from __future__ import annotations

from ipaddress import ip_address

import msgspec

KIND = "facts"
"""they are kept under ike:facts:<gateway>"""
SECONDS = 20.0
"""between two times that they are told"""
TTL = 3 * SECONDS


class Pool(msgspec.Struct, frozen=True):
    """Virtual IPs that charon gives out from its memory."""

    name: str
    base: str
    """the first address"""
    size: int

    @property
    def text(self) -> str:
        """first-last"""
        return f"{self.base}-{ip_address(self.base) + max(self.size - 1, 0)}"

    def overlaps(self, other: Pool) -> bool:
        """Whether some address is in both."""
        mine, theirs = ip_address(self.base), ip_address(other.base)
        if mine.version != theirs.version:
            return False
        return int(mine) < int(theirs) + other.size and int(theirs) < int(mine) + self.size


class Facts(msgspec.Struct, frozen=True):
    """One gateway's."""

    connections: dict[str, list[str]]
    """names of the children, by connection"""
    pools: list[Pool] = []


def encode(facts: Facts) -> str:
    return msgspec.json.encode(facts).decode()


def decode(text: str | bytes) -> Facts | None:
    """None where it is not what a gateway writes."""
    try:
        facts = msgspec.json.decode(text, type=Facts)
        for pool in facts.pools:
            ip_address(pool.base) + pool.size
    except (msgspec.MsgspecError, ValueError):
        return None
    return facts
