"""Placeholders for addresses in use elsewhere (bridge.charon.placeholders): what the lab does not show."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import pytest

from bridge.charon.ha_channel import ChannelError, HaChannel
from bridge.charon.ha_segments import (
    SegmentChooser,
    keeping_address,
    keeping_segment,
    landing_addresses,
    segment_of,
    waiting_address,
)
from bridge.charon.placeholders import HaPool, Placeholders, ha_pools


def pools(tmp_path: Path, text: str, section: str = "charon") -> list[HaPool]:
    conf = tmp_path / "strongswan.conf"
    conf.write_text(f"{section} {{ plugins {{ ha {{ pools {{\n{text}\n}} }} }} }}\n")
    return ha_pools(conf)


@pytest.mark.parametrize("section", ["charon", "charon-systemd"])
def test_a_pool_is_read_as_charon_reads_it(tmp_path: Path, section: str) -> None:
    [pool] = pools(tmp_path, "clients = 10.20.1.0/24", section)
    assert (pool.name, pool.first, pool.last) == ("clients", "10.20.1.1", "10.20.1.254")
    assert pool.has("10.20.1.7")
    assert not pool.has("10.20.1.255")
    assert not pool.has("fd20::1")
    assert pool.range.size == 254


def test_a_large_pool_is_as_large_as_charon_makes_it(tmp_path: Path) -> None:
    [four, six] = pools(tmp_path, "a = 10.0.0.0/7\nb = fd20::/64")
    assert (four.first, four.last) == ("10.0.0.1", "10.255.255.254")
    assert (six.first, six.last) == ("fd20::1", "fd20::ff:fffe")
    assert six.has("fd20::ff:1")


@pytest.mark.parametrize("text", ["10.20.1.0/30", "10.20.1.0", "10.20.1.0/x", "nowhere/24", ""])
def test_what_charon_takes_for_no_pool_is_none(tmp_path: Path, text: str) -> None:
    assert pools(tmp_path, f"a = {text}") == []


@pytest.mark.parametrize("count", [2, 8, 16])
def test_placeholders_lie_where_no_rebuilt_sa_is_installed(count: int) -> None:
    assert segment_of(keeping_address(count), count) == keeping_segment(count)
    assert segment_of(waiting_address(count), count) != keeping_segment(count)
    assert not {keeping_address(count), waiting_address(count)} & set(landing_addresses(count).values())


def test_the_segment_of_placeholders_is_never_chosen_again() -> None:
    chooser = SegmentChooser(4)
    chooser.spared = keeping_segment(4)
    chosen = set()
    for now in range(20):
        segment = chooser.next(float(now))
        chosen.add(segment)
        chooser.disturbed(segment, float(now), 0.001)
    assert chosen == {1, 2, 3}


class Slow:
    """The HA channel of a charon that takes a message only when told to."""

    version: int | None = 5

    def __init__(self) -> None:
        self.taken = asyncio.Event()

    async def send(self, messages: Iterable[bytes]) -> None:
        list(messages)
        await self.taken.wait()

    async def drained(self) -> None: ...


@pytest.mark.parametrize("other", ["release", "hand_over", "reset"])
def test_an_address_that_two_tasks_let_go_of_is_free_once(other: str) -> None:
    async def work() -> None:
        channel = Slow()
        channel.taken.set()
        placeholders = Placeholders(cast(HaChannel, channel), 8)
        await placeholders.put({"10.20.1.1": "rw"}, 0.0)
        channel.taken.clear()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(placeholders.hand_over(["10.20.1.1"]))
            if other != "reset":
                tasks.create_task(getattr(placeholders, other)(["10.20.1.1"]))
            await asyncio.sleep(0)
            if other == "reset":
                placeholders.reset()
            channel.taken.set()
        assert len(placeholders) == 0
        assert placeholders.spis == set()

    asyncio.run(work())


def test_an_address_that_is_kept_again_meanwhile_stays_kept() -> None:
    async def work() -> None:
        channel = Slow()
        channel.taken.set()
        placeholders = Placeholders(cast(HaChannel, channel), 8)
        await placeholders.put({"10.20.1.1": "rw"}, 0.0)
        channel.taken.clear()
        release = asyncio.create_task(placeholders.release(["10.20.1.1"]))
        await asyncio.sleep(0)
        placeholders.reset()
        channel.taken.set()
        await placeholders.put({"10.20.1.1": "rw"}, 1.0)
        await release
        assert placeholders.addresses == {"10.20.1.1"}
        assert len(placeholders.spis) == 1

    asyncio.run(work())


def test_without_a_charon_whose_release_is_known_nothing_is_kept() -> None:
    channel = Slow()
    channel.version = None
    placeholders = Placeholders(cast(HaChannel, channel), 8)
    with pytest.raises(ChannelError):
        asyncio.run(placeholders.open())
