"""The fence of shared addresses, where the packet filter refuses (bridge.gateway.fence)."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

import pytest

from bridge.config import InterceptConfig
from bridge.gateway import fence as module
from bridge.gateway.fence import Fence
from bridge.net import firewall
from bridge.net.firewall import RulesError
from net_support import until

SHARED = "192.0.2.100"


class Filter:
    """A packet filter; it refuses the next `refuses` changes."""

    def __init__(self) -> None:
        self.rules: str | None = None
        self.refuses = 0

    def _change(self, rules: str | None) -> None:
        if self.refuses:
            self.refuses -= 1
            raise RulesError("it is locked")
        self.rules = rules


@pytest.fixture
def packet_filter(monkeypatch: pytest.MonkeyPatch) -> Filter:
    made = Filter()

    class Watch:
        in_place = True

        def __init__(self, about: str, rules: Any, *_: Any, **__: Any) -> None:
            self._rules = rules

        def place(self) -> None:
            made._change(self._rules.nftables)

        def counted(self, _: str) -> int:
            return 0

        async def run(self) -> None:
            await asyncio.Event().wait()

    monkeypatch.setattr(module, "RulesWatch", Watch)
    monkeypatch.setattr(firewall, "remove", lambda _: made._change(None))
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.01)
    return made


async def until_in_place(fence: Fence) -> None:
    await until(lambda: fence.in_place)


@pytest.mark.parametrize("addresses", [{SHARED}, set()], ids=["set", "removed"])
async def test_a_change_that_is_refused_is_tried_again(packet_filter: Filter, addresses: Collection[str]) -> None:
    fence = Fence(InterceptConfig())
    await fence.around({SHARED} - set(addresses))
    packet_filter.refuses = 2
    await fence.around(addresses)
    assert not fence.in_place
    await until_in_place(fence)
    assert (packet_filter.rules is not None) is (SHARED in addresses)
    await fence.close()


async def test_the_last_change_counts_also_while_another_one_is_tried_again(packet_filter: Filter) -> None:
    fence = Fence(InterceptConfig())
    packet_filter.refuses = 1
    await fence.around({SHARED})
    await fence.around(set())
    await until_in_place(fence)
    await asyncio.sleep(0.05)
    assert packet_filter.rules is None
    await fence.close()
