"""Where a session may go (bridge.client.candidates, sync_request): names, and hosts that lack an address family."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bridge.charon.charon import Charon
from bridge.charon.vpns import Vpn
from bridge.client import sync_request
from bridge.client.candidates import KNOWN_SECONDS, RESOLVE_SECONDS, Candidates
from bridge.client.race import first_answer
from bridge.client.sessions import Sessions
from bridge.client.sync_request import Answer, NoAnswerError, Target
from bridge.config import GatewayEntry

NAME = "vpn.example.org"
VPN = Vpn("default", (GatewayEntry(NAME, "home"), GatewayEntry("192.0.2.9", "home")), True)
FOUND = [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("192.0.2.1", 0))]


class Resolver:
    """What getaddrinfo does: answers, or waits until `answers` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers = asyncio.Event()
        self.asked = 0
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", self.getaddrinfo, raising=False)

    async def getaddrinfo(self, *_: Any, **__: Any) -> list[Any]:
        self.asked += 1
        await self.answers.wait()
        return FOUND


def candidates() -> Candidates:
    charon = SimpleNamespace(connection=lambda _: SimpleNamespace(local_addresses=()))
    return Candidates(cast(Charon, charon), cast(Sessions, []))


async def _took(work: Awaitable[None]) -> float:
    clock = asyncio.get_running_loop().time
    began = clock()
    await work
    return clock() - began


def run(monkeypatch: pytest.MonkeyPatch, work: Callable[[Resolver], Awaitable[None]]) -> None:
    async def main() -> None:
        # the default loop's getaddrinfo can be replaced
        with monkeypatch.context() as patched:
            await work(Resolver(patched))

    asyncio.run(main())


def test_a_resolver_that_is_away_holds_nobody_up_whose_gateways_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(resolver: Resolver) -> None:
        resolver.answers.set()
        mine = candidates()
        await mine.resolve(VPN)
        resolver.answers.clear()
        took = await _took(mine.resolve(VPN))
        assert KNOWN_SECONDS * 0.9 <= took < RESOLVE_SECONDS
        assert mine.addresses(VPN) == {"192.0.2.1", "192.0.2.9"}
        # and a thread waits for it only once
        await mine.resolve(VPN)
        assert resolver.asked == 2
        await mine.close()

    run(monkeypatch, work)


def test_a_name_of_which_nothing_is_known_is_waited_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(resolver: Resolver) -> None:
        mine = candidates()
        assert await _took(mine.resolve(VPN)) >= RESOLVE_SECONDS * 0.9
        assert mine.addresses(VPN) == {"192.0.2.9"}
        resolver.answers.set()
        # what was asked then has been answered by the next attempt
        await mine.resolve(VPN)
        assert mine.addresses(VPN) == {"192.0.2.1", "192.0.2.9"}

    run(monkeypatch, work)


@pytest.mark.parametrize("sources", [(), ("2001:db8::7",)])
def test_a_host_without_ipv6_has_no_address_towards_a_gateway_with_it(
    monkeypatch: pytest.MonkeyPatch, sources: tuple[str, ...]
) -> None:
    real = socket.socket

    def without_ipv6(family: int, *arguments: Any) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return real(family, *arguments)

    monkeypatch.setattr(socket, "socket", without_ipv6)
    assert sync_request._source_address(Target("2001:db8::1", "home", sources)) is None
    assert sync_request._source_address(Target("127.0.0.1", "home", ())) == "127.0.0.1"


@pytest.mark.parametrize("first", [True, False])
def test_one_gateway_that_this_host_cannot_ask_keeps_no_other_from_answering(first: bool) -> None:
    good, bad = Target("192.0.2.1", "home", ()), Target("192.0.2.2", "home", ())
    answer = cast(Answer, object())

    async def ask(gateway: Target) -> Answer:
        if gateway is bad:
            raise OSError(errno.EMFILE, "Too many open files")
        await asyncio.sleep(0.01)
        return answer

    order = [bad, good] if first else [good, bad]
    assert asyncio.run(first_answer(order, ask, lambda _: None, 1.0)) == (good, answer)
    with pytest.raises(NoAnswerError):
        asyncio.run(first_answer([bad], ask, lambda _: None, 1.0))
