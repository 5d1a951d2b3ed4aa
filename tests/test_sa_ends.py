"""charon is asked to end IKE_SAs (bridge.charon.sa_ends), without root and without a lab: charon answers from memory,
and the clock does not pass by itself. With a real charon: test_session_elsewhere, test_drain_many."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import cast

import pytest

from bank_support import stub_of
from bridge.charon.ha_channel import ChannelError
from bridge.charon.ike_sa import IkeSa, sa_of
from bridge.charon.sa_ends import ENDING_AT_ONCE, SaEnds
from bridge.charon.vici_client import ViciClient
from bridge.charon.vici_types import SaInfo, ViciError
from bridge.stub.types import Endpoint
from role_support import FakeTime, fake_charon

END_SECONDS, LIST_SECONDS = 0.01, 1.0


class Scene:
    """A charon with IKE_SAs, each known to the tracker."""

    def __init__(self, loop: FakeTime, sas: int) -> None:
        self.loop = loop
        self.tracker = fake_charon("home")[0].tracker
        self.same = True
        self.ends = SaEnds(self.tracker, cast(ViciClient, self), lambda: self.same)
        self.sas = [sa_of(stub_of(number.to_bytes(8))) for number in range(1, sas + 1)]
        for sa in self.sas:
            self.tracker.adopt(sa)
        self.has = {str(number): sa.id.spis for number, sa in enumerate(self.sas, start=100)}
        """what charon has, by unique ID"""
        self.ended: list[bytes] = []
        self.lists = self.connections = 0
        self.now = self.most = 0
        """ends under way, and the most of them at a time"""
        self.breaks_at: bytes | None = None
        """the connection breaks when this one is to be ended"""
        self.list_error: ViciError | None = None
        self.answers: asyncio.Event | None = None
        """when charon has ended what it was asked to, instead of after END_SECONDS"""

    def known(self) -> None:
        """The sidecar knows charon's unique ID of each."""
        for unique_id, spis in self.has.items():
            self.tracker.sas[spis].unique_id = unique_id

    # what charon answers over VICI

    async def each_sas(self, take: Callable[[list[SaInfo]], None]) -> float:
        self.lists += 1
        listed = dict(self.has)
        await asyncio.sleep(LIST_SECONDS)
        if self.list_error is not None:
            raise self.list_error
        here = Endpoint("192.0.2.1", 4500)
        for unique_id, spis in listed.items():
            ids = ("gw", "peer", "", unique_id)
            info = SaInfo(
                "home", spis[:8], spis[8:], False, 2, "ESTABLISHED", here, here, (), (), 0, None, None, (), *ids
            )
            take([info])
        return 0.0

    @asynccontextmanager
    async def ending(self, same: Callable[[], bool]) -> AsyncIterator[Callable[[str], Awaitable[str]]]:
        self.connections += 1
        if not same():
            raise ViciError("terminate: charon was restarted")

        async def end_sa(unique_id: str) -> str:
            self.now += 1
            self.most = max(self.most, self.now)
            try:
                await (asyncio.sleep(END_SECONDS) if self.answers is None else self.answers.wait())
            finally:
                self.now -= 1
            spis = self.has.get(unique_id)
            if spis is None:
                return "no matching SAs to terminate found"
            if spis == self.breaks_at:
                self.breaks_at = None
                raise ViciError("terminate: charon closed the connection")
            del self.has[unique_id]
            self.ended.append(spis)
            return ""

        yield end_sa

    async def end_all(self, *sas: IkeSa) -> list[bool | BaseException]:
        return await asyncio.gather(*(self.ends.end(sa.id.spis) for sa in sas or self.sas), return_exceptions=True)


def test_what_is_known_by_its_unique_id_is_ended_without_another_look(loop: FakeTime) -> None:
    scene = Scene(loop, 100)
    scene.known()
    began = loop.time()
    assert loop.run(scene.end_all()) == [True] * 100
    assert (scene.lists, scene.connections, scene.most) == (0, ENDING_AT_ONCE, ENDING_AT_ONCE)
    assert loop.time() - began == pytest.approx(100 / ENDING_AT_ONCE * END_SECONDS)
    assert not scene.has


def test_one_list_serves_all_that_were_rebuilt_since_the_last_comparison_and_those_that_are_ended_next(
    loop: FakeTime,
) -> None:
    scene = Scene(loop, 100)
    assert loop.run(scene.end_all(*scene.sas[:50])) == [True] * 50
    assert loop.run(scene.end_all(*scene.sas[50:])) == [True] * 50
    assert scene.lists == 1


def test_what_is_known_does_not_wait_for_the_list(loop: FakeTime) -> None:
    scene = Scene(loop, 2)
    unknown, known = scene.sas
    scene.known()
    unknown.unique_id = ""
    both = asyncio.ensure_future(scene.end_all(), loop=loop)
    loop.pass_time(LIST_SECONDS / 2)
    assert scene.ended == [known.id.spis]
    assert loop.run_until_complete(both) == [True, True]


def test_one_that_was_installed_once_more_is_found_under_its_new_unique_id(loop: FakeTime) -> None:
    scene = Scene(loop, 1)
    scene.known()
    scene.has = {"7": scene.sas[0].id.spis}
    assert loop.run(scene.end_all()) == [True]
    assert scene.lists == 1


@pytest.mark.parametrize("known", [True, False])
def test_charon_does_not_have_one_that_has_ended(loop: FakeTime, known: bool) -> None:
    scene = Scene(loop, 2)
    if known:
        scene.known()
    del scene.has["100"]
    assert loop.run(scene.end_all()) == [False, True]


def test_two_that_ask_for_one_have_it_ended_once(loop: FakeTime) -> None:
    scene = Scene(loop, 1)
    scene.known()
    assert loop.run(scene.end_all(*scene.sas, *scene.sas)) == [True, True]
    assert len(scene.ended) == 1


def test_nothing_is_ended_in_a_charon_that_was_restarted_and_gives_the_ids_to_others(loop: FakeTime) -> None:
    scene = Scene(loop, 20)
    scene.known()
    scene.same = False
    results = loop.run(scene.end_all())
    assert all(isinstance(result, ViciError) for result in results)
    assert scene.ended == []
    assert scene.connections <= ENDING_AT_ONCE
    # what is asked later is asked again
    scene.same = True
    assert loop.run(scene.end_all()) == [True] * 20


def test_a_connection_that_breaks_fails_one_and_the_rest_goes_over_another(loop: FakeTime) -> None:
    scene = Scene(loop, 20)
    scene.known()
    scene.breaks_at = scene.sas[3].id.spis
    results = loop.run(scene.end_all())
    assert [isinstance(result, ViciError) for result in results].index(True) == 3
    assert results.count(True) == 19


def test_a_list_that_fails_fails_all_that_wait_for_it(loop: FakeTime) -> None:
    scene = Scene(loop, 3)
    scene.list_error = ViciError("list-sas: charon is gone")
    assert all(isinstance(result, ViciError) for result in loop.run(scene.end_all()))
    scene.list_error = None
    assert loop.run(scene.end_all()) == [True] * 3


@pytest.mark.parametrize("known", [True, False])
def test_a_sidecar_that_stops_leaves_none_that_asked_waiting(loop: FakeTime, known: bool) -> None:
    scene = Scene(loop, 10)
    if known:
        scene.known()
    asking = asyncio.ensure_future(scene.end_all(), loop=loop)
    loop.pass_time(END_SECONDS / 2)
    loop.run(scene.ends.close())
    assert all(isinstance(result, ViciError) for result in loop.run_until_complete(asking))


def test_one_that_is_asked_for_while_all_workers_finish_is_ended(loop: FakeTime) -> None:
    scene = Scene(loop, ENDING_AT_ONCE + 1)
    scene.known()

    async def ask() -> bool:
        scene.answers = asyncio.Event()
        workers = asyncio.ensure_future(scene.end_all(*scene.sas[:-1]))
        await asyncio.sleep(END_SECONDS)
        assert scene.now == ENDING_AT_ONCE

        async def ask_after_them() -> bool:
            assert scene.answers is not None
            await scene.answers.wait()
            return await scene.ends.end(scene.sas[-1].id.spis)

        last = asyncio.ensure_future(ask_after_them())
        await asyncio.sleep(0)
        # all of them go on in one pass of the event loop
        scene.answers.set()
        assert await workers == [True] * ENDING_AT_ONCE
        return await asyncio.wait_for(last, 1.0)

    assert loop.run(ask())
    assert not scene.has


def test_a_sidecar_that_stops_takes_no_ike_sa_from_charon_without_a_delete(loop: FakeTime) -> None:
    """VICI is there: that the sidecar asks charon nothing more is no reason to remove it over the HA channel."""
    scene = Scene(loop, 2)
    scene.known()
    under_way, later = scene.sas
    charon, installer, _ = fake_charon("home")
    charon.tracker, charon.ends = scene.tracker, scene.ends
    ending = asyncio.ensure_future(charon.end_surely(under_way), loop=loop)
    loop.pass_time(END_SECONDS / 2)
    loop.run(scene.ends.close())
    for work in (ending, charon.end_surely(later)):
        with pytest.raises(ChannelError, match="stops"):
            loop.run_until_complete(work)
    loop.pass_time(END_SECONDS)
    assert (installer.deleted, scene.ended) == ([], [])
    assert set(scene.tracker.sas) == {sa.id.spis for sa in scene.sas}


def test_a_task_that_asked_and_was_cancelled_keeps_no_end_from_happening(loop: FakeTime) -> None:
    scene = Scene(loop, 1)
    scene.known()
    asking = asyncio.ensure_future(scene.end_all(), loop=loop)
    loop.pass_time(END_SECONDS / 2)
    asking.cancel()
    loop.pass_time(END_SECONDS)
    assert len(scene.ended) == 1
