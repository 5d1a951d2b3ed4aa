"""Placeholders for addresses in use elsewhere (bridge.charon.placeholders): what the lab does not show."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridge.charon.ha_segments import (
    SegmentChooser,
    keeping_address,
    keeping_segment,
    landing_addresses,
    segment_of,
    waiting_address,
)
from bridge.charon.placeholders import HaPool, ha_pools


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
