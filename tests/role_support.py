"""What the two roles are tested with, without root and without a lab: time that does not pass, a charon that answers
from memory, a wire that keeps what was sent, and requests that keep what became of them.
"""

from __future__ import annotations

import asyncio
import os
import selectors
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar, cast
from unittest.mock import Mock

from bank_support import stub_of
from bridge.bank.interface import BankUnavailable, Ending, GatewaySign, Marked, StubBank
from bridge.charon.charon import Charon
from bridge.charon.ha_channel import ChannelError
from bridge.charon.ha_message import HaError, IkeId
from bridge.charon.ike_sa import IkeSa
from bridge.charon.install import Install
from bridge.charon.installer import Watcher
from bridge.charon.vici_types import ChildConfig, ConnectionInfo
from bridge.config import HaConfig
from bridge.net.interface import Packet
from bridge.service.tasks import end
from bridge.stub.stub import Index, Stub
from bridge.stub.types import Endpoint, Identity

Result = TypeVar("Result")


class _NoWaiting(selectors.SelectSelector):
    """Where there is nothing to do, the time comes at once at which there will be."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout is None:
            raise RuntimeError("all tasks wait for something that will not happen")
        if not ready and timeout is not None and timeout > 0:
            self.now += timeout
        return ready


class FakeTime(asyncio.SelectorEventLoop):
    """An event loop whose time passes only while all tasks wait, and then at once."""

    def __init__(self) -> None:
        self._selector_of_time = _NoWaiting()
        super().__init__(self._selector_of_time)
        self.failures: list[str] = []
        """the names of supervised tasks that failed"""
        self.set_exception_handler(self._report)

    def time(self) -> float:
        return self._selector_of_time.now

    def _report(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.failures.append(f"{context['message']}: {context.get('exception')!r}")

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run `work` to its end; no supervised task may have failed by then."""
        result = self.run_until_complete(work)
        assert not self.failures, self.failures
        return result

    def pass_time(self, seconds: float) -> None:
        """Let everything happen that happens within `seconds`."""
        self.run(asyncio.sleep(seconds))

    def end(self) -> None:
        """Cancel what still runs."""
        self.run_until_complete(end(*asyncio.all_tasks(self)))
        self.close()


class Wire:
    """A Sender that keeps what was sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, bytes]] = []
        """to whom, and the octets"""
        self.down = False

    def send(self, src: str, sport: int, dst: str, dport: int, payload: bytes, marker: bool) -> None:
        if self.down:
            raise OSError(101, "Network is unreachable")
        self.sent.append((dst, payload))


class Request:
    """An intercepted request. It keeps every decision: two on one are a mistake here; the real Packet forgives it."""

    def __init__(self, src: str, ike: bytes, dst: str = "192.0.2.2") -> None:
        self.src, self.sport = src, 4500
        self.dst, self.dport = dst, 4500
        self.ike = ike
        self.marker = True
        self.fate: list[str] = []

    @property
    def held(self) -> bool:
        return not self.fate

    def accept(self) -> None:
        self.fate.append("accepted")

    def drop(self) -> None:
        self.fate.append("dropped")


class FakeChannel:
    """The HA channel of a charon that is there or not."""

    version = 5

    def __init__(self) -> None:
        self.up = True

    def ready(self) -> bool:
        return self.up

    async def drained(self) -> None:
        if not self.up:
            raise ChannelError("charon's end of the HA channel is gone")

    async def send(self, messages: Iterable[bytes]) -> None:
        list(messages)
        await self.drained()


class FakeInstaller:
    """An Installer whose charon takes everything in, unless told otherwise."""

    toggle_seconds = 0.01

    def __init__(self, channel: FakeChannel) -> None:
        self._channel = channel
        self.failure: Exception | None = None
        """what the next installation raises"""
        self.blocked = False
        """each segment has a handshake in progress"""
        self.landed: dict[bytes, Install] = {}
        self.activating: dict[bytes, Install] = {}
        """what charon has PASSIVE, by both SPIs"""
        self.installed: dict[bytes, Install] = {}
        """what charon has"""
        self.deleted: list[IkeId] = []
        self.activations: list[int] = []
        """how many SAs each activated"""
        self.told: list[tuple[bytes, int]] = []
        """message IDs that charon was told"""
        self.watcher: Watcher = cast(Watcher, Mock())
        self.where = 1
        self.reads = True
        """whether it has read all that it was sent"""

    def wait(self) -> float:
        return 0.0

    def is_blocked(self) -> bool:
        return self.blocked

    def is_passive(self, spis: bytes) -> bool:
        return spis in self.landed or spis in self.activating

    def forget(self, spis: bytes) -> None:
        self.landed.pop(spis, None)

    def set_next_id_now(self, ike_id: IkeId, number: int, *, idle: bool = False) -> bool:
        if self._channel.up and ike_id.spis in self.landed and (self.reads or not idle):
            self.told.append((ike_id.spis, number))
            return True
        return False

    def _fail(self) -> None:
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure
        if not self._channel.up:
            raise ChannelError("charon's end of the HA channel is gone")

    async def land(self, batch: Sequence[Install]) -> None:
        await asyncio.sleep(0.001)
        self._fail()
        made = {install.id.spis: install for install in batch}
        self.landed |= made
        self.installed |= made

    async def activate(self) -> None:
        if not self.landed:
            return
        landed, self.landed = self.landed, {}
        self.activating = landed
        self.watcher.begins(list(landed))
        await asyncio.sleep(self.toggle_seconds)
        try:
            self._fail()
        except BaseException:
            self.landed |= landed
            self.activating = {}
            self.watcher.failed(list(landed))
            raise
        self.activating = {}
        self.activations.append(len(landed))
        self.watcher.done(list(landed))
        for install in landed.values():
            if install.replaces is not None:
                await self.delete([install.replaces])

    async def install(self, batch: Sequence[Install]) -> None:
        await self.land(batch)
        await self.activate()

    async def delete(self, ike_ids: Sequence[IkeId]) -> None:
        if not self._channel.up:
            raise ChannelError("charon's end of the HA channel is gone")
        self.deleted += ike_ids
        for ike_id in ike_ids:
            self.installed.pop(ike_id.spis, None)
            self.landed.pop(ike_id.spis, None)
        self.watcher.lost([ike_id.spis for ike_id in ike_ids])


def fake_charon(*connections: str, children: Sequence[str] = ("net",)) -> tuple[Charon, FakeInstaller, FakeChannel]:
    """A charon with these connections, whose HA channel and VICI socket are made up; its tracker is a real one."""
    charon = Charon("/nowhere", HaConfig())
    channel = FakeChannel()
    installer = FakeInstaller(channel)
    charon.channel = cast(Any, channel)
    charon.installer = cast(Any, installer)
    charon.vici.connected = True
    charon.tracker.connections = {
        name: ConnectionInfo(name, 14400, 0, tuple(ChildConfig(child) for child in children)) for name in connections
    }
    return charon, installer, channel


class FakeBank:
    """A bank in memory, as much of StubBank as the roles use in these tests."""

    unreadable = spoilt = 0

    def __init__(self) -> None:
        self.stubs: dict[Index, Stub] = {}
        self.over: set[Index] = set()
        self.went_on: dict[Index, Index] = {}
        self.unread: set[Index] = set()
        """those whose marks it cannot be asked for"""
        self.alive: set[str] = set()
        self.posts: dict[tuple[str, str], bytes] = {}
        self.away = False
        self.failure: Exception | None = None
        """what the next look-up raises; such an error of the writer ends the process (test_supervision.py)"""
        self.seconds = 0.002
        self.asked: Counter[str] = Counter()

    def as_bank(self) -> StubBank:
        return cast(StubBank, self)

    async def _reach(self, question: str) -> None:
        self.asked[question] += 1
        await asyncio.sleep(self.seconds)
        if question in ("get", "look", "ended") and self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        if self.away:
            raise BankUnavailable("it is away")

    async def get(self, indexes: Sequence[Index]) -> list[Stub | None]:
        await self._reach("get")
        return [self.stubs.get(index) for index in indexes]

    async def look(self, indexes: Sequence[Index]) -> list[tuple[Stub | None, bool]]:
        await self._reach("look")
        return [(self.stubs.get(index), index in self.over) for index in indexes]

    async def store(self, stubs: Sequence[Stub]) -> list[bool]:
        await self._reach("store")
        self.stubs |= {stub.index: stub for stub in stubs}
        return [True] * len(stubs)

    async def delete(self, endings: Sequence[Ending]) -> list[bool]:
        await self._reach("delete")
        self.over |= {ending.index for ending in endings}
        self.went_on |= {ending.index: ending.move.new for ending in endings if ending.move is not None}
        return [self.stubs.pop(ending.index, None) is not None for ending in endings]

    async def change(self, stubs: Sequence[Stub], endings: Sequence[Ending]) -> tuple[list[bool], list[bool]]:
        stored = await self.store(stubs) if stubs else []
        return stored, await self.delete(endings) if endings else []

    async def ended(self, indexes: Sequence[Index]) -> list[bool | None]:
        await self._reach("ended")
        return [index in self.over for index in indexes]

    async def moved(self, indexes: Sequence[Index]) -> list[Marked]:
        await self._reach("moved")
        return [None if index in self.unread else self.went_on.get(index, False) for index in indexes]

    async def gateways(self) -> dict[str, GatewaySign]:
        await self._reach("gateways")
        return {address: GatewaySign(True, frozenset()) for address in self.alive}

    async def posted(self, kind: str, gateway: str) -> bytes | None:
        await self._reach("posted")
        return self.posts.get((kind, gateway))

    async def revocation_stamp(self) -> bytes | None:
        await self._reach("revocation_stamp")
        return None


FAILURES: dict[str, Callable[[], Exception]] = {
    "charon is gone": lambda: ChannelError("charon's end of the HA channel is gone"),
    "one stub does not fit": lambda: HaError("too long"),
    "a mistake of ours": lambda: RuntimeError("a mistake"),
}


def as_packets(requests: Sequence[Request]) -> list[Packet]:
    return [cast(Packet, request) for request in requests]


LOCAL = Endpoint("198.51.100.7", 4500)
"""a client's own address"""


def ike_sa(connection: str, gateway: str) -> IkeSa:
    """A client's IKE_SA with a gateway."""
    stub = stub_of()
    return IkeSa(
        id=IkeId.of(os.urandom(8), os.urandom(8), True),
        suite=stub.suite,
        sk_d=stub.sk_d,
        up=True,
        local_id=Identity(3, b"client@example"),
        remote_id=Identity(2, b"gw.example"),
        local=LOCAL,
        remote=Endpoint(gateway, 4500),
        connection=connection,
    )
