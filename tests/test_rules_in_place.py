"""Whether rules have been in place since a moment (bridge.net.rules_watch), with a packet filter in memory: where there
is a doubt, the answer is no."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import structlog

from bridge.charon.ha_rules import HaRules
from bridge.config import HaConfig
from bridge.net import firewall, rules_watch
from bridge.net.firewall import Placed, RulesError, View
from bridge.net.owner_rules import rules
from bridge.net.rules_watch import IN_FORCE_SECONDS, RulesWatch
from bridge.service import process
from bridge.service.process import retry
from bridge.service.tasks import end, spawn

OURS = ("table inet ike-sa-sync-ha",)


class Filter:
    """The packet filter of a host, and its clock."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.lines: tuple[str, ...] = ()
        self.broken = False
        self.looks = 0
        patch.setattr(firewall, "install", self.install)
        patch.setattr(firewall, "look", self.look)
        patch.setattr(firewall, "remove", lambda _: None)
        patch.setattr(rules_watch, "time", SimpleNamespace(monotonic=lambda: self.now))
        patch.setattr(asyncio, "to_thread", self.inline)
        self.watch = RulesWatch("ha", rules(("127.0.0.1", "127.0.0.2"), 4510), "auto")

    async def inline(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return work(*arguments)

    def install(self, *_: object, **__: object) -> Placed:
        self.lines = OURS
        return Placed("nftables")

    def look(self, *_: object) -> View:
        self.looks += 1
        if self.broken:
            raise RulesError("nft does not run")
        return View(self.lines, ())

    async def since(self, moment: float) -> bool:
        """Asked a minute after they were set."""
        self.now = 1060.0
        return await self.watch.in_place_since(moment)


@pytest.fixture
def packets(monkeypatch: pytest.MonkeyPatch) -> Filter:
    return Filter(monkeypatch)


async def test_rules_that_were_set_before_and_are_there_now_were_in_place(packets: Filter) -> None:
    packets.watch.place()
    assert await packets.since(1000 + IN_FORCE_SECONDS)


@pytest.mark.parametrize("moment", [990.0, 1000.0, 1000 + IN_FORCE_SECONDS - 0.1])
async def test_what_came_before_they_were_in_force_may_be_from_anyone(packets: Filter, moment: float) -> None:
    packets.watch.place()
    looks = packets.looks
    assert not await packets.since(moment)
    assert packets.looks == looks


async def test_rules_that_were_never_set_are_not_in_place(packets: Filter) -> None:
    assert not await packets.since(1030.0)


@pytest.mark.parametrize("lines", [(), (*OURS, "flags dormant")], ids=["flushed", "altered"])
async def test_rules_that_are_lost_and_not_missed_yet_are_not_in_place(packets: Filter, lines: tuple[str, ...]) -> None:
    packets.watch.place()
    packets.lines = lines
    assert not await packets.since(1030.0)
    # it is asked once: any user can send now, and each datagram would cost a look
    looks = packets.looks
    assert not await packets.since(1030.0)
    assert packets.looks == looks
    packets.lines = OURS
    assert not await packets.since(1030.0)


async def test_rules_that_were_lost_and_put_back_count_from_then_on(packets: Filter) -> None:
    packets.watch.place()
    packets.lines, packets.now = (), 1020.0
    await packets.watch._look()
    assert packets.watch.restored == 1
    assert not await packets.since(1010.0)
    assert await packets.since(1030.0)


async def test_no_rules_at_all_are_never_those_that_were_set(packets: Filter, monkeypatch: pytest.MonkeyPatch) -> None:
    # they were flushed between their setting and the first look
    monkeypatch.setattr(firewall, "install", lambda *_, **__: Placed("nftables"))
    packets.watch.place()
    assert not await packets.since(1030.0)


async def test_rules_that_cannot_be_looked_at_are_not_in_place(packets: Filter) -> None:
    packets.watch.place()
    packets.broken = True
    assert not await packets.since(1030.0)


async def test_rules_that_are_lost_while_they_are_looked_at_are_not_in_place(
    packets: Filter, monkeypatch: pytest.MonkeyPatch
) -> None:
    packets.watch.place()

    async def meanwhile(work: Callable[..., Any], *arguments: Any) -> Any:
        # the watch found them lost, and has put them back
        packets.watch.place()
        return work(*arguments)

    packets.now = 1030.0
    monkeypatch.setattr(asyncio, "to_thread", meanwhile)
    assert not await packets.since(1020.0)


async def test_rules_that_were_removed_are_not_in_place(packets: Filter) -> None:
    packets.watch.place()
    packets.watch.remove()
    assert not await packets.since(1030.0)


async def test_rules_of_the_administrators_are_not_vouched_for(packets: Filter) -> None:
    assert not await HaRules(HaConfig(rules="external")).in_place_since(1030.0)


async def test_rules_that_are_put_back_while_the_watch_ends_are_set_by_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else they would be set after their removal, or over others that came in their place."""
    begun, go_on = threading.Event(), threading.Event()
    happened: list[str] = []

    def install(*_: object, **__: object) -> Placed:
        begun.set()
        go_on.wait()
        happened.append("set")
        return Placed("nftables")

    monkeypatch.setattr(firewall, "look", lambda *_: View((), ()))
    monkeypatch.setattr(firewall, "remove", lambda _: happened.append("removed"))
    monkeypatch.setattr(firewall, "install", lambda *_, **__: Placed("nftables"))
    watch = RulesWatch("ha", rules(("127.0.0.1", "127.0.0.2"), 4510), "auto")
    watch.place()
    watch._expected = OURS
    monkeypatch.setattr(firewall, "install", install)
    watch.look_now()
    watching = spawn("rules", watch.run())
    await asyncio.to_thread(begun.wait)
    ending = spawn("end", end(watching))
    async with asyncio.timeout(10):
        while watching.cancelling() < 2:  # noqa: ASYNC110 - how often it was cancelled
            await asyncio.sleep(0.01)
    assert not ending.done()
    go_on.set()
    await ending
    watch.remove()
    assert happened == ["set", "removed"]


@pytest.mark.parametrize("again", [False, True], ids=["cancelled", "cancelled-twice"])
@pytest.mark.parametrize("known", [True, False], ids=["no-rules", "defect"])
async def test_an_error_that_comes_after_the_cancellation_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, *, again: bool, known: bool
) -> None:
    """Nobody would know that the rules are not there, nor of a defect."""
    begun, go_on = threading.Event(), threading.Event()

    def install(*_: object, **__: object) -> Placed:
        begun.set()
        go_on.wait()
        raise RulesError("it is locked") if known else ZeroDivisionError

    monkeypatch.setattr(firewall, "install", install)
    watch = RulesWatch("ha", rules(("127.0.0.1", "127.0.0.2"), 4510), "auto")
    watch.in_place = True
    placing = asyncio.ensure_future(watch.place_aside())
    await asyncio.to_thread(begun.wait)
    with structlog.testing.capture_logs() as events:
        placing.cancel()
        await asyncio.wait([placing], timeout=0)
        if again:
            placing.cancel()
            await asyncio.wait([placing], timeout=0)
        assert not placing.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError if known else ZeroDivisionError):
            await placing
    told = [(event["event"], event["rules"], event["reason"]) for event in events]
    assert told == ([("rules-not-restored", "ha", "it is locked")] if known else [])
    assert watch.in_place is not known


async def test_an_error_without_a_cancellation_is_its_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    def install(*_: object, **__: object) -> Placed:
        raise RulesError("it is locked")

    monkeypatch.setattr(firewall, "install", install)
    watch = RulesWatch("ha", rules(("127.0.0.1", "127.0.0.2"), 4510), "auto")
    with structlog.testing.capture_logs() as events, pytest.raises(RulesError):
        await watch.place_aside()
    assert events == []


async def test_the_event_loop_goes_on_while_rules_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(firewall, "install", lambda *_, **__: go_on.wait() and Placed("nftables"))
    monkeypatch.setattr(firewall, "look", lambda *_: View(OURS, ()))
    watch = RulesWatch("ha", rules(("127.0.0.1", "127.0.0.2"), 4510), "auto")
    asyncio.get_running_loop().call_soon(go_on.set)
    await retry("rules", watch.place_aside, RulesError)
    assert watch.in_place


async def test_rules_that_cannot_be_set_are_tried_again_until_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "RETRY_SECONDS", 0.01)
    locked = [True, True]

    def install(*_: object, **__: object) -> Placed:
        if locked:
            locked.pop()
            raise RulesError("it is locked")
        return Placed("nftables")

    monkeypatch.setattr(firewall, "install", install)
    monkeypatch.setattr(firewall, "look", lambda *_: View(OURS, ()))
    watch = RulesWatch("ha", rules(("127.0.0.1", "127.0.0.2"), 4510), "auto")
    await retry("rules", watch.place_aside, RulesError)
    assert (locked, watch.in_place) == ([], True)
