"""Which sessions were open, as the file has it (bridge.gateway.session_journal)."""

from __future__ import annotations

from pathlib import Path

from bridge.gateway.session_journal import FILE, SessionJournal


def facts(name: str) -> dict[str, object]:
    return {"session": name, "virtual_ips": ["10.20.0.7"]}


def names(directory: Path) -> list[str]:
    return [name for name, _ in SessionJournal(directory).before()]


async def test_what_could_not_be_written_once_is_written_later(tmp_path: Path) -> None:
    state = tmp_path / "state"
    journal = SessionJournal(state)
    journal.begin("first", facts("first"))
    await journal.write()
    (state / FILE).rename(tmp_path / "kept")
    state.rmdir()
    state.write_text("in the way of the folder")
    journal.end("first")
    journal.begin("second", facts("second"))
    await journal.write()
    state.unlink()
    state.mkdir()
    (tmp_path / "kept").rename(state / FILE)
    await journal.write()
    assert names(state) == ["second"]


async def test_a_line_that_was_torn_takes_no_other_with_it(tmp_path: Path) -> None:
    journal = SessionJournal(tmp_path)
    journal.begin("first", facts("first"))
    await journal.write()
    with (tmp_path / FILE).open("a") as file:
        file.write('{"ended": "fi')
    journal = SessionJournal(tmp_path)
    journal.begin("second", facts("second"))
    await journal.write()
    assert names(tmp_path) == ["first", "second"]
