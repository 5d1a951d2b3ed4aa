"""`ike-sa-sync stubs download`: an operator has all gateways download the stubs of one, which is going to be away."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final

from bridge.bank.interface import BankUnavailable, StubBank
from bridge.bank.keyspace import Event
from bridge.bank.prefetch import Prefetch
from bridge.gateway.bank_events import BankEvents
from bridge.stub import bank_keys
from bridge.stub.bank_keys import FETCH

FETCH_SECONDS: Final = 60.0
HEAR_SECONDS: Final = 2.0
"""within which this gateway receives its own event, where the bank sends keyspace events"""


class Downloads:
    """Asks for downloads, and begins those that were asked for. `address` is this gateway's in the index."""

    def __init__(self, bank: StubBank, prefetch: Prefetch, address: str | None, events: BankEvents) -> None:
        self._bank = bank
        self._prefetch = prefetch
        self._address = address
        self._heard = asyncio.Event()
        events.follow(FETCH, self._event, f"{FETCH}*")

    def _event(self, event: Event) -> None:
        gateway = bank_keys.gateway_name(event.key.removeprefix(FETCH))
        if event.event != "set" or gateway is None:
            return
        if gateway != self._address:
            self._prefetch.fetch(gateway)
        self._heard.set()

    async def fetch(self, request: dict[str, Any]) -> dict[str, Any]:
        """Control command: have all other gateways fetch the stubs of one.

        This one begins with that event, as they do: without keyspace events it would not learn either that a
        fetched stub has ended.
        """
        gateway = str(request["from"])
        self._prefetch.progress.pop(gateway, None)
        self._heard.clear()
        try:
            await self._bank.post(bank_keys.FETCH_KIND, gateway, str(int(time.time())), FETCH_SECONDS)
        except BankUnavailable as error:
            return {"error": f"{error}; see `ike-sa-sync check`"}
        try:
            async with asyncio.timeout(HEAR_SECONDS):
                await self._heard.wait()
        except TimeoutError:
            return {"error": "no keyspace events of the bank arrive here: is notify-keyspace-events Kg$hzxe set?"}
        return await self.progress(request)

    async def progress(self, request: dict[str, Any]) -> dict[str, Any]:
        """Control command: how far the download from one gateway is here."""
        progress = self._prefetch.progress.get(str(request["from"]))
        if progress is None:
            return {"gateway": request["from"], "state": "own", "stubs": 0, "seconds": 0.0}
        return {
            "gateway": progress.gateway,
            "state": progress.state,
            "stubs": progress.stubs,
            "seconds": round(progress.seconds, 3),
        }
