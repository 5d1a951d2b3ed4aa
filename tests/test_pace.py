"""How many sessions of a failed gateway are announced at a time (bridge.gateway.pace)."""

from __future__ import annotations

from collections import deque

import pytest

from bridge.gateway.pace import QUEUE_SECONDS, WINDOW_MAX, WINDOW_MIN, WINDOW_START, Pace, Window

PROBING_SECONDS = 0.3
"""between an announcement and its report"""


def run(sessions: int, each: float, path: float = 0.02) -> tuple[list[float], float]:
    """So many sessions at a gateway that needs `each` seconds for one, over a path with a round trip of `path` seconds:
    how long each waited from its report on, and how long it took in all."""
    pace, now, free, left = Pace(), 0.0, 0.0, sessions
    under_way: deque[tuple[float, float]] = deque()
    waits = []
    while left or under_way:
        while left and len(under_way) < pace.window:
            left -= 1
            free = max(free, now + PROBING_SECONDS) + each
            under_way.append((now + PROBING_SECONDS, free + path))
        reported, now = under_way.popleft()
        waits.append(now - reported)
        pace.resumed(waits[-1])
    return waits, now


@pytest.mark.parametrize("path", [0.002, 0.05, 0.5])
@pytest.mark.parametrize("each", [0.0005, 0.001, 0.004])
def test_the_queue_stays_short_at_any_speed_and_the_gateway_has_always_work(each: float, path: float) -> None:
    waits, took = run(10_000, each, path)
    in_time = sorted(waits)[int(0.95 * len(waits))]
    assert in_time - path < 0.4, "a client would send its request again"
    assert took < 1.25 * 10_000 * each + 8 * path + 2


def test_it_grows_while_sessions_are_resumed_without_a_queue() -> None:
    pace = Pace()
    for _ in range(10_000):
        pace.resumed(0.5)
    assert pace.window == WINDOW_MAX


def test_it_shrinks_while_the_queue_is_long_and_stays_open() -> None:
    pace = Pace()
    pace.resumed(0.05)
    for _ in range(10_000):
        pace.resumed(0.5 + QUEUE_SECONDS)
    assert pace.window == WINDOW_MIN


def test_it_halves_when_clients_that_were_coming_do_not_arrive() -> None:
    pace = Pace()
    pace.late()
    assert pace.window == WINDOW_START / 2


def test_sessions_whose_clients_did_not_report_tell_nothing_about_the_queue() -> None:
    pace = Pace()
    pace.resumed(0.05)
    pace.resumed(None)
    assert pace.window == WINDOW_START + 2


def test_what_is_quick_enough_is_no_queue_although_it_was_quicker_once() -> None:
    """As on a machine that has become busy: a few sessions at a time would be no less slow."""
    pace, other = Pace(16, 16, quick=0.3), Pace(16, 16)
    for one in (pace, other):
        one.resumed(0.01)
        for _ in range(100):
            one.resumed(0.3)
    assert pace.window > 2 * other.window
    for _ in range(1000):
        pace.resumed(1.0)
    assert pace.window == 16


def test_a_session_is_in_the_window_until_its_client_does_not_answer() -> None:
    window = Window(Pace(2, 2))
    sessions = [object(), object()]
    for session in sessions:
        assert window.has_room
        window.enter(session)
    assert not window.has_room
    window.unanswered(sessions[0])
    assert window.has_room
    assert sessions[0] not in window
    # its client answers after all
    window.enter(sessions[0])
    assert sessions[0] in window
    for session in sessions:
        window.leave(session)
    # one that is out makes no further room
    before = window.pace.window
    window.unanswered(sessions[0])
    assert window.pace.window == before
