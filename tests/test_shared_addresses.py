"""Whether a shared address is here, by the kernel's word: what is unclear changes nothing
(bridge.gateway.shared_addresses, bridge.net.address_watch)."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from bridge.bank.interface import BankUnavailable
from bridge.bank.redis_bank import RedisBank
from bridge.config import GatewayConfig, TakeoverConfig
from bridge.gateway import shared_addresses as module
from bridge.gateway.shared_addresses import SharedAddresses
from bridge.net import address_watch
from bridge.stub.keyring import Keyring

SHARED, OTHER = "192.0.2.100", "2001:db8::100"


class Host:
    """Its addresses, and what the sidecar did about them."""

    def __init__(self, shared: SharedAddresses) -> None:
        self.shared = shared
        self.done: list[tuple[str, str]] = []
        self.away = {SHARED, OTHER}
        shared.takeover = SimpleNamespace(  # type: ignore[assignment]
            take=self._take, give_up=self._give_up, is_away=self.away.__contains__, addresses=(SHARED, OTHER)
        )

    async def _take(self, request: dict[str, Any]) -> None:
        self.away.discard(request["address"])
        self.done.append(("take", request["address"]))

    async def _give_up(self, request: dict[str, Any]) -> None:
        self.away.add(request["address"])
        self.done.append(("yield", request["address"]))

    async def news(self, *changes: tuple[str, bool]) -> list[tuple[str, str]]:
        """What is done about these."""
        for address, there in changes:
            self.shared._changed(address, there)
        for _ in range(10):
            await asyncio.sleep(0)
        done, self.done = self.done, []
        return done


@pytest.fixture
async def host(ring: Keyring, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Host]:
    monkeypatch.setattr(module, "RawUdp", lambda **_: SimpleNamespace(close=lambda: None))
    config = GatewayConfig(address="192.0.2.1", takeover=TakeoverConfig((SHARED, OTHER)))
    bank = RedisBank("redis://127.0.0.1:1", ring)
    parts: list[Any] = [SimpleNamespace(tracker=SimpleNamespace()), bank, None, None, SimpleNamespace(endings=None)]
    parts.append(SimpleNamespace(taken_over=None, moving_away=None, dropped=None))
    shared = SharedAddresses(config, *parts)
    made = Host(shared)
    tasks = [asyncio.ensure_future(shared._follow(address)) for address in (SHARED, OTHER)]
    yield made
    for task in tasks:
        task.cancel()
    await bank.close()


def present(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    monkeypatch.setattr(address_watch, "present", lambda: dict.fromkeys(addresses, 2))


def unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> dict[str, int]:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(address_watch, "present", fails)


async def test_an_address_that_comes_is_taken_and_one_that_goes_is_given_up(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    present(monkeypatch, SHARED)
    assert await host.news((SHARED, True)) == [("take", SHARED)]
    assert await host.news((SHARED, True)) == []
    present(monkeypatch)
    assert await host.news((SHARED, False)) == [("yield", SHARED)]
    assert await host.news((SHARED, False)) == []


async def test_an_address_that_moves_to_another_interface_stays(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    present(monkeypatch, SHARED)
    await host.news((SHARED, True))
    assert await host.news((SHARED, False)) == []


async def test_where_the_kernel_does_not_list_its_addresses_nothing_is_given_up(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    present(monkeypatch, SHARED)
    await host.news((SHARED, True))
    unreadable(monkeypatch)
    host.shared._look_now()
    assert await host.news((SHARED, False)) == []
    # news that it came are enough
    assert await host.news((OTHER, True)) == [("take", OTHER)]


async def test_an_address_that_was_taken_by_a_command_and_is_not_here_is_given_up_at_the_next_look(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.away.discard(SHARED)
    present(monkeypatch)
    host.shared._look_now()
    assert await host.news() == [("yield", SHARED)]


class Looks:
    """What the sidecar hears of takeovers, and when it looks whether it lost sessions."""

    def __init__(self, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = host
        self.number = 0
        self.said: dict[str, str] = {}
        self.away = False
        self.delays: list[tuple[float, Callable[[], None]]] = []
        """looks that are put off"""
        monkeypatch.setattr(host.shared.owner, "look", self._look)
        monkeypatch.setattr(host.shared.owner._bank, "posted", self._posted)
        monkeypatch.setattr(asyncio.get_running_loop(), "call_later", self._call_later)

    async def _look(self) -> None:
        self.number += 1

    async def _posted(self, kind: str, address: str) -> bytes | None:
        assert kind == "takeover"
        if self.away:
            raise BankUnavailable("down")
        return self.said[address].encode() if address in self.said else None

    def _call_later(self, delay: float, call: Callable[[], None]) -> SimpleNamespace:
        self.delays.append((delay, call))
        return SimpleNamespace()

    async def news(self, address: str, gateway: str) -> None:
        """A gateway takes sessions at an address."""
        self.said[address] = gateway
        self.host.shared.announced(address)
        await self.host.news()


OWN = "192.0.2.1"
ELSEWHERE = "192.0.2.2"


@pytest.fixture
async def looks(host: Host, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Looks]:
    made = Looks(host, monkeypatch)
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.0)
    tasks = [asyncio.ensure_future(one) for one in (host.shared._look_at_sessions(), host.shared._hear())]
    await host.news()
    yield made
    for task in tasks:
        task.cancel()


async def test_after_its_own_batches_a_gateway_looks_once_whether_others_took_sessions(looks: Looks) -> None:
    for address in (SHARED, SHARED, OTHER, SHARED):
        await looks.news(address, OWN)
    assert looks.number == 0
    [(delay, look)] = looks.delays
    assert delay == module.LOOK_SECONDS
    look()
    await looks.host.news()
    assert looks.number == 1
    await looks.news(SHARED, OWN)
    assert len(looks.delays) == 2


async def test_a_gateway_that_takes_sessions_over_looks_at_once_when_another_one_does(looks: Looks) -> None:
    """Two have the address, and each takes what the other one has."""
    await looks.news(SHARED, OWN)
    await looks.news(SHARED, ELSEWHERE)
    assert looks.number == 1
    # at another address
    await looks.news(SHARED, OWN)
    await looks.news(OTHER, ELSEWHERE)
    assert looks.number == 2
    # this gateway's own word is no news of that address
    await looks.news(SHARED, OWN)
    assert looks.number == 2


async def test_news_of_an_unknown_gateway_are_anothers(looks: Looks) -> None:
    looks.away = True
    await looks.news(SHARED, OWN)
    assert looks.number == 1


def message(kind: int, flags: int = 0, body: bytes = b"") -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, 1, 0) + body


@pytest.mark.parametrize(
    "answer", [message(2, body=struct.pack("=i", -12)), message(3, 0x10)], ids=["an error", "an interrupted list"]
)
def test_an_answer_that_is_no_whole_list_is_an_error(answer: bytes) -> None:
    with pytest.raises(OSError, match="addresses"):
        address_watch._raise_error(answer)
    address_watch._raise_error(message(3))


def test_the_addresses_of_this_host_are_listed() -> None:
    assert "127.0.0.1" in address_watch.present()
