"""What `ike-sa-sync status` and `monitor` show of sessions that were taken over, and `yield` of what went wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bridge.cli import commands, monitor
from bridge.cli.takeover import yield_
from bridge.service import control

ROW: dict[str, Any] = {
    "address": "192.0.2.100",
    "state": "here",
    "sessions": 12,
    "taken_over": 9,
    "last": {
        "left": 1,
        "not_taken": [{"reason": "its identity is locked out", "sessions": 2}],
        "failures": [{"identity": "alice@example", "address": "198.51.100.7", "reason": "its identity is locked out"}],
    },
}


def test_status_names_who_was_not_taken_over_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    commands._print_shared(ROW)
    assert capsys.readouterr().out.splitlines() == [
        "shared      192.0.2.100: here, 12 sessions, 9 of them taken over",
        "  2 not taken over: its identity is locked out",
        "    alice@example at 198.51.100.7: its identity is locked out",
        "  1 left to their clients, which answer no request",
    ]


def test_the_sessions_of_status_say_which_of_them_were_taken_over(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"connection": "gw", "remote": "198.51.100.7", "remote_id": "alice", "virtual_ips": [], "children": ["net"]}
    commands._print_sas([row | {"expires": 100, "resumable": True, "taken_over": True}], 0)
    assert "yes, taken over" in " ".join(capsys.readouterr().out.split())


def test_monitor_counts_them_beside_each_gateway() -> None:
    notes = monitor._notes({"reasons": {}, "taken_over": 9, "not_taken_over": 2, "duplicate_addresses": 0})
    assert str(notes) == " 9 taken over 2 not taken over"


@pytest.mark.parametrize(("stored", "fenced", "code"), [(True, True, 0), (False, True, 1), (True, False, 1)])
def test_yield_says_what_the_bank_or_the_packet_filter_did_not_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: bool, fenced: bool, code: int
) -> None:
    async def answer(*_: Any) -> control.Answer:
        return {"address": "192.0.2.100", "state": "away", "sessions": 1, "stored": stored, "fenced": fenced}

    monkeypatch.setattr(control, "call", answer)
    file = tmp_path / "gateway.yaml"
    file.write_text("")
    done = CliRunner().invoke(yield_, ["-c", str(file), "--address", "192.0.2.100"])
    assert (done.exit_code, "1 session at 192.0.2.100" in done.output) == (code, True)
    assert ("the bank did not take" in done.output) is not stored
    assert ("the packet filter did not take" in done.output) is not fenced
