"""This gateway's sign of life in the bank, and what the bank can do now.

Whether the bank answers reads and whether it takes writes are two facts. A Redis that is full, that was made a replica,
or that lacks its quorum of replicas answers reads only: sessions resume from its stubs, and changes wait in memory. And
what other gateways' heartbeats say depends on writes: in a bank that takes none, all of them expire.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Collection
from enum import StrEnum
from typing import Final

import structlog

from bridge.bank.interface import BankUnavailable, StubBank
from bridge.charon.charon import Charon
from bridge.gateway.charon_pulse import CharonPulse
from bridge.gateway.metrics import GatewayMetrics
from bridge.service.tasks import end, spawn

log = structlog.get_logger()

BEATS: Final = 3
"""heartbeats in the time after which one expires"""
RESTART_SECONDS: Final = 30.0
"""that a heartbeat lives whose sidecar was stopped in order: charon goes on, and the sidecar comes back"""
CHARON_SECONDS: Final = 0.05
"""between two looks whether charon is still there"""
DOUBTFUL_SECONDS: Final = 30.0
"""how long after the bank refused a heartbeat those of other gateways may still be missing"""


class BankState(StrEnum):
    """What the bank can do now."""

    AWAY = "away"
    READ_ONLY = "read-only"
    WELL = "well"


class Heartbeat:
    """Keeps `ike:gateway:<address>` alive, `detect` s each time, and takes it away when charon goes. `address` is this
    gateway's in the index; None stands for the local address of the first SA that is up. `written` gets each
    attempt: whether it was written, the seconds that it took, and the other gateways whose heartbeats are in the bank
    (None where that is not known)."""

    def __init__(
        self,
        bank: StubBank,
        charon: Charon,
        address: str | None,
        metrics: GatewayMetrics,
        detect: float,
        written: Callable[[bool, float, Collection[str] | None], Awaitable[None]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bank = bank
        self._charon = charon
        self._address = address
        self._metrics = metrics
        self.others: tuple[str, ...] = ()
        """addresses of the other gateways that live, as the bank has them: trusted only as places to ask"""
        self._detect = detect
        self._written = written
        self._served = False
        """charon is there"""
        self._left = False
        """it was, and went: there is no heartbeat until it is back"""
        self._pulse = CharonPulse(charon.vici, detect)
        self._clock = clock
        self._state: BankState | None = None
        self._refused_at: float | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def charon_alive(self) -> bool | None:
        """Whether charon runs; None while it does not answer."""
        if self._charon.channel.charon_socket() is None:
            return False
        return None if self._pulse.hangs else True

    @property
    def bank_reachable(self) -> bool:
        """The bank answers reads."""
        return self._state in (BankState.READ_ONLY, BankState.WELL)

    @property
    def bank_writable(self) -> bool:
        """The bank takes writes."""
        return self._state is BankState.WELL

    @property
    def doubtful(self) -> bool:
        """Whether heartbeats may be missing in the bank because it did not take them."""
        return self._refused_at is not None and self._clock() - self._refused_at < DOUBTFUL_SECONDS

    def start(self) -> None:
        """Begin."""
        self._task = spawn("heartbeat", self._run())
        self._pulse.start()

    async def close(self) -> None:
        """End. The heartbeat stays for RESTART_SECONDS where charon goes on: that this sidecar ends is no failure of
        its gateway, unless it does not come back."""
        await self._pulse.close()
        if self._task is not None:
            await end(self._task)
        address = self._own_address()
        if self.bank_writable and address is not None and self._there():
            with contextlib.suppress(BankUnavailable):
                await self._bank.heartbeat(address, RESTART_SECONDS)

    async def _run(self) -> None:
        while True:
            began = time.monotonic()
            await self.beat()
            await self._pause(began + self._detect / BEATS)

    async def beat(self) -> None:
        """Ask the bank whether it is there, and write a heartbeat."""
        began = self._clock()
        state, reason, others = BankState.AWAY, "", None
        try:
            self._metrics.ping_seconds.observe(await self._bank.ping())
            state = BankState.READ_ONLY
            others = await self._write()
            state = BankState.WELL
        except BankUnavailable as error:
            reason = str(error)
        if state is not BankState.WELL:
            self._refused_at = self._clock()
        self._say(state, reason)
        await self._written(state is BankState.WELL, self._clock() - began, others)

    async def _write(self) -> Collection[str] | None:
        """The other gateways that live. Raises BankUnavailable."""
        address = self._own_address()
        if address is None:
            return None
        if self._there():
            self._served = True
        if not self._served and self._left:
            return None
        await self._bank.heartbeat(address, self._detect)
        signs = await self._bank.gateways()
        self.others = tuple(sorted(name for name, sign in signs.items() if sign.alive and name != address))
        return self.others

    def _say(self, state: BankState, reason: str) -> None:
        before, self._state = self._state, state
        if state is before:
            return
        if state is BankState.AWAY:
            if before is not None:
                log.warning("bank-unreachable", component="heartbeat", reason=reason)
        elif before in (None, BankState.AWAY):
            log.info("bank-reachable", component="heartbeat")
        if state is BankState.READ_ONLY:
            log.error(
                "bank-unwritable", component="heartbeat", reason=reason, effect="sessions resume, changes of stubs wait"
            )
        elif state is BankState.WELL and before is BankState.READ_ONLY:
            log.info("bank-writable", component="heartbeat")

    async def _pause(self, until: float) -> None:
        """Until the next heartbeat is due, or charon has gone."""
        while (left := until - time.monotonic()) > 0:
            await asyncio.sleep(min(left, CHARON_SECONDS))
            if self._served and not self._there():
                self._served, self._left = False, True
                if not self._pulse.hangs:
                    log.warning("charon-ended", effect="the other gateways are notified")
                with contextlib.suppress(BankUnavailable):
                    if (address := self._own_address()) is not None:
                        await self._bank.leave(address)
                return

    def _there(self) -> bool:
        return self.charon_alive is True

    def _own_address(self) -> str | None:
        if self._address is not None:
            return self._address
        return next((sa.local.address for sa in self._charon.tracker.established() if sa.local), None)
