"""Which stubs have which virtual IP: an index beside the stubs of one bank, so that all sessions with an address of a
pool are found by one look-up.

A sorted set a network of 64 addresses, small enough for Redis' compact form; its members are the last octet of the
address, the gateway's address and the SPI, all of score 0 and so in the order of their addresses. An entry is a hint:
only the sealed stub that it names says which addresses its session has. Entries are added with the stub, and taken away
by the reader who finds no such stub.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import structlog

from bridge.bank.buckets import BUNDLE, ZSET, Buckets
from bridge.bank.interface import AddressEntry, BankUnavailable
from bridge.bank.redis_client import RedisClient, is_wrong_type
from bridge.stub import bank_keys
from bridge.stub.stub import Index, Stub

log = structlog.get_logger()

ENTRIES_MAX: Final = 8_192
"""that one look-up reads of a network: anyone with write access to the bank can add entries"""
LAST: Final = 255
"""the last octet of the last address of a network"""
ENDED: Final = 2
"""what redis/store.lua says of a stub whose session has ended"""


class AddressIndex:
    """The index in the Redis of `redis`."""

    def __init__(self, redis: RedisClient, buckets: Buckets) -> None:
        self._redis = redis
        self._buckets = buckets
        self._failed = False

    def additions(self, stubs: Sequence[Stub]) -> list[tuple[Any, ...]]:
        """The commands that add the addresses of these stubs: they go to Redis together with the stubs. What becomes of
        them goes to `added`."""
        entries: dict[str, dict[bytes, None]] = {}
        expires: dict[str, int] = {}
        for stub in stubs:
            for key, member in _entries(stub):
                entries.setdefault(key, {})[member] = None
                expires[key] = max(expires.get(key, 0), stub.expires)
        commands: list[tuple[Any, ...]] = []
        for key, members in entries.items():
            commands.append(("ZADD", key, *(part for member in members for part in (0, member))))
            # the set lives as long as the longest of its stubs
            commands += [("EXPIREAT", key, expires[key], "NX"), ("EXPIREAT", key, expires[key], "GT")]
        return commands

    async def added(self, stubs: Sequence[Stub], said: Sequence[int], replies: Sequence[Any]) -> None:
        """What redis/store.lua `said` of each stub, and the replies to its `additions`. A failure is logged once, and
        costs the entries."""
        try:
            if any(map(is_wrong_type, replies)):
                await self._buckets.repair(
                    [(key, ZSET) for key in {key for stub in stubs for key, _ in _entries(stub)}]
                )
                replies = await self._redis.replies(self.additions(stubs), writing=True)
            failure = next((reply for reply in replies if isinstance(reply, Exception)), None)
            await self._remove(
                entry for stub, code in zip(stubs, said, strict=True) if code == ENDED for entry in _entries(stub)
            )
        except BankUnavailable as error:
            failure = error
        if failure is not None and not self._failed:
            log.warning("addresses-not-indexed", reason=str(failure))
        self._failed = failure is not None

    async def find(self, ranges: Sequence[tuple[str, str]]) -> list[AddressEntry]:
        """The entries of each range of addresses, its first and its last one. Raises BankUnavailable."""
        found: list[AddressEntry] = []
        wanted = (each for first, last in ranges for each in bank_keys.addresses_ranges(first, last))
        while bundle := list(itertools.islice(wanted, BUNDLE)):
            commands = [
                (
                    "ZRANGE",
                    key,
                    b"[%c" % low,
                    b"(%c" % (high + 1) if high < LAST else "+",
                    "BYLEX",
                    "LIMIT",
                    0,
                    ENTRIES_MAX,
                )
                for key, low, high in bundle
            ]
            replies = await self._buckets.read(commands, [ZSET] * len(bundle))
            for (key, _, _), reply in zip(bundle, replies, strict=True):
                if isinstance(reply, list):
                    entries = (bank_keys.read_address_member(key, member) for member in reply)
                    found += [AddressEntry(entry[0], Index(*entry[1:])) for entry in entries if entry is not None]
        return found

    async def remove(self, entries: Sequence[AddressEntry]) -> None:
        """Take away entries whose stub is gone. Raises BankUnavailable."""
        await self._remove(
            (bank_keys.addresses_key(address), bank_keys.address_member(address, index.gateway, index.spi))
            for address, index in entries
        )

    async def _remove(self, entries: Iterable[tuple[str, bytes]]) -> None:
        members: dict[str, list[bytes]] = {}
        for key, member in entries:
            members.setdefault(key, []).append(member)
        if members:
            await self._redis.replies([("ZREM", key, *names) for key, names in members.items()])


def _entries(stub: Stub) -> Iterator[tuple[str, bytes]]:
    """The key and the member for each address of a stub."""
    for address in stub.remote_vips:
        # what is no address is not stored either
        with contextlib.suppress(ValueError):
            member = bank_keys.address_member(address, stub.index.gateway, stub.index.spi)
            yield bank_keys.addresses_key(address), member
