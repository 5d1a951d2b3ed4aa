"""Which sessions ended, as a gateway remembers it (bridge.gateway.endings)."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from bank_support import GATEWAY
from bridge.gateway import endings as module
from bridge.gateway.endings import FILE, MARGIN_SECONDS, Endings
from bridge.stub.stub import Index

NOW = 1_800_000_000


def index(number: int) -> Index:
    return Index(GATEWAY, number.to_bytes(8))


class Clock:
    now = float(NOW)

    def __call__(self) -> float:
        return self.now


def test_an_end_is_remembered_for_as_long_as_a_stub_of_the_session_could_live() -> None:
    clock = Clock()
    endings = Endings(wall=clock)
    endings.add(index(1), NOW + 100)
    clock.now = NOW + 100
    assert index(1) in endings
    assert index(2) not in endings
    clock.now = NOW + 100 + MARGIN_SECONDS + 1
    assert index(1) not in endings
    assert list(endings.all()) == []


def test_the_later_of_two_expiries_counts() -> None:
    clock = Clock()
    endings = Endings(wall=clock)
    endings.add(index(1), NOW + 1000)
    endings.add(index(1), NOW + 10)
    clock.now = NOW + 900
    assert index(1) in endings


async def test_a_restart_remembers_what_ended(tmp_path: Path) -> None:
    clock = Clock()
    before = Endings(tmp_path / "state", wall=clock)
    six = Index("2001:db8::1", b"\xff" * 8)
    before.add(index(1), NOW + 100)
    before.add(six, NOW + 1000)
    await before.close()
    assert stat.S_IMODE((tmp_path / "state" / FILE).stat().st_mode) == 0o600
    after = Endings(tmp_path / "state", wall=clock)
    assert index(1) in after
    assert six in after
    clock.now = NOW + 500
    assert [ending.index for ending in Endings(tmp_path / "state", wall=clock).all()] == [six]


async def test_a_line_that_was_cut_costs_no_other(tmp_path: Path) -> None:
    file = tmp_path / FILE
    file.write_bytes(f"{NOW + 9} {GATEWAY} {'0' * 15}1\n\xff junk\n{NOW + 9} {GATEWAY}".encode("latin-1"))
    assert [ending.index for ending in Endings(tmp_path, wall=Clock()).all()] == [index(1)]


async def test_the_file_does_not_grow_with_what_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COMPACT_LINES", 10)
    clock = Clock()
    endings = Endings(tmp_path, wall=clock)
    for number in range(200):
        endings.add(index(number), NOW + number)
        clock.now = NOW + number
        await endings.close()
    lines = (tmp_path / FILE).read_text().splitlines()
    assert len(lines) <= 2 * MARGIN_SECONDS + 20
    assert index(199) in Endings(tmp_path, wall=clock)


async def test_a_folder_that_cannot_be_written_costs_the_memory_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    endings = Endings(tmp_path / "file", wall=Clock())
    endings.add(index(1), NOW + 100)
    await endings.close()
    assert index(1) in endings


def test_what_was_added_first_is_forgotten_first_where_there_is_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ENDINGS_MAX", 10)
    endings = Endings(wall=Clock())
    for number in range(11):
        endings.add(index(number), NOW + 1000)
    assert [ending.index for ending in endings.all()] == [index(number) for number in range(10, 1, -1)]
    assert endings.latest(2) == [index(10), index(9)]


def test_what_a_bank_may_have_forgotten_by_itself_is_not_asked_of_it() -> None:
    endings = Endings(wall=Clock())
    endings.add(index(1), NOW + MARGIN_SECONDS - 1)
    endings.add(index(2), NOW + 1000)
    assert endings.latest(5) == [index(2)]


async def test_the_epoch_of_a_session_at_a_shared_address_outlives_a_restart(tmp_path: Path) -> None:
    """Without it, repeating the end would delete the session of a gateway that has taken it over since."""
    endings = Endings(tmp_path, wall=Clock())
    endings.add(index(1), NOW + 100, 3)
    endings.add(index(2), NOW + 100)
    await endings.close()
    again = Endings(tmp_path, wall=Clock())
    assert {ending.index: ending.epoch for ending in again.all()} == {index(1): 3, index(2): 0}
    again.remove(index(1))
    assert again.epoch(index(1)) == 0


async def test_what_could_not_be_written_once_is_written_later(tmp_path: Path) -> None:
    state, clock = tmp_path / "state", Clock()
    state.write_text("in the way of the folder")
    before = Endings(state, wall=clock)
    before.add(index(1), NOW + 100)
    before.add(index(2), NOW + 100)
    await before.close()
    before.remove(index(2))
    await before.close()
    state.unlink()
    await before.close()
    after = Endings(state, wall=clock)
    assert index(1) in after
    assert index(2) not in after


async def test_a_line_that_was_torn_takes_no_other_with_it(tmp_path: Path) -> None:
    clock = Clock()
    before = Endings(tmp_path, wall=clock)
    before.add(index(1), NOW + 100)
    await before.close()
    with (tmp_path / FILE).open("a") as file:
        file.write(f"{NOW + 100} {GATEWAY} 00")
    between = Endings(tmp_path, wall=clock)
    between.add(index(2), NOW + 100)
    await between.close()
    after = Endings(tmp_path, wall=clock)
    assert [index(number) in after for number in (1, 2)] == [True, True]
