"""Which stubs have which virtual IP: an index beside the stubs of one bank, so that all sessions with an address of a
pool are found by one look-up.

A sorted set a network, whose members are `<address in hex> <gateway>/<SPI>`, all of score 0 and so in the order of
their addresses. An entry is a hint: only the sealed stub that it names says which addresses its session has. Entries
are added when a stub is stored, and taken away by the reader who finds no such stub.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import structlog

from bridge.bank.buckets import BUNDLE, ZSET, Buckets
from bridge.bank.interface import AddressEntry, BankUnavailable
from bridge.bank.redis_client import RedisClient, is_wrong_type
from bridge.stub import bank_keys
from bridge.stub.stub import Index, Stub

log = structlog.get_logger()

ENTRIES_MAX: Final = 200_000
"""that one look-up reads of a network: anyone with write access to the bank can add entries"""


class AddressIndex:
    """The index in the Redis of `redis`."""

    def __init__(self, redis: RedisClient, buckets: Buckets) -> None:
        self._redis = redis
        self._buckets = buckets
        self._failed = False

    async def put(self, stubs: Sequence[Stub]) -> None:
        """Add the addresses of these stubs. A failure is logged once, and costs the entries."""
        members: dict[str, set[str]] = {}
        expires: dict[str, int] = {}
        for stub in stubs:
            for address in stub.remote_vips:
                key = bank_keys.addresses_key(address)
                members.setdefault(key, set()).add(
                    bank_keys.address_member(address, stub.index.gateway, stub.index.spi)
                )
                expires[key] = max(expires.get(key, 0), stub.expires)
        commands: list[tuple[Any, ...]] = []
        for key, names in members.items():
            commands.append(("ZADD", key, *(part for name in sorted(names) for part in (0, name))))
            # the set lives as long as the longest of its stubs
            commands += [("EXPIREAT", key, expires[key], "NX"), ("EXPIREAT", key, expires[key], "GT")]
        if not commands:
            return
        try:
            replies = await self._redis.replies(commands, writing=True)
            if any(map(is_wrong_type, replies)):
                await self._buckets.repair([(key, ZSET) for key in members])
                replies = await self._redis.replies(commands, writing=True)
            failure = next((reply for reply in replies if isinstance(reply, Exception)), None)
        except BankUnavailable as error:
            failure = error
        if failure is not None and not self._failed:
            log.warning("addresses-not-indexed", reason=str(failure))
        self._failed = failure is not None

    async def find(self, ranges: Sequence[tuple[str, str]]) -> list[AddressEntry]:
        """The entries of each range of addresses, its first and its last one. Raises BankUnavailable."""
        commands: list[tuple[Any, ...]] = []
        for first, last in ranges:
            for key in bank_keys.addresses_keys(first, last):
                low, high = bank_keys.address_hex(first), bank_keys.address_hex(last)
                # a space is in front of the index, and "!" behind a space
                commands.append(("ZRANGE", key, f"[{low}", f"[{high}!", "BYLEX", "LIMIT", 0, ENTRIES_MAX))
        found: list[AddressEntry] = []
        for start in range(0, len(commands), BUNDLE):
            bundle = commands[start : start + BUNDLE]
            for reply in await self._buckets.read(bundle, [ZSET] * len(bundle)):
                if isinstance(reply, list):
                    entries = (bank_keys.read_address_member(member) for member in reply)
                    found += [AddressEntry(entry[0], Index(*entry[1:])) for entry in entries if entry is not None]
        return found

    async def remove(self, entries: Sequence[AddressEntry]) -> None:
        """Take away entries whose stub is gone. Raises BankUnavailable."""
        members: dict[str, list[str]] = {}
        for address, index in entries:
            name = bank_keys.address_member(address, index.gateway, index.spi)
            members.setdefault(bank_keys.addresses_key(address), []).append(name)
        if members:
            await self._redis.replies([("ZREM", key, *names) for key, names in members.items()])
