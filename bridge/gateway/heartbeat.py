"""This gateway's sign of life in the bank, and whether the bank answers."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from bridge.bank.interface import BankUnavailable, StubBank
from bridge.charon.charon import Charon
from bridge.gateway.metrics import GatewayMetrics
from bridge.service.tasks import end, spawn

log = structlog.get_logger()

BEATS: Final = 3
"""heartbeats in the time after which one expires"""
RESTART_SECONDS: Final = 30.0
"""that a heartbeat lives whose sidecar was stopped in order: charon goes on, and the sidecar comes back"""
CHARON_SECONDS: Final = 0.05
"""between two looks whether charon is still there"""


class Heartbeat:
    """Keeps `ike:gateway:<address>` alive, `detect` s each time, and takes it away when charon goes. `address` is this
    gateway's in the index; None stands for the local address of the first SA that is up. `written` is told of each
    attempt: whether it was written, and the seconds that it took."""

    def __init__(
        self,
        bank: StubBank,
        charon: Charon,
        address: str | None,
        metrics: GatewayMetrics,
        detect: float,
        written: Callable[[bool, float], Awaitable[None]],
    ) -> None:
        self.bank_reachable = False
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
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin."""
        self._task = spawn("heartbeat", self._run())

    async def close(self) -> None:
        """End. The heartbeat stays for RESTART_SECONDS where charon goes on: that this sidecar ends is no failure of
        its gateway, unless it does not come back."""
        if self._task is not None:
            await end(self._task)
        address = self._own_address()
        if self.bank_reachable and address is not None and self._there():
            with contextlib.suppress(BankUnavailable):
                await self._bank.heartbeat(address, RESTART_SECONDS)

    async def _run(self) -> None:
        while True:
            began = time.monotonic()
            try:
                self._metrics.ping_seconds.observe(await self._bank.ping())
                await self._beat()
            except BankUnavailable as error:
                if self.bank_reachable:
                    log.warning("bank-lost", reason=str(error))
                self.bank_reachable = False
            else:
                if not self.bank_reachable:
                    log.info("bank-reachable")
                self.bank_reachable = True
            await self._written(self.bank_reachable, time.monotonic() - began)
            await self._pause(began + self._detect / BEATS)

    async def _beat(self) -> None:
        address = self._own_address()
        if address is None:
            return
        if self._there():
            self._served = True
        if self._served or not self._left:
            await self._bank.heartbeat(address, self._detect)
            signs = await self._bank.gateways()
            self.others = tuple(sorted(name for name, sign in signs.items() if sign.alive and name != address))

    async def _pause(self, until: float) -> None:
        """Until the next heartbeat is due, or charon has gone."""
        while (left := until - time.monotonic()) > 0:
            await asyncio.sleep(min(left, CHARON_SECONDS))
            if self._served and not self._there():
                self._served, self._left = False, True
                log.warning("charon-gone", reason="the other gateways are told")
                with contextlib.suppress(BankUnavailable):
                    if (address := self._own_address()) is not None:
                        await self._bank.leave(address)
                return

    def _there(self) -> bool:
        return self._charon.channel.charon_socket() is not None

    def _own_address(self) -> str | None:
        if self._address is not None:
            return self._address
        return next((sa.local.address for sa in self._charon.tracker.established() if sa.local), None)
