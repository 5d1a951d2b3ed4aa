"""How the bank's Redis is read and written, whatever another process left in it: commands for single keys, scripts for
buckets, walks through buckets.

A failure counts for the key or the bucket that it is of, not for what was asked together with it. A key of another type
than the bank's holds nothing of a gateway's: it is reported and deleted (redis/repair.lua), and what was asked of it is
asked again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from bridge.bank.content_report import ContentReport
from bridge.bank.interface import BankUnavailable
from bridge.bank.redis_client import RedisClient, Script, is_wrong_type, unavailable
from bridge.service.tasks import end
from bridge.stub import bank_keys
from bridge.stub.stub import Index

BUNDLE: Final = 512
"""commands in one pipeline at most"""
PORTION: Final = 256
"""stubs, about, that go to Redis while the next as many are made ready"""
BUCKETS_AT_A_TIME: Final = 16
"""buckets that one round trip reads: Redis is busy for some milliseconds where each holds 512 stubs"""


class Kind(NamedTuple):
    """A type of key: a command that only reads and that keys of this type take, and what follows the key in it."""

    name: str
    probe: str
    arguments: tuple[str, ...]


VALUE_MOST: Final = 1_000_001
"""octets of a value that a gateway reads: one more than it posts. A stub has some thousands"""
MEMBER_MOST: Final = 4_224
"""of a member of a sorted set: the largest is a mark of a locked-out identity"""
VALUES: Final = ("GET", "HGET", "HMGET")
MEMBERS: Final = ("ZRANGE", "ZSCAN")
HASH: Final = Kind("hash", "HGET", ("sealed",))
ZSET: Final = Kind("sorted set", "ZSCORE", ("",))
STRING: Final = Kind("string", "GET", ())


class Work(NamedTuple):
    """A script for stubs. `arguments` gives those for the stubs at some positions, which are of one bucket, with their
    keys."""

    script: Script
    indexes: Sequence[Index]
    arguments: Callable[[Sequence[int], Sequence[bytes]], Iterable[Any]]

    def buckets(self) -> dict[str, list[int]]:
        """The positions of the stubs of each bucket."""
        buckets: dict[str, list[int]] = {}
        for position, index in enumerate(self.indexes):
            buckets.setdefault(index.bucket, []).append(position)
        return buckets

    def call(self, bucket: str, positions: Sequence[int]) -> tuple[Any, ...]:
        """The command for those of one bucket."""
        places = [self.indexes[position].key.encode() for position in positions]
        keys = [bucket.encode(), bank_keys.gone_of(bucket).encode(), *places]
        return self.script.call(keys, self.arguments(positions, places))


class _Call(NamedTuple):
    command: tuple[Any, ...]
    positions: list[int]
    outcome: list[int | None]
    """where what it says of the stub at each position goes"""


class Buckets:
    """Reads, scripts and walks by way of `redis`; what no gateway wrote goes to `report`."""

    def __init__(self, redis: RedisClient, report: ContentReport, fetch: Script, repair: Script, read: Script) -> None:
        self._redis = redis
        self._report = report
        self._fetch = fetch
        self._repair = repair
        self._read = read

    async def read(
        self,
        commands: Sequence[tuple[Any, ...]],
        kinds: Sequence[Kind],
        *,
        within: float | None = None,
        node_timeout: float | None = None,
    ) -> list[Any]:
        """The replies to commands that read one key each, the key being their first argument and of a type in `kinds`.
        None for a key that is not of its type or that was larger than a gateway writes it, which is deleted; an
        exception for one that could not be asked.

        Raises BankUnavailable where none could be asked.
        """
        bounded = [self._bounded(command) for command in commands]
        replies = await self._redis.replies(bounded, within=within, node_timeout=node_timeout)
        for position, (command, sent) in enumerate(zip(commands, bounded, strict=True)):
            if sent is not command and not isinstance(replies[position], Exception):
                replies[position] = self._unpacked(command, *replies[position])
        wrong = [position for position, reply in enumerate(replies) if is_wrong_type(reply)]
        for position in wrong:
            replies[position] = None
        failed = [reply for reply in replies if isinstance(reply, Exception)]
        if failed and len(failed) == len(replies):
            raise unavailable(failed[0])
        if wrong:
            with contextlib.suppress(BankUnavailable):
                await self.repair([(commands[position][1], kinds[position]) for position in wrong])
        return replies

    def _bounded(self, command: tuple[Any, ...]) -> tuple[Any, ...]:
        """The same by redis/read.lua, for commands that could bring any number of octets."""
        name, key, *more = command
        if name in VALUES:
            return self._read.call((key,), (VALUE_MOST, name, *more))
        return self._read.call((key,), (MEMBER_MOST, name, *more)) if name in MEMBERS else command

    def _unpacked(self, command: tuple[Any, ...], values: list[Any], large: int) -> Any:
        name, key, *more = command
        if large:
            self._report.key(key, "it held more octets than a gateway writes, which were deleted")
        if name == "HMGET":
            return values or [None] * len(more)
        return values if name in MEMBERS else next(iter(values), None)

    async def repair(self, keys: Sequence[tuple[str | bytes, Kind]]) -> None:
        """Delete those keys that are not of their type. Raises BankUnavailable."""
        calls = [self._repair.call((key,), (kind.probe, *kind.arguments)) for key, kind in keys]
        for (key, kind), deleted in zip(keys, await self._redis.replies(calls), strict=True):
            if deleted == 1:
                self._report.key(key, f"it was no {kind.name}, and was deleted")

    # scripts

    async def run(
        self,
        script: Script,
        indexes: Sequence[Index],
        arguments: Callable[[Sequence[int], Sequence[bytes]], Iterable[Any]],
    ) -> list[int]:
        """Run a script on each bucket of `indexes`; gives what it says of each index. See `run_all`."""
        [outcome], _ = await self.run_all([Work(script, indexes, arguments)])
        return outcome

    async def run_all(
        self, works: Sequence[Work], commands: Sequence[tuple[Any, ...]] = ()
    ) -> tuple[list[list[int]], list[Any]]:
        """Run scripts on each bucket of their indexes, one script after the other, and other commands with a key each;
        all in one round trip where they are few. Gives what each script says of each of its indexes, and the replies
        to the commands. Redis works on a portion while the next one is made ready.

        Raises BankUnavailable, with the indexes of the buckets that failed and the replies to the commands, if any,
        after the others are done.
        """
        outcomes: list[list[int | None]] = [[None] * len(work.indexes) for work in works]
        failures: list[Exception] = []
        ahead: asyncio.Task[list[Any]] | None = None

        async def send(calls: list[_Call], more: Sequence[tuple[Any, ...]] = ()) -> list[Any]:
            replies = await self._redis.replies([*(call.command for call in calls), *more], writing=True)
            for call, reply in zip(calls, replies, strict=False):
                answer = await self._again(call.command) if is_wrong_type(reply) else reply
                if isinstance(answer, Exception):
                    failures.append(answer)
                    continue
                for position, done in zip(call.positions, answer, strict=True):
                    call.outcome[position] = int(done or 0)
            return replies[len(calls) :]

        replies: list[Any] = []
        try:
            calls: list[_Call] = []
            size = 0
            for work, outcome in zip(works, outcomes, strict=True):
                for bucket, positions in work.buckets().items():
                    calls.append(_Call(work.call(bucket, positions), positions, outcome))
                    size += len(positions)
                    if size >= PORTION:
                        if ahead is not None:
                            await ahead
                        ahead = asyncio.create_task(send(calls))
                        await question_left()
                        calls, size = [], 0
            if ahead is not None:
                await ahead
            if calls or commands:
                replies = await send(calls, commands)
        except BankUnavailable as error:
            failures.insert(0, error)
        finally:
            if ahead is not None:
                await end(ahead)
        left = frozenset(
            index
            for work, outcome in zip(works, outcomes, strict=True)
            for index, done in zip(work.indexes, outcome, strict=True)
            if done is None
        )
        if failures:
            failure = failures[0] if isinstance(failures[0], BankUnavailable) else unavailable(failures[0])
            failure.left, failure.replies = left, replies
            failure.answers = failure.answers or any(done is not None for outcome in outcomes for done in outcome)
            raise failure
        return [[done or 0 for done in outcome] for outcome in outcomes], replies

    async def _again(self, call: tuple[Any, ...]) -> Any:
        """The reply to a script that failed by a key of a wrong type, after those keys were deleted."""
        _, _, count, *keys = call
        bucket, gone, *stubs = keys[:count]
        await self.repair([(bucket, ZSET), (gone, ZSET), *((stub, HASH) for stub in stubs)])
        [reply] = await self._redis.replies([call], writing=True)
        return reply

    # walks

    async def walk(
        self, buckets: Sequence[str], fields: Sequence[str], batch: int
    ) -> AsyncGenerator[list[tuple[Index, list[bytes | None]]]]:
        """The fields of all stubs in `buckets`, at most `batch` at a time. Redis works while the caller does.

        Raises BankUnavailable where a bucket could not be read, after all others were.
        """
        waiting = deque((bucket, b"0") for bucket in buckets)
        # a stub may come twice while its bucket grows
        seen: dict[str, set[bytes]] = {}
        failure: Exception | None = None

        async def fetch() -> tuple[list[str], list[Any]]:
            page = [waiting.popleft() for _ in range(min(BUCKETS_AT_A_TIME, len(waiting)))]
            calls = [
                self._fetch.call((bucket,), (cursor, batch, bank_keys.stub_prefix(bucket), *fields))
                for bucket, cursor in page
            ]
            return [bucket for bucket, _ in page], await self._redis.replies(calls)

        ahead = asyncio.create_task(fetch())
        try:
            while True:
                page, replies = await ahead
                good: list[tuple[str, list[Any]]] = []
                spoilt: list[tuple[str | bytes, Kind]] = []
                for bucket, reply in zip(page, replies, strict=True):
                    if is_wrong_type(reply):
                        spoilt.append((bucket, ZSET))
                    elif isinstance(reply, Exception):
                        failure = failure or reply
                    else:
                        good.append((bucket, reply))
                        if reply[0] != b"0":
                            waiting.append((bucket, reply[0]))
                more = bool(waiting)
                if more:
                    ahead = asyncio.create_task(fetch())
                    await question_left()
                rows = []
                for index, values in self._rows(good, len(fields), seen):
                    if isinstance(values[0], Exception):
                        spoilt.append((index.key, HASH))
                    else:
                        rows.append((index, values))
                if spoilt:
                    await self.repair(spoilt)
                for first in range(0, len(rows), batch):
                    yield rows[first : first + batch]
                    # opening stubs is work: let others have their turn
                    await asyncio.sleep(0)
                if not more:
                    break
        finally:
            await end(ahead)
        if failure is not None:
            raise unavailable(failure)

    def _rows(
        self, replies: Sequence[tuple[str, list[Any]]], width: int, seen: dict[str, set[bytes]]
    ) -> Iterator[tuple[Index, list[Any]]]:
        """The stubs in replies of redis/fetch.lua: index and `width` fields, each stub once."""
        for bucket, reply in replies:
            named = bank_keys.read_tagged(bucket)
            assert named is not None, "buckets are named by gateways' addresses"
            gateway, octet = named
            known = seen.setdefault(bucket, set()) if reply[0] != b"0" else seen.pop(bucket, set())
            for position in range(1, len(reply), width + 1):
                member: bytes = reply[position]
                if member in known:
                    continue
                known.add(member)
                if (spi := bank_keys.read_spi(member, octet)) is None:
                    self._report.key(bucket, "a member of it is no SPI of that bucket")
                else:
                    yield Index(gateway, spi), reply[position + 1 : position + 1 + width]


async def question_left() -> None:
    """Let a task begin that asks Redis, and what it wrote leave: Redis works on it while the caller does other work."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)
