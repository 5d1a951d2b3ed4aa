"""A stub bank in Redis: a hash a stub, a sorted set a bucket (docs/protocol.md, redis/*.lua)."""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from typing import Any, Final

import msgspec
import structlog

from bridge.bank.interface import DOWNLOAD_BATCH, GatewaySign
from bridge.bank.redis_client import RedisClient, Script
from bridge.service.tasks import end
from bridge.stub.codec import decode, encode
from bridge.stub.keyring import Keyring, SealError
from bridge.stub.readable import READABLE, Readable, readable, readable_fields
from bridge.stub.stub import Index, Stub, StubError

log = structlog.get_logger()

GET_TIMEOUT: Final = 1.0
"""seconds a look-up may take: a client waits for it"""
TIMEOUT: Final = 2.0
"""seconds that anything else may take"""
BUCKETS: Final = 256
"""buckets of a gateway, one for each first octet of an SPI"""
BUNDLE: Final = 512
"""commands in one pipeline at most"""
PORTION: Final = 256
"""stubs, about, that go to Redis while the next as many are made ready"""
BUCKETS_AT_A_TIME: Final = 16
"""buckets that one round trip reads: Redis is busy for some milliseconds where each holds 512 stubs"""
HEX_KEY: Final = re.compile("[0-9a-f]{8}")
REPORTED_MAX: Final = 10_000
"""indexes remembered as reported unreadable"""

HEARTBEAT: Final = "ike:gateway:"
"""with a gateway's address behind it: there while the gateway lives; holds Unix seconds, a space, its keys' ids"""
GONE: Final = "ike:gone:"
"""with a bucket's hash tag behind it: the SPIs of its ended sessions"""
GATEWAYS: Final = "ike:gateways"
"""sorted set: the addresses of gateways, by the time of their last heartbeat"""
FORGET_GATEWAY: Final = 7 * 86_400
"""seconds after which a gateway that was never heard of again is no longer named"""

_fields_encoder = msgspec.msgpack.Encoder()


class RedisBank:
    """StubBank in a Redis, by a URL that `bridge.bank.redis_url` takes. Connects when it is first used.

    `get_timeout` and `timeout` in seconds. `wall` gives Unix seconds.
    """

    def __init__(
        self,
        url: str,
        keyring: Keyring,
        *,
        get_timeout: float = GET_TIMEOUT,
        timeout: float = TIMEOUT,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.unreadable = 0
        """stubs found that did not open"""
        self._keyring = keyring
        self._get_timeout = get_timeout
        self._wall = wall
        self._reported: set[Index] = set()
        self._store, self._delete, self._fetch, self._reseal = scripts = [
            Script(name) for name in ("store", "delete", "fetch", "reseal")
        ]
        self._redis = RedisClient(url, timeout, scripts)

    async def store(self, stubs: Sequence[Stub]) -> list[bool]:
        """See StubBank. Stubs of one bucket are stored atomically, together."""

        def arguments(positions: Sequence[int], places: Sequence[bytes]) -> Iterable[Any]:
            mine = [stubs[position] for position in positions]
            sealed = [self._keyring.seal(encode(stub), place) for stub, place in zip(mine, places, strict=True)]
            return (_fields_encoder.encode([readable_fields(stub) for stub in mine]), *sealed)

        return await self._by_bucket(self._store, [stub.index for stub in stubs], arguments)

    async def look(self, indexes: Sequence[Index]) -> list[tuple[Stub | None, bool]]:
        """GET Stub, and beside each stub whether its session is known here to have ended."""
        found: list[tuple[Stub | None, bool]] = []
        for first in range(0, len(indexes), BUNDLE):
            bundle = indexes[first : first + BUNDLE]
            commands: list[tuple[Any, ...]] = [("HGET", index.key, "sealed") for index in bundle]
            commands += [("ZSCORE", index.gone, index.spi.hex()) for index in bundle]
            with self._redis.reaching():
                async with asyncio.timeout(self._get_timeout):
                    replies = await self._redis.pipeline(commands)
            sealed, ends = replies[: len(bundle)], replies[len(bundle) :]
            found += [
                (self._open(index, octets), end is not None)
                for index, octets, end in zip(bundle, sealed, ends, strict=True)
            ]
        return found

    async def endings(self) -> AsyncGenerator[list[Index]]:
        """All sessions, of whatever gateway, that are known here to have ended; a bucket's at a time."""
        with self._redis.reaching():
            names = {name.decode(): None async for name in self._redis.client.scan_iter(match=f"{GONE}*", count=1000)}
        buckets = [name for name in names if name.endswith("}") and "/" in name]
        for first in range(0, len(buckets), BUCKETS_AT_A_TIME):
            page = buckets[first : first + BUCKETS_AT_A_TIME]
            replies = await self._redis.pipeline([("ZRANGE", name, 0, -1) for name in page])
            for name, members in zip(page, replies, strict=True):
                gateway = name[len(GONE) + 1 :].rpartition("/")[0]
                yield [Index(gateway, spi) for member in members if (spi := _spi(member)) is not None]

    async def delete(self, items: Sequence[tuple[Index, int]]) -> list[bool]:
        """See StubBank. After a lost connection a repeated delete gives False for what the first one deleted."""

        def revisions(positions: Sequence[int], _: Sequence[bytes]) -> Iterable[Any]:
            return [items[position][1] for position in positions]

        return await self._by_bucket(self._delete, [index for index, _ in items], revisions)

    async def get(self, indexes: Sequence[Index]) -> list[Stub | None]:
        """See StubBank."""
        found: list[Stub | None] = []
        for first in range(0, len(indexes), BUNDLE):
            bundle = indexes[first : first + BUNDLE]
            with self._redis.reaching():
                async with asyncio.timeout(self._get_timeout):
                    replies = await self._redis.pipeline([("HGET", index.key, "sealed") for index in bundle])
            found += [self._open(index, sealed) for index, sealed in zip(bundle, replies, strict=True)]
        return found

    async def download(self, gateway: str, batch: int = DOWNLOAD_BATCH) -> AsyncGenerator[list[Stub]]:
        """See StubBank."""
        buckets = [Index(gateway, bytes((octet,))).bucket for octet in range(BUCKETS)]
        async with aclosing(self._walk(buckets, ("sealed",), batch)) as pages:
            async for page in pages:
                stubs = (self._open(index, values[0]) for index, values in page)
                yield [stub for stub in stubs if stub is not None]

    async def revisions(self, indexes: Sequence[Index]) -> list[int]:
        """See StubBank."""
        found: list[int] = []
        for first in range(0, len(indexes), BUNDLE):
            bundle = indexes[first : first + BUNDLE]
            replies = await self._redis.pipeline([("HGET", index.key, "revision") for index in bundle])
            found += [int(reply) if reply is not None and reply.isdigit() else 0 for reply in replies]
        return found

    async def ended(self, indexes: Sequence[Index]) -> list[bool]:
        """See StubBank."""
        commands = [("ZSCORE", index.gone, index.spi.hex()) for index in indexes]
        return [reply is not None for reply in await self._redis.pipeline(commands)]

    async def reseal(self, gateway: str) -> int:
        """See StubBank."""
        resealed = 0
        buckets = [Index(gateway, bytes((octet,))).bucket for octet in range(BUCKETS)]
        async with aclosing(self._walk(buckets, ("sealed",), DOWNLOAD_BATCH)) as pages:
            async for page in pages:
                old: dict[Index, bytes] = {}
                new: list[bytes] = []
                for index, (sealed, *_) in page:
                    if sealed is None or self._keyring.is_current(sealed):
                        continue
                    place = index.key.encode()
                    try:
                        new.append(self._keyring.seal(self._keyring.open(sealed, place), place))
                    except SealError as error:
                        self._report(index, str(error))
                    else:
                        old[index] = sealed
                pairs = list(zip(old.values(), new, strict=True))

                def arguments(
                    positions: Sequence[int], _: Sequence[bytes], pairs: Sequence[tuple[bytes, bytes]] = pairs
                ) -> Iterable[bytes]:
                    return [octets for position in positions for octets in pairs[position]]

                resealed += sum(await self._by_bucket(self._reseal, list(old), arguments))
        return resealed

    async def heartbeat(self, gateway: str, ttl: float) -> None:
        """See StubBank. The heartbeat tells which keys the gateway has."""
        keys = ",".join(key_id.hex() for key_id in self._keyring.ids)
        now = int(self._wall())
        await self._redis.pipeline(
            [
                ("SET", f"{HEARTBEAT}{gateway}", f"{now} {keys}", "PX", int(ttl * 1000)),
                ("ZADD", GATEWAYS, now, gateway),
                ("ZREMRANGEBYSCORE", GATEWAYS, "-inf", now - FORGET_GATEWAY),
            ]
        )

    async def gateways(self) -> dict[str, GatewaySign]:
        """See StubBank."""
        names = [name.decode() for name in (await self._redis.pipeline([("ZRANGE", GATEWAYS, 0, -1)]))[0]]
        beats = await self._redis.pipeline([("GET", f"{HEARTBEAT}{name}") for name in names]) if names else []
        return {name: _sign(beat) for name, beat in zip(names, beats, strict=True)}

    async def post(self, kind: str, gateway: str, value: str, ttl: float) -> None:
        """See StubBank."""
        await self._redis.pipeline([("SET", f"ike:{kind}:{gateway}", value, "PX", int(ttl * 1000))])

    async def posted(self, kind: str, gateway: str) -> bytes | None:
        """See StubBank."""
        [value] = await self._redis.pipeline([("GET", f"ike:{kind}:{gateway}")])
        return None if value is None else bytes(value)

    async def ping(self) -> float:
        """See StubBank."""
        began = time.monotonic()
        with self._redis.reaching():
            await self._redis.client.ping()
        return time.monotonic() - began

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.close()

    # stubs

    def _open(self, index: Index, sealed: bytes | None) -> Stub | None:
        if sealed is None:
            return None
        try:
            stub = decode(self._keyring.open(sealed, index.key.encode()))
            if stub.index != index:
                raise StubError(f"it is the stub of {stub.index}")
        except (SealError, StubError) as error:
            self._report(index, str(error))
            return None
        # an expiry that someone took from the key is still in the stub
        return stub if stub.expires > self._wall() else None

    def _report(self, index: Index, reason: str) -> None:
        self.unreadable += 1
        if index in self._reported:
            return
        if len(self._reported) >= REPORTED_MAX:
            self._reported.clear()
        self._reported.add(index)
        log.warning("stub-unreadable", index=str(index), reason=reason)

    # Redis

    async def _by_bucket(
        self,
        script: Script,
        indexes: Sequence[Index],
        arguments: Callable[[Sequence[int], Sequence[bytes]], Iterable[Any]],
    ) -> list[bool]:
        """Run a script on each bucket of `indexes`; gives what it says of each index.

        `arguments` gives those for the stubs at some positions, which are of one bucket, with their keys. Redis works
        on a portion while the next one is made ready.
        """
        buckets: dict[bytes, list[int]] = {}
        for position, index in enumerate(indexes):
            buckets.setdefault(index.bucket.encode(), []).append(position)
        outcome = [False] * len(indexes)
        ahead: asyncio.Task[None] | None = None

        async def run(calls: list[tuple[Any, ...]], called: list[list[int]]) -> None:
            for positions, reply in zip(called, await self._redis.pipeline(calls, writing=True), strict=True):
                for position, done in zip(positions, reply, strict=True):
                    outcome[position] = bool(done)

        try:
            calls: list[tuple[Any, ...]] = []
            called: list[list[int]] = []
            size = 0
            for bucket, positions in buckets.items():
                places = [indexes[position].key.encode() for position in positions]
                calls.append(script.call([bucket, *places], arguments(positions, places)))
                called.append(positions)
                size += len(positions)
                if size >= PORTION:
                    if ahead is not None:
                        await ahead
                    ahead = asyncio.create_task(run(calls, called))
                    await _question_left()
                    calls, called, size = [], [], 0
            if ahead is not None:
                await ahead
            if calls:
                await run(calls, called)
        finally:
            if ahead is not None:
                await end(ahead)
        return outcome

    async def _walk(
        self, buckets: Sequence[str], fields: Sequence[str], batch: int
    ) -> AsyncGenerator[list[tuple[Index, list[bytes | None]]]]:
        """The fields of all stubs in `buckets`, at most `batch` at a time. Redis works while the caller does."""
        waiting = deque((bucket, b"0") for bucket in buckets)
        # a stub may come twice while its bucket grows
        seen: dict[str, set[bytes]] = {}

        async def fetch() -> tuple[list[str], list[Any]]:
            page = [waiting.popleft() for _ in range(min(BUCKETS_AT_A_TIME, len(waiting)))]
            calls = [self._fetch.call((bucket,), (cursor, batch, *fields)) for bucket, cursor in page]
            return [bucket for bucket, _ in page], await self._redis.pipeline(calls)

        ahead = asyncio.create_task(fetch())
        try:
            while True:
                page, replies = await ahead
                for bucket, reply in zip(page, replies, strict=True):
                    if reply[0] != b"0":
                        waiting.append((bucket, reply[0]))
                more = bool(waiting)
                if more:
                    ahead = asyncio.create_task(fetch())
                    await _question_left()
                rows = list(_rows(page, replies, len(fields), seen))
                for first in range(0, len(rows), batch):
                    yield rows[first : first + batch]
                    # opening stubs is work: let others have their turn
                    await asyncio.sleep(0)
                if not more:
                    return
        finally:
            await end(ahead)

    # last: from here on `list` is this method in the annotations of the class

    async def list(self, gateway: str | None = None) -> AsyncGenerator[list[Readable]]:
        """See StubBank."""
        with self._redis.reaching():
            pattern = f"ike:stubs:{{{'*' if gateway is None else gateway}/??}}"
            # SCAN may name a key twice
            buckets = {key.decode(): None async for key in self._redis.client.scan_iter(match=pattern, count=1000)}
        async with aclosing(self._walk(list(buckets), READABLE, DOWNLOAD_BATCH)) as pages:
            async for page in pages:
                # a stub that expired while its bucket still names it has no fields
                yield [readable(index, values) for index, values in page if values[-1] is not None]


async def _question_left() -> None:
    """Let a task begin that asks Redis, and what it wrote leave: Redis works on it while the caller does other work."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)


def _rows(
    buckets: Sequence[str], replies: Sequence[list[Any]], width: int, seen: dict[str, set[bytes]]
) -> Iterator[tuple[Index, list[bytes | None]]]:
    """The stubs in replies of redis/fetch.lua: index and `width` fields, each stub once."""
    for bucket, reply in zip(buckets, replies, strict=True):
        known = seen.setdefault(bucket, set()) if reply[0] != b"0" else seen.pop(bucket, set())
        gateway = bucket[len("ike:stubs:{") :].rpartition("/")[0]
        for position in range(1, len(reply), width + 1):
            name: bytes = reply[position]
            if name in known:
                continue
            known.add(name)
            if (spi := _spi(name)) is not None:
                yield Index(gateway, spi), reply[position + 1 : position + 1 + width]


def _spi(member: bytes) -> bytes | None:
    """The SPI that a member of a bucket names; None if it is not ours."""
    try:
        return bytes.fromhex(member.decode())
    except ValueError:
        return None


def _sign(beat: bytes | None) -> GatewaySign:
    """What a heartbeat tells; one of a form that is not ours is a sign of life without keys."""
    if beat is None:
        return GatewaySign(False, frozenset())
    keys = beat.partition(b" ")[2].decode(errors="replace").split(",")
    return GatewaySign(True, frozenset(bytes.fromhex(key) for key in keys if HEX_KEY.fullmatch(key)))
