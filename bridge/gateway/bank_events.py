"""What happens to keys of the bank, to the parts of a gateway that follow keys of a kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from bridge.bank.keyspace import Event, Keyspace

OnEvent = Callable[[Event], None]
OnState = Callable[[bool], None]

_KIND_BEGINS: Final = len("ike:")


class BankEvents:
    """Passes on keyspace events from `start` to `close`, on the event loop."""

    def __init__(self, url: str) -> None:
        self._handlers: dict[str, list[OnEvent]] = {}
        self._on_state: list[OnState] = []
        self._patterns: list[str] = []
        self._url = url
        self._keyspace: Keyspace | None = None

    def follow(self, kind: str, handler: OnEvent, *patterns: str) -> None:
        """Before `start`: have `handler` called for keys that begin with `kind` (bridge.stub.bank_keys), and receive
        events of those keys that match `patterns`."""
        self._handlers.setdefault(kind, []).append(handler)
        self._patterns += patterns

    def on_state(self, handler: OnState) -> None:
        """Before `start`: have `handler` called when events begin to arrive (True), or no longer do."""
        self._on_state.append(handler)

    def start(self) -> None:
        """Begin to receive."""
        self._keyspace = Keyspace(self._url, tuple(self._patterns), self.event, self.state)
        self._keyspace.start()

    async def close(self) -> None:
        """End."""
        if self._keyspace is not None:
            await self._keyspace.close()

    async def add(self, pattern: str) -> None:
        """After `start`: receive events of keys that match `pattern` too (bridge.bank.keyspace)."""
        if self._keyspace is not None:
            await self._keyspace.add(pattern)

    async def remove(self, pattern: str) -> None:
        """Receive those no more."""
        if self._keyspace is not None:
            await self._keyspace.remove(pattern)

    def event(self, event: Event) -> None:
        """Something happened to a key."""
        key = event.key
        for handler in self._handlers.get(key[: key.find(":", _KIND_BEGINS) + 1], ()):
            handler(event)

    def state(self, listening: bool) -> None:
        """Events arrive from now on, or no longer do."""
        for handler in self._on_state:
            handler(listening)
