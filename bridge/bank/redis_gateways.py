"""What gateways leave in a Redis for each other beside stubs: heartbeats, posted values, marks of lock-outs."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final

from bridge.bank.buckets import STRING, ZSET, Buckets
from bridge.bank.content_report import ContentReport
from bridge.bank.interface import BankUnavailable, GatewaySign
from bridge.bank.redis_client import RedisClient, Script, is_wrong_type, unavailable
from bridge.stub import bank_keys
from bridge.stub.keyring import Keyring, SealError
from bridge.stub.revocation import is_forged, open_mark

HEX_KEY: Final = re.compile("[0-9a-f]{8}")
UNIX_SECONDS: Final = re.compile("[0-9]{1,12}")
MARKS_PAGE: Final = 256
"""marks of locked-out identities, about, that are read at a time"""
MARKS_SECONDS: Final = 30.0
"""that one look at all of them takes at most; the next one follows, and does not meet what was removed by then"""
FOREIGN_MAX: Final = 1_000
"""marks by keys that this gateway lacks: with more of them in the bank, all are removed"""
FORGET_GATEWAY: Final = 7 * 86_400
"""seconds after which a gateway without a heartbeat is no longer named"""
GATEWAYS_MAX: Final = 1_000
"""gateways that are named at most, those with the latest heartbeats"""
HEARTBEAT_OCTETS: Final = 4_096
"""of a heartbeat, that are read"""


class RedisGateways:
    """That part of a StubBank. `heartbeat` is redis/heartbeat.lua, `get_timeout` in seconds, `wall` gives Unix time."""

    def __init__(
        self,
        redis: RedisClient,
        buckets: Buckets,
        report: ContentReport,
        heartbeat: Script,
        keyring: Keyring,
        *,
        get_timeout: float,
        wall: Callable[[], float],
    ) -> None:
        self.on_return: Callable[[], None] = lambda: None
        self._redis = redis
        self._buckets = buckets
        self._report = report
        self._heartbeat = heartbeat
        self._keyring = keyring
        self._get_timeout = get_timeout
        self._wall = wall
        self._listed: set[str] = set()
        """gateways whose heartbeats were written from here"""
        self._alive: list[str] = []
        """gateways whose heartbeats were there at the last look"""

    async def heartbeat(self, gateway: str, ttl: float) -> float:
        """See StubBank. The heartbeat names the keys that the gateway has."""
        began = time.monotonic()
        keys = ",".join(key_id.hex() for key_id in self._keyring.ids)
        now = int(self._wall())
        commands = [
            ("SET", bank_keys.heartbeat_key(gateway), f"{now} {keys}", "PX", int(ttl * 1000)),
            self._heartbeat.call([bank_keys.GATEWAYS], [gateway, FORGET_GATEWAY]),
        ]
        replies = await self._redis.replies(commands)
        if any(map(is_wrong_type, replies)):
            await self._buckets.repair([(bank_keys.GATEWAYS, ZSET)])
            replies = await self._redis.replies(commands)
        if failed := [reply for reply in replies if isinstance(reply, Exception)]:
            raise unavailable(failed[0])
        if replies[1] and gateway in self._listed:
            # it was in that list; with FLUSHALL no key has an event
            self.on_return()
        self._listed.add(gateway)
        return time.monotonic() - began

    async def leave(self, gateway: str) -> None:
        """See StubBank."""
        await self._redis.pipeline([("DEL", bank_keys.heartbeat_key(gateway))])

    async def gateways(self) -> dict[str, GatewaySign]:
        """See StubBank."""
        ask = ("ZRANGE", bank_keys.GATEWAYS, 0, GATEWAYS_MAX - 1, "REV")
        [members] = await self._buckets.read([ask], [ZSET])
        names: list[str] = []
        for member in members or ():
            if (name := bank_keys.gateway_name(member)) is None:
                self._report.key(bank_keys.GATEWAYS, "a member of it is no address of a gateway")
            else:
                names.append(name)
        # a gateway that is no longer named there lives for as long as its heartbeat does
        names += [name for name in self._alive if name not in names][: GATEWAYS_MAX - len(names)]
        commands = [("GET", bank_keys.heartbeat_key(name)) for name in names]
        beats = await self._buckets.read(commands, [STRING] * len(names)) if names else []
        signs = {name: _sign(beat) for name, beat in zip(names, beats, strict=True)}
        self._alive = [name for name, sign in signs.items() if sign.alive]
        return signs

    async def post(self, kind: str, gateway: str, value: str, ttl: float) -> None:
        """See StubBank."""
        await self._redis.pipeline([("SET", bank_keys.posted_key(kind, gateway), value, "PX", int(ttl * 1000))])

    async def posted(self, kind: str, gateway: str) -> bytes | None:
        """See StubBank."""
        [value] = await self._buckets.read([("GET", bank_keys.posted_key(kind, gateway))], [STRING])
        return None if value is None else bytes(value)

    async def revocation_stamp(self) -> bytes:
        """See StubBank."""
        [stamp] = await self._buckets.read([("GET", bank_keys.REVOKED_STAMP)], [STRING], within=self._get_timeout)
        return bytes(stamp or b"")

    async def revocations(self) -> Sequence[Sequence[bytes]]:
        """See StubBank. All members are looked at, however many someone without the key added: what no gateway wrote
        is removed as it is met, and so is what has expired by its sealed part, or, of another key, by its score. Those
        of other keys are kept for the gateways that have them, up to FOREIGN_MAX: beyond that number they are no
        gateway's, and a gateway that has the key of one gives it back."""
        now, deadline = self._wall(), time.monotonic() + MARKS_SECONDS
        marks: set[bytes] = set()
        foreign: set[bytes] = set()
        flooded = cut = False
        async with aclosing(self._mark_pages()) as pages:
            async for page in pages:
                junk: list[bytes] = []
                over: list[bytes] = []
                for sealed, score in page:
                    try:
                        (marks.add if open_mark(sealed, self._keyring).expires > now else over.append)(sealed)
                    except SealError:
                        if is_forged(sealed, self._keyring):
                            junk.append(sealed)
                        else:
                            (foreign.add if score > now else over.append)(sealed)
                if flooded or len(foreign) > FOREIGN_MAX:
                    flooded = True
                    junk += foreign
                    foreign.clear()
                await self._remove_marks(junk, over)
                if cut := time.monotonic() > deadline:
                    break
        if flooded or cut:
            with contextlib.suppress(BankUnavailable):
                # for the gateways that know one of those that were removed; and for the next look
                await self._redis.pipeline([self._new_stamp()], writing=True)
        return [[*marks, *foreign]]

    async def _mark_pages(self) -> AsyncGenerator[list[tuple[bytes, float]]]:
        """The members of that set, each with its score; one that is there all the time comes at least once, while
        others are added and removed. Raises BankUnavailable."""
        cursor: Any = 0
        while True:
            command = ("ZSCAN", bank_keys.REVOKED, cursor, "COUNT", MARKS_PAGE)
            [reply] = await self._buckets.read([command], [ZSET])
            if not reply:
                return
            cursor, *flat = reply
            yield list(zip(flat[::2], map(float, flat[1::2]), strict=True))
            if int(cursor) == 0:
                return

    async def _remove_marks(self, junk: Sequence[bytes], over: Sequence[bytes]) -> None:
        """Where this user may: those that no gateway wrote, which are reported, and those that have expired."""
        for _ in junk:
            self._report.key(bank_keys.REVOKED, "a member of it is no mark that a gateway made; such are removed")
        if junk or over:
            with contextlib.suppress(BankUnavailable):
                await self._redis.replies([("ZREM", bank_keys.REVOKED, *junk, *over)], writing=True)

    async def put_revocations(self, marks: Mapping[bytes, int], stale: Collection[bytes]) -> None:
        """See StubBank."""
        commands: list[tuple[Any, ...]] = [
            ("ZADD", bank_keys.REVOKED, expires, sealed) for sealed, expires in marks.items()
        ]
        commands += [("ZREM", bank_keys.REVOKED, sealed) for sealed in stale]
        # last: who sees the new stamp sees the new marks
        await self._redis.pipeline([*commands, self._new_stamp()], writing=True)

    def _new_stamp(self) -> tuple[Any, ...]:
        return ("SET", bank_keys.REVOKED_STAMP, os.urandom(8).hex())


def _sign(beat: object) -> GatewaySign:
    """What a heartbeat says; one of a form that no gateway writes is a sign of life without keys."""
    if not isinstance(beat, bytes):
        return GatewaySign(False, frozenset())
    at, _, keys = beat[:HEARTBEAT_OCTETS].decode(errors="replace").partition(" ")
    return GatewaySign(
        True,
        frozenset(bytes.fromhex(key) for key in keys.split(",") if HEX_KEY.fullmatch(key)),
        int(at) if UNIX_SECONDS.fullmatch(at) else None,
    )
