"""State machines as tables: what may happen in each state, and which state follows. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Generic, TypeVar

State = TypeVar("State", bound=StrEnum)
Event = TypeVar("Event", bound=StrEnum)


class ImpossibleTransition(Exception):
    """An event came in a state that it cannot come in: a mistake in this program."""


class Transitions(Generic[State, Event]):
    """The machine that begins in `first`. A state without a row of its own is a final one."""

    def __init__(self, first: State, rows: Mapping[tuple[State, Event], State]) -> None:
        self.first = first
        self.rows = dict(rows)
        self.final = frozenset(rows.values()) - {state for state, _ in rows}

    def after(self, state: State, event: Event) -> State:
        """The state that `event` leads to. Raises ImpossibleTransition."""
        try:
            return self.rows[state, event]
        except KeyError:
            raise ImpossibleTransition(f"{event!r} in state {state!r}") from None

    def figure(self) -> str:
        """The table as text, one transition a line: the pages show it, and a test compares."""
        states = max(len(state) for state, _ in self.rows)
        events = max(len(event) for _, event in self.rows)
        return "\n".join(
            f"{state:<{states}} --{event}{'-' * (events - len(event))}--> {after}"
            for (state, event), after in self.rows.items()
        )
