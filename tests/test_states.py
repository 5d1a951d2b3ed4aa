"""The state machines are tables (bridge.service.transitions), and ARCHITECTURE.md shows them as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bridge.client.attempt_state import ATTEMPT
from bridge.gateway.activation_state import ACTIVATION
from bridge.gateway.drain_state import DRAIN, REASONS
from bridge.gateway.drain_state import Event as DrainEvent
from bridge.gateway.rebuilt_state import REBUILT, Event, State
from bridge.gateway.takeover_state import ADDRESS, SESSION
from bridge.service.transitions import ImpossibleTransition, Transitions

ARCHITECTURE = Path(__file__).parent.parent / "ARCHITECTURE.md"
TABLES: dict[str, Transitions[Any, Any]] = {
    "rebuilt_state": REBUILT,
    "activation_state": ACTIVATION,
    "attempt_state": ATTEMPT,
    "drain_state": DRAIN,
    "shared address": ADDRESS,
    "takeover session": SESSION,
}


@pytest.fixture(params=TABLES)
def table(request: pytest.FixtureRequest) -> Transitions[Any, Any]:
    return TABLES[request.param]


def test_the_page_shows_the_table_as_it_is(table: Transitions[Any, Any]) -> None:
    indented = "\n".join(f"    {line}" for line in table.figure().splitlines())
    assert indented in ARCHITECTURE.read_text()


def test_every_state_is_reached_and_every_state_can_end(table: Transitions[Any, Any]) -> None:
    def reached(first: Any) -> set[Any]:
        found, left = {first}, [first]
        while left:
            state = left.pop()
            after = {new for (old, _), new in table.rows.items() if old is state} - found
            found |= after
            left += after
        return found

    kind: Any = type(table.first)
    states = set(kind)
    assert reached(table.first) == states
    if table is ADDRESS:
        # an address comes and goes for as long as the sidecar runs
        return
    assert table.final
    assert all(reached(state) & table.final for state in states)


def test_every_event_happens_somewhere(table: Transitions[Any, Any]) -> None:
    events = {event for _, event in table.rows}
    kind: Any = type(next(iter(events)))
    assert events == set(kind)


def test_every_end_of_a_drained_client_has_its_reason() -> None:
    assert {event for (_, event), after in DRAIN.rows.items() if after in DRAIN.final} == {*REASONS, DrainEvent.ANOTHER}


def test_what_cannot_happen_is_a_mistake_that_is_named() -> None:
    with pytest.raises(ImpossibleTransition, match=r"LATE.*CONFIRMED"):
        REBUILT.after(State.CONFIRMED, Event.LATE)
