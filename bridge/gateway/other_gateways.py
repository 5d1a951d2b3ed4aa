"""The other gateways of the bank: which of them live, have a key of this one, and could resume a session."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from bridge.bank import gateway_facts, gateway_stats
from bridge.bank.gateway_facts import Facts
from bridge.bank.interface import StubBank
from bridge.gateway.other_family import family
from bridge.stub import bank_keys
from bridge.stub.stub import Index


class OtherGateways:
    """What the bank says of them at one time. `facts` of each that lives and has a key of this gateway: its connections
    and their children, None where it does not say."""

    def __init__(self, facts: dict[str, Facts | None], other_keys: frozenset[str], without_heartbeat: bool) -> None:
        self.facts = facts
        self.without_heartbeat = without_heartbeat
        """this gateway's own heartbeat is missing: the bank takes no writes"""
        self.other_keys = other_keys
        """those that live, and could open no stub of this gateway"""

    @classmethod
    async def ask(cls, bank: StubBank, address: str | None) -> OtherGateways:
        """Ask the bank. `address` is this gateway's. Raises BankUnavailable."""
        signs = await bank.gateways()
        mine = signs[address].keys if address is not None and address in signs else frozenset()
        facts: dict[str, Facts | None] = {}
        other_keys = set()
        for name, sign in signs.items():
            if name == address or not sign.alive:
                continue
            if mine and not mine & sign.keys:
                other_keys.add(name)
            else:
                facts[name] = gateway_facts.decode(await bank.posted(bank_keys.FACTS_KIND, name) or b"")
        without_heartbeat = address is not None and address in signs and not signs[address].alive
        return cls(facts, frozenset(other_keys), without_heartbeat)

    def lacks(self, gateway: str, connection: str, children: Iterable[str]) -> str | None:
        """What a gateway lacks for a session, by what it says of itself; None if nothing, or if it says nothing."""
        published = self.facts[gateway]
        if published is None:
            return None
        known = published.connections.get(connection)
        if known is None:
            return f"the target has no connection {connection!r}"
        missing = sorted(set(children) - set(known))
        return f"the target's connection {connection!r} has no child {missing[0]!r}" if missing else None

    def at(self, gateway: str, peer: str) -> list[str]:
        """The addresses by which a client at `peer` may know a gateway, the likelier one first."""
        published = self.facts[gateway]
        other = published.other if published is not None else ""
        if not other:
            return [gateway]
        return [gateway, other] if family(gateway) == family(peer) else [other, gateway]

    def named(self, address: str) -> str:
        """The gateway that has an address, by its name in the bank; the address itself where none has."""
        return next((name for name, one in self.facts.items() if one is not None and one.other == address), address)

    def able(self, connection: str, children: Iterable[str]) -> list[str]:
        """Those that could resume a session, as far as they say."""
        names = tuple(children)
        return [gateway for gateway in self.facts if self.lacks(gateway, connection, names) is None]

    async def sessions(self, bank: StubBank) -> dict[str, int]:
        """How many each of `facts` has, as far as it says. Raises BankUnavailable."""
        published = {name: gateway_stats.decode(await bank.posted(bank_keys.STATS_KIND, name)) for name in self.facts}
        return {
            name: max(int(stats[gateway_stats.SESSIONS]), 0)
            for name, stats in published.items()
            if gateway_stats.SESSIONS in stats
        }


def order(index: Index, gateways: Iterable[str]) -> list[str]:
    """The gateways in the order in which a session goes to them (rendezvous hashing), on each gateway the same: without
    one of them, the order of the others does not change."""

    def weight(gateway: str) -> bytes:
        return hashlib.blake2b(f"{index} {gateway}".encode(), digest_size=8).digest()

    return sorted(gateways, key=weight, reverse=True)
