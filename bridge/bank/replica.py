"""One bank among several: whether it answers, and which changes it does not have yet."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar

import structlog

from bridge.bank.interface import BankUnavailable, Ending, StubBank
from bridge.bank.keyspace import Keyspace
from bridge.bank.write_queue import LIMIT, WriteQueue
from bridge.stub.stub import Stub

log = structlog.get_logger()

Answer = TypeVar("Answer")

LATE: Final = "no answer in time"


class Replica:
    """A bank with a name for people: `local`, `central`, or the address of the gateway whose bank it is.

    A bank that did not answer counts as down until it answers something that no client waits for: a heartbeat, a
    pending change, or the watch that `start` begins. One that answers and accepts no writes is up. `on_up` is called
    when it comes back. `watch` makes what watches it, from what wants to know whether it is there; without, nothing
    watches it.
    """

    def __init__(
        self,
        name: str,
        bank: StubBank,
        *,
        watch: Callable[[Callable[[bool], None]], Keyspace] | None = None,
        pending: int = LIMIT,
    ) -> None:
        self.name = name
        self.bank = bank
        self.up = True
        self.on_up: Callable[[Replica], None] = lambda _: None
        self._later = WriteQueue(self, limit=pending, name=name)
        self._watch = watch(self._watched) if watch is not None else None

    def __repr__(self) -> str:
        return f"Replica({self.name})"

    def start(self) -> None:
        """Watch whether it is there."""
        if self._watch is not None:
            self._watch.start()

    async def close(self) -> None:
        """Write its pending changes, for a moment, and close it."""
        if self._watch is not None:
            await self._watch.close()
        await self._later.close()
        await self.bank.close()

    @property
    def pending(self) -> int:
        """Changes that other banks have and this one does not."""
        return self._later.pending

    def status(self) -> dict[str, Any]:
        """For `ike-sa-sync status`."""
        return {"bank": self.name, "reachable": self.up, "pending": self.pending}

    async def answer(self, asked: Awaitable[Answer], timeout: float | None = None) -> Answer:
        """What it answers, within `timeout` s; whether it does is remembered. Raises BankUnavailable."""
        try:
            async with asyncio.timeout(timeout):
                answer = await asked
        except TimeoutError:
            self._is(False, LATE)
            raise BankUnavailable(f"the bank of {self.name}: {LATE}") from None
        except BankUnavailable as error:
            self._is(error.answers, str(error))
            raise
        self._is(True)
        return answer

    async def change(self, stubs: Sequence[Stub], endings: Sequence[Ending]) -> tuple[list[bool], list[bool]]:
        """See StubBank."""
        return await self.answer(self.bank.change(stubs, endings))

    def store_later(self, stub: Stub) -> None:
        """Store `stub` when it is back."""
        self._later.submit(stub)

    def delete_later(self, ending: Ending) -> None:
        """Delete the stub of a session that ended when it is back."""
        self._later.submit_delete(ending.index, expires=ending.expires)

    def _watched(self, listening: bool) -> None:
        if not listening:
            self.bank.renew()
        self._is(listening, "its connection was lost")

    def _is(self, up: bool, reason: str = "") -> None:
        if up == self.up:
            return
        self.up = up
        if up:
            log.info("bank-reachable", component="replica", bank=self.name, pending=self.pending)
            self.on_up(self)
        else:
            log.warning("bank-unreachable", component="replica", bank=self.name, reason=reason)
