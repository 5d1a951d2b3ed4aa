"""A stub bank in Redis: a hash a stub, a sorted set a bucket (docs/protocol.md, redis/*.lua).

Of a stub only the sealed part is used. Anyone with write access to the bank can change the readable fields, which are
for people, and the keys' types, members and times to live: whatever they hold, a session that ended is not resumed, and
no call fails but for the stubs that were spoilt.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from itertools import zip_longest
from typing import Any, Final

import msgspec

from bridge.bank.address_index import AddressIndex
from bridge.bank.buckets import BUCKETS_AT_A_TIME, BUNDLE, HASH, STRING, ZSET, Buckets, Work
from bridge.bank.content_report import ContentReport
from bridge.bank.interface import DOWNLOAD_BATCH, AddressEntry, BankUnavailable, Ending, Marked, Taking
from bridge.bank.redis_client import RedisClient, Script, unavailable
from bridge.bank.redis_gateways import RedisGateways
from bridge.bank.sealed_stubs import SealedStubs
from bridge.stub import bank_keys
from bridge.stub.keyring import Keyring
from bridge.stub.readable import READABLE, Readable, readable, readable_fields
from bridge.stub.stub import Index, Stub

GET_TIMEOUT: Final = 1.0
"""seconds a look-up may take: a client waits for it"""
TIMEOUT: Final = 2.0
"""seconds that anything else may take"""
NODE_SHARE: Final = 0.7
"""of the time of a look-up, that one node of a Cluster may take: the answers of the others are not lost with it"""
CLUSTER_PROBES: Final = 16
"""keys that are asked for to know whether a Cluster answers"""
SCORE_MAX: Final = 2.0**53
"""scores of a sorted set are numbers of seconds; anyone can make them infinite"""

SCRIPTS: Final = ("store", "delete", "fetch", "reseal", "repair", "take", "heartbeat", "read")
STORED: Final = 1
HELD_IS_NEWER: Final = 0
"""what redis/store.lua says of a stub; by the readable revision, which the sealed part has to confirm"""
DELETED: Final = 1
"""what redis/delete.lua says of one that was there"""
TAKEN: Final = 3
"""redis/store.lua and redis/delete.lua: another gateway has it, by the readable epoch, which has to be confirmed too"""

_REVISION: Final = READABLE.index("revision")

_fields_encoder = msgspec.msgpack.Encoder()


class RedisBank(RedisGateways):
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
        self._timeout = timeout
        self.on_taken: Callable[[Index], None] = lambda _: None
        """see SharedBank"""
        report = ContentReport()
        self._sealed = SealedStubs(keyring, report, wall)
        scripts = {name: Script(name) for name in SCRIPTS}
        self._store, self._delete, self._reseal = (scripts[name] for name in ("store", "delete", "reseal"))
        self._take = scripts["take"]
        redis = RedisClient(url, timeout, list(scripts.values()))
        buckets = Buckets(redis, report, scripts["fetch"], scripts["repair"], scripts["read"])
        super().__init__(redis, buckets, report, scripts["heartbeat"], keyring, get_timeout=get_timeout, wall=wall)
        self._addresses = AddressIndex(redis, buckets)

    @property
    def unreadable(self) -> int:
        """Stubs found that did not open."""
        return self._report.unreadable

    @property
    def spoilt(self) -> int:
        """Keys and members found that no gateway writes; keys of a wrong type were deleted."""
        return self._report.spoilt

    # Initiate, Update, Delete

    async def store(self, stubs: Sequence[Stub]) -> list[bool]:
        """See StubBank. Stubs of one bucket are stored atomically, together."""
        return (await self.change(stubs, ()))[0]

    async def delete(self, endings: Sequence[Ending]) -> list[bool]:
        """See StubBank. After a lost connection a repeated delete gives False for what the first one deleted."""
        return (await self.change((), endings))[1]

    async def change(self, stubs: Sequence[Stub], endings: Sequence[Ending]) -> tuple[list[bool], list[bool]]:
        """See StubBank. In one transaction, where there is one server and they are few."""
        works = []
        if stubs:
            works.append(self._storing(stubs))
        if endings:
            works.append(self._deleting(endings, await self._expiries(endings)))
        additions, moves = self._addresses.additions(stubs), [ending for ending in endings if ending.move is not None]
        try:
            outcomes, replies = await self._buckets.run_all(works, [*additions, *map(self._mark, moves)])
        except BankUnavailable as error:
            if error.left is not None:
                error.left |= _unmarked(moves, error.replies[len(additions) :])
            raise
        said = outcomes[0] if stubs else []
        await self._addresses.added(stubs, said, replies[: len(additions)])
        await self._put_over_forged(stubs, said)
        deleted = outcomes[-1] if endings else []
        await self._delete_forged(endings, deleted)
        indexes = [change.index for change in stubs] + [change.index for change in endings]
        for index, code in zip(indexes, (*said, *deleted), strict=True):
            if code == TAKEN:
                self.on_taken(index)
        if unmarked := _unmarked(moves, marked := replies[len(additions) :]):
            failure = unavailable(next(reply for reply in marked if isinstance(reply, Exception)))
            failure.left = unmarked
            raise failure
        return [code == STORED for code in said], [code == DELETED for code in deleted]

    def _mark(self, ending: Ending) -> tuple[Any, ...]:
        """The command that leaves a mark of a session that went on elsewhere."""
        assert ending.move is not None
        sealed = self._sealed.seal_mark(ending.index, ending.move.new)
        return ("SET", ending.index.moved, sealed, "EXAT", max(ending.move.expires, int(self._wall()) + 1))

    def _storing(self, stubs: Sequence[Stub]) -> Work:
        def arguments(positions: Sequence[int], places: Sequence[bytes]) -> Iterable[Any]:
            mine = [stubs[position] for position in positions]
            sealed = [self._sealed.seal(stub, place) for stub, place in zip(mine, places, strict=True)]
            return (_fields_encoder.encode([readable_fields(stub) for stub in mine]), *sealed)

        return Work(self._store, [stub.index for stub in stubs], arguments)

    def _deleting(self, endings: Sequence[Ending], expiries: Sequence[int]) -> Work:
        def arguments(positions: Sequence[int], _: Sequence[bytes]) -> Iterable[Any]:
            for position in positions:
                epoch = endings[position].epoch
                yield f"{expiries[position]} {epoch}" if epoch else expiries[position]

        return Work(self._delete, [ending.index for ending in endings], arguments)

    async def _expiries(self, endings: Sequence[Ending]) -> list[int]:
        """When the stub of each would have expired; looked up where the caller does not know."""
        expiries = [ending.expires for ending in endings]
        unknown = [position for position, expires in enumerate(expiries) if not expires]
        if unknown:
            indexes = [endings[position].index for position in unknown]
            for position, (sealed,) in zip(unknown, await self._read_fields(indexes, "sealed"), strict=True):
                stub = self._sealed.open(endings[position].index, sealed)
                expiries[position] = stub.expires if stub is not None else 0
        return expiries

    async def _put_over_forged(self, stubs: Sequence[Stub], said: list[int]) -> None:
        """Store those again that a readable revision which is not that of the sealed part kept out."""
        doubtful = [position for position, code in enumerate(said) if code in (HELD_IS_NEWER, TAKEN)]
        if not doubtful or not (forged := await self._confirm([stubs[position].index for position in doubtful])):
            return
        again = [position for position in doubtful if stubs[position].index in forged]
        [codes], _ = await self._buckets.run_all([self._storing([stubs[position] for position in again])])
        for position, code in zip(again, codes, strict=True):
            said[position] = code

    async def _delete_forged(self, endings: Sequence[Ending], said: list[int]) -> None:
        """Delete those again that a readable epoch which is not that of the sealed part kept."""
        doubtful = [position for position, code in enumerate(said) if code == TAKEN]
        if not doubtful or not (forged := await self._confirm([endings[position].index for position in doubtful])):
            return
        again = [position for position in doubtful if endings[position].index in forged]
        some = [endings[position] for position in again]
        [codes], _ = await self._buckets.run_all([self._deleting(some, await self._expiries(some))])
        for position, code in zip(again, codes, strict=True):
            said[position] = code

    async def _confirm(self, indexes: Sequence[Index]) -> set[Index]:
        """Those of `indexes` whose readable revision or epoch is not that of their sealed part; it is put right, unless
        the stub has changed meanwhile."""
        forged: dict[Index, tuple[bytes, int, int | str]] = {}
        for index, held in zip(indexes, await self._read_fields(indexes, "sealed", "revision", "epoch"), strict=True):
            sealed, *readable_numbers = held
            stub = self._sealed.open(index, sealed)
            revision = stub.revision if stub is not None else 0
            epoch = stub.derivation.epoch if stub is not None and stub.derivation is not None else 0
            if readable_numbers != [str(revision).encode(), str(epoch).encode() if epoch else None]:
                forged[index] = (sealed or b"", revision, epoch if readable_numbers[1] is not None or epoch else "")
                self._report.key(index.key, "its readable revision was not that of its sealed part, and was put right")
        wrong = list(forged)

        def arguments(positions: Sequence[int], _: Sequence[bytes]) -> Iterable[bytes | str]:
            for position in positions:
                sealed, revision, epoch = forged[wrong[position]]
                yield from (sealed, sealed, str(revision), str(epoch))

        await self._buckets.run(self._reseal, wrong, arguments)
        return set(wrong)

    async def take(self, stubs: Sequence[tuple[Stub, Stub]]) -> list[Taking]:
        """See SharedBank. What is set goes by the sealed octets alone."""
        held = await self._read_fields([old.index for old, _ in stubs], "sealed")
        same = [
            position
            for position, ((old, _), (sealed,)) in enumerate(zip(stubs, held, strict=True))
            if sealed is not None and self._sealed.open(old.index, sealed) == old
        ]

        def arguments(positions: Sequence[int], places: Sequence[bytes]) -> Iterable[Any]:
            for position, place in zip(positions, places, strict=True):
                new = stubs[same[position]][1]
                assert new.derivation is not None
                yield held[same[position]][0]
                yield self._sealed.seal(new, place)
                yield from (str(new.revision), new.derivation.owner, str(new.derivation.epoch))

        codes = await self._buckets.run(self._take, [stubs[position][0].index for position in same], arguments)
        outcome = [Taking.CHANGED] * len(stubs)
        for position, code in zip(same, codes, strict=True):
            outcome[position] = Taking(code)
        return outcome

    # GET

    async def get(self, indexes: Sequence[Index]) -> list[Stub | None]:
        """See StubBank. A stub is not returned while its tombstone exists, also one that another process put back."""
        return [None if ended else stub for stub, ended in await self.look(indexes)]

    async def look(self, indexes: Sequence[Index]) -> list[tuple[Stub | None, bool]]:
        """See StubBank."""
        found: list[tuple[Stub | None, bool]] = []
        for first in range(0, len(indexes), BUNDLE):
            bundle = indexes[first : first + BUNDLE]
            commands: list[tuple[Any, ...]] = [("HGET", index.key, "sealed") for index in bundle]
            commands += [("ZSCORE", index.gone, index.spi.hex()) for index in bundle]
            replies = await self._buckets.read(
                commands,
                [HASH] * len(bundle) + [ZSET] * len(bundle),
                within=self._get_timeout,
                node_timeout=self._get_timeout * NODE_SHARE,
            )
            sealed, ends = replies[: len(bundle)], replies[len(bundle) :]
            found += [
                (self._sealed.open(index, octets), isinstance(end, (bytes, float)))
                for index, octets, end in zip(bundle, sealed, ends, strict=True)
            ]
        return found

    async def revisions(self, indexes: Sequence[Index]) -> list[int | None]:
        """See StubBank."""
        found: list[int | None] = []
        for first in range(0, len(indexes), BUNDLE):
            bundle = indexes[first : first + BUNDLE]
            commands: list[tuple[Any, ...]] = [("HGET", index.key, "sealed") for index in bundle]
            commands += [("ZSCORE", index.bucket, index.spi.hex()) for index in bundle]
            replies = await self._buckets.read(commands, [HASH] * len(bundle) + [ZSET] * len(bundle))
            for index, sealed, listed in zip(bundle, replies[: len(bundle)], replies[len(bundle) :], strict=True):
                if isinstance(sealed, Exception) or isinstance(listed, Exception):
                    found.append(None)
                else:
                    stub = self._sealed.open(index, sealed) if listed is not None else None
                    found.append(stub.revision if stub is not None else 0)
            # opening stubs is work: let others have their turn
            await asyncio.sleep(0)
        return found

    async def ended(self, indexes: Sequence[Index]) -> list[bool | None]:
        """See StubBank."""
        commands = [("ZSCORE", index.gone, index.spi.hex()) for index in indexes]
        replies = await self._buckets.read(commands, [ZSET] * len(commands)) if commands else []
        return [None if isinstance(reply, Exception) else reply is not None for reply in replies]

    async def addresses(self, ranges: Sequence[tuple[str, str]]) -> list[AddressEntry]:
        """See StubBank."""
        return await self._addresses.find(ranges)

    async def forget_addresses(self, entries: Sequence[AddressEntry]) -> None:
        """See StubBank."""
        await self._addresses.remove(entries)

    async def endings(self) -> AsyncGenerator[list[Ending]]:
        """See StubBank; a bucket's at a time."""
        names = await self._scan(bank_keys.gone_pattern(None))
        for first in range(0, len(names), BUCKETS_AT_A_TIME):
            page = names[first : first + BUCKETS_AT_A_TIME]
            commands = [("ZRANGE", name, 0, -1, "WITHSCORES") for name, _, _ in page]
            replies = await self._buckets.read(commands, [ZSET] * len(page))
            for (_, gateway, octet), reply in zip(page, replies, strict=True):
                if isinstance(reply, list):
                    pairs = zip(reply[::2], reply[1::2], strict=True)
                    yield [
                        Ending(Index(gateway, spi), int(min(float(score), SCORE_MAX)))
                        for member, score in pairs
                        if (spi := bank_keys.read_spi(member, octet)) is not None and float(score) > 0
                    ]

    async def moved(self, indexes: Sequence[Index]) -> list[Marked]:
        """See StubBank."""
        found: list[Marked] = []
        for first in range(0, len(indexes), BUNDLE):
            bundle = indexes[first : first + BUNDLE]
            replies = await self._buckets.read([("GET", index.moved) for index in bundle], [STRING] * len(bundle))
            found += [
                None if isinstance(reply, Exception) else self._sealed.open_mark(index, reply) or False
                for index, reply in zip(bundle, replies, strict=True)
            ]
        return found

    # Download

    async def download(self, gateway: str, batch: int = DOWNLOAD_BATCH) -> AsyncGenerator[list[Stub]]:
        """See StubBank."""
        if bank_keys.gateway_name(gateway) is None:
            return
        async with aclosing(self._buckets.walk(bank_keys.buckets(gateway), ("sealed",), batch)) as pages:
            async for page in pages:
                stubs = (self._sealed.open(index, values[0]) for index, values in page)
                yield [stub for stub in stubs if stub is not None]

    async def reseal(self, gateway: str) -> int:
        """See StubBank."""
        if bank_keys.gateway_name(gateway) is None:
            return 0
        resealed = 0
        async with aclosing(self._buckets.walk(bank_keys.buckets(gateway), ("sealed",), DOWNLOAD_BATCH)) as pages:
            async for page in pages:
                old: dict[Index, bytes] = {}
                new: list[bytes] = []
                for index, (sealed, *_) in page:
                    again = self._sealed.sealed_again(index, sealed)
                    if sealed is not None and again is not None:
                        old[index] = sealed
                        new.append(again)
                pairs = list(zip(old.values(), new, strict=True))

                def arguments(
                    positions: Sequence[int], _: Sequence[bytes], pairs: Sequence[tuple[bytes, bytes]] = pairs
                ) -> Iterable[bytes]:
                    return [octets for position in positions for octets in (*pairs[position], b"", b"")]

                resealed += sum(await self._buckets.run(self._reseal, list(old), arguments))
        return resealed

    # the connection

    def renew(self) -> None:
        """See StubBank."""
        self._redis.renew()

    async def ping(self) -> float:
        """See StubBank."""
        began = time.monotonic()
        probes: list[tuple[Any, ...]] = [("ZSCORE", bank_keys.GATEWAYS, "")]
        if self._redis.is_cluster:
            # at whatever nodes: a part of a Cluster is a bank too
            probes += [("EXISTS", bank_keys.check_key(str(number))) for number in range(CLUSTER_PROBES)]
        kinds = [ZSET] + [STRING] * (len(probes) - 1)
        await self._buckets.read(probes, kinds, node_timeout=self._timeout)
        return time.monotonic() - began

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.close()

    # what is read

    async def _read_fields(self, indexes: Sequence[Index], *fields: str) -> list[list[bytes | None]]:
        """Fields of stubs, none of one that could not be read. Raises BankUnavailable."""
        rows: list[list[bytes | None]] = []
        for first in range(0, len(indexes), BUNDLE):
            commands = [("HMGET", index.key, *fields) for index in indexes[first : first + BUNDLE]]
            replies = await self._buckets.read(commands, [HASH] * len(commands))
            rows += [reply if isinstance(reply, list) else [None] * len(fields) for reply in replies]
        return rows

    async def _scan(self, pattern: str) -> list[tuple[str, str, str]]:
        """Keys of buckets, or of their ended sessions, that match a glob: key, gateway and first octet of each."""
        found: dict[str, tuple[str, str, str]] = {}
        with self._redis.reaching():
            # SCAN may name a key twice
            async for key in self._redis.client.scan_iter(match=pattern, count=1000):
                named = bank_keys.read_tagged(key)
                if named is None:
                    self._report.key(key, "it is named as no gateway names a key")
                else:
                    found[key.decode()] = (key.decode(), *named)
        return list(found.values())

    # last: from here on `list` is this method in the annotations of the class

    async def list(self, gateway: str | None = None) -> AsyncGenerator[list[Readable]]:
        """See StubBank."""
        names = await self._scan(bank_keys.buckets_pattern(gateway))
        buckets = [name for name, *_ in names]
        async with aclosing(self._buckets.walk(buckets, READABLE, DOWNLOAD_BATCH)) as pages:
            async for page in pages:
                # a stub that expired while its bucket still names it has no fields
                yield [readable(index, values) for index, values in page if values[_REVISION] is not None]


def _unmarked(moves: Sequence[Ending], replies: Sequence[Any]) -> frozenset[Index]:
    """Those of which no mark was left, by the replies; all where there are none."""
    return frozenset(
        ending.index for ending, reply in zip_longest(moves, replies) if reply is None or isinstance(reply, Exception)
    )
