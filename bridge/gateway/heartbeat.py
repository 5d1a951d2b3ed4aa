"""This gateway's sign of life in the bank, and whether the bank answers."""

from __future__ import annotations

import asyncio

import structlog

from bridge.bank.interface import HEARTBEAT_SECONDS, HEARTBEAT_TTL, BankUnavailable, StubBank
from bridge.charon.sa_tracker import SaTracker
from bridge.gateway.metrics import GatewayMetrics
from bridge.service.process import RETRY_SECONDS

log = structlog.get_logger()


class Heartbeat:
    """Keeps `ike:gateway:<address>` alive, HEARTBEAT_TTL s each time. `address` is this gateway's in the index; None
    stands for the local address of the first SA that is up."""

    def __init__(self, bank: StubBank, tracker: SaTracker, address: str | None, metrics: GatewayMetrics) -> None:
        self.bank_reachable = False
        self._bank = bank
        self._tracker = tracker
        self._address = address
        self._metrics = metrics
        self.others: tuple[str, ...] = ()
        """addresses of the other gateways that live, as the bank has them: trusted only as places to ask"""

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            try:
                self._metrics.ping_seconds.observe(await self._bank.ping())
                if address := self._address or self._local_address():
                    await self._bank.heartbeat(address, HEARTBEAT_TTL)
                    signs = await self._bank.gateways()
                    self.others = tuple(sorted(name for name, sign in signs.items() if sign.alive and name != address))
            except BankUnavailable as error:
                if self.bank_reachable:
                    log.warning("bank-lost", reason=str(error))
                self.bank_reachable = False
            else:
                if not self.bank_reachable:
                    log.info("bank-reachable")
                self.bank_reachable = True
            await asyncio.sleep(HEARTBEAT_SECONDS if self.bank_reachable else RETRY_SECONDS)

    def _local_address(self) -> str | None:
        return next((sa.local.address for sa in self._tracker.established() if sa.local), None)
