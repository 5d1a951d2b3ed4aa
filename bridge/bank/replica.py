"""One bank among several: whether it answers, and which changes it does not have yet."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeAlias, TypeVar

import structlog

from bridge.bank.interface import BankUnavailable, Ending, StubBank
from bridge.bank.keyspace import Keyspace
from bridge.bank.write_queue import LIMIT, WriteQueue
from bridge.service.tasks import end, spawn
from bridge.stub.stub import Stub

log = structlog.get_logger()

Answer = TypeVar("Answer")
Word: TypeAlias = "Callable[[StubBank], Awaitable[object]]"
"""something that a bank is told, such as that a gateway lives"""

LATE: Final = "no answer in time"
CLOSE_SECONDS: Final = 0.5
"""that a bank has for the last word before it is closed"""


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
        self._word: tuple[Word, asyncio.Future[None]] | None = None
        self._saying: asyncio.Task[None] | None = None
        self._since = 0.0
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
        if self._saying is not None:
            if self.up:
                await asyncio.wait([self._saying], timeout=CLOSE_SECONDS)
            await end(self._saying)
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

    @property
    def behind(self) -> float:
        """For how many seconds it has not answered what it was told."""
        return time.monotonic() - self._since if self._saying is not None else 0.0

    def say(self, word: Word) -> asyncio.Future[None]:
        """Tell it something that replaces what it was told before, once it has answered that; of what waits the last
        counts. What is returned ends when this or a later word was taken, or with BankUnavailable."""
        if self._word is None:
            taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        else:
            _, taken = self._word
        self._word = word, taken
        if self._saying is None:
            self._since = time.monotonic()
            self._saying = spawn(f"tell {self.name}", self._say())
        return taken

    async def _say(self) -> None:
        while self._word is not None:
            (word, taken), self._word = self._word, None
            self._since = time.monotonic()
            try:
                await self.answer(word(self.bank))
            except BankUnavailable as error:
                if not taken.cancelled():
                    taken.set_exception(error)
                    # also where it is not waited for
                    taken.exception()
            else:
                if not taken.cancelled():
                    taken.set_result(None)
        self._saying = None

    async def change(self, stubs: Sequence[Stub], endings: Sequence[Ending]) -> tuple[list[bool], list[bool]]:
        """See StubBank."""
        return await self.answer(self.bank.change(stubs, endings))

    def store_later(self, stub: Stub) -> None:
        """Store `stub` when it is back."""
        self._later.submit(stub)

    def delete_later(self, ending: Ending) -> None:
        """Delete the stub of a session that ended when it is back."""
        self._later.submit_ending(ending)

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
