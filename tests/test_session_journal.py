"""Which sessions were open, as the file has it (bridge.gateway.session_journal)."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from bridge.gateway import session_journal
from bridge.gateway.session_journal import FILE, SessionJournal


def facts(name: str) -> dict[str, object]:
    return {"session": name, "virtual_ips": ["10.20.0.7"]}


def names(directory: Path) -> list[str]:
    return [name for name, _ in SessionJournal(directory).before()]


async def test_what_could_not_be_written_once_is_written_later(tmp_path: Path) -> None:
    state = tmp_path / "state"
    journal = SessionJournal(state)
    await journal.begin("first", facts("first"))
    (state / FILE).rename(tmp_path / "kept")
    state.rmdir()
    state.write_text("in the way of the folder")
    journal.ended("first")
    await journal.begin("second", facts("second"))
    await journal.write()
    state.unlink()
    state.mkdir()
    (tmp_path / "kept").rename(state / FILE)
    await journal.write()
    assert names(state) == ["second"]


async def test_a_line_that_was_torn_takes_no_other_with_it(tmp_path: Path) -> None:
    journal = SessionJournal(tmp_path)
    await journal.begin("first", facts("first"))
    with (tmp_path / FILE).open("a") as file:
        file.write('{"ended": "fi')
    journal = SessionJournal(tmp_path)
    await journal.begin("second", facts("second"))
    assert names(tmp_path) == ["first", "second"]


async def test_what_was_told_and_not_told_stays_that_when_the_file_is_written_again(tmp_path: Path) -> None:
    journal = SessionJournal(tmp_path)
    await journal.begin("told", facts("told"))
    await journal.begin("untold", facts("untold"))
    journal.told("told", facts("told"))
    journal.told("never begun", facts("never begun"))
    await journal.write()
    # all of it is written again after a failure
    journal._failed = True
    await journal.write()
    for again in (SessionJournal(tmp_path), journal):
        assert "told" in again
        assert "never begun" not in again
    assert "untold" not in SessionJournal(tmp_path)
    assert dict(SessionJournal(tmp_path).before()) == {"told": facts("told"), "untold": facts("untold")}


async def test_a_session_whose_end_is_under_way_is_in_the_file_and_is_not_open(tmp_path: Path) -> None:
    journal = SessionJournal(tmp_path)
    await journal.begin("it", facts("it"))
    journal.ending("it")
    await journal.write()
    assert "it" not in journal
    assert names(tmp_path) == ["it"]
    journal.ended("it")
    await journal.write()
    assert names(tmp_path) == []


async def test_beginnings_at_a_time_share_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    def append(path: Path, text: str) -> None:
        written.append(text)

    monkeypatch.setattr(session_journal, "append", append)
    journal = SessionJournal(tmp_path)
    await asyncio.gather(*(journal.begin(str(number), facts(str(number))) for number in range(8)))
    # the first goes alone, the others wait for it together
    assert [text.count("\n") for text in written] == [1, 7]
