"""What a gateway posts in the bank about itself: counters, for monitors; which sessions had traffic
last, for those that announce its failure; connections and pools, for `check` and `drain`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from itertools import islice
from typing import Final

from bridge.bank import failover_progress, gateway_facts, recent_traffic
from bridge.bank.interface import BankUnavailable, StubBank
from bridge.charon.charon import Charon
from bridge.charon.placeholders import ha_pools
from bridge.charon.vici_types import ViciError
from bridge.gateway.failover import Failover
from bridge.gateway.metrics import GatewayMetrics
from bridge.gateway.other_family import other_address
from bridge.gateway.other_gateways import OtherGateways
from bridge.gateway.publisher import Publisher
from bridge.gateway.traffic_times import TrafficTimes
from bridge.stub import bank_keys

FACTS_LOOK_SECONDS: Final = 0.5
"""between two looks whether the connections have changed"""
STATS_SECONDS: Final = 1.0
STATS_TTL: Final = 60.0
TRAFFIC_SECONDS: Final = 2.0
"""between two looks whether charon was asked for its IKE_SAs"""
SOME: Final = 1_000
"""sessions that show by which addresses this gateway is known"""
POSTED: Final = ("resumptions", "refusals", "ike_sas", "unconfirmed", "duplicate", "sessions")
"""how the names of the counters and gauges begin that the others read"""


class Postings:
    """Posts for the gateway `address`; `keep_stats`, `keep_traffic` and `keep_facts` are tasks."""

    def __init__(
        self,
        address: str,
        bank: StubBank,
        charon: Charon,
        publisher: Publisher,
        failover: Failover,
        metrics: GatewayMetrics,
    ) -> None:
        self._address = address
        self._bank = bank
        self._charon = charon
        self._publisher = publisher
        self._failover = failover
        self._metrics = metrics
        self._traffic = traffic = TrafficTimes(charon.tracker)
        charon.tracker.on_info.append(traffic.told)
        self.others: tuple[str, ...] = ()
        """the addresses of the other family that living gateways post: trusted only as places to ask"""

    async def keep_stats(self) -> None:
        """Post the counters, and how far announcements are, again and again."""
        while True:
            counters = self._metrics.values(*POSTED)
            with contextlib.suppress(BankUnavailable):
                await self._bank.post(bank_keys.STATS_KIND, self._address, json.dumps(counters), STATS_TTL)
                if failures := self._failover.progress():
                    text = failover_progress.encode(failures)
                    await self._bank.post(bank_keys.FAILOVERS_KIND, self._address, text, STATS_TTL)
            await asyncio.sleep(STATS_SECONDS)

    async def keep_traffic(self) -> None:
        """Post which sessions had traffic last, after charon was asked."""
        while True:
            if self._traffic.changed:
                text = recent_traffic.encode(self._traffic.latest())
                with contextlib.suppress(BankUnavailable):
                    await self._bank.post(bank_keys.TRAFFIC_KIND, self._address, text, recent_traffic.TTL)
            await asyncio.sleep(TRAFFIC_SECONDS)

    async def keep_facts(self) -> None:
        """Post this gateway's facts again and again, and immediately when its connections change: another gateway that
        is drained to this one decides by them."""
        await self._charon.reconciled.wait()
        posted: tuple[dict[str, list[str]], list[str]] | None = None
        due = 0.0
        while True:
            connections = {
                name: [child.name for child in info.children] for name, info in self._charon.tracker.connections.items()
            }
            addresses = sorted(self._publisher.own_addresses - {self._address})[: gateway_facts.ADDRESSES_MAX]
            now = connections, addresses
            if now != posted or time.monotonic() >= due:
                try:
                    pools = await self._charon.vici.pools() + [pool.range for pool in await asyncio.to_thread(ha_pools)]
                    some = islice(self._charon.tracker.established(), SOME)
                    other = other_address(self._address, (sa.local.address for sa in some if sa.local is not None))
                    facts = gateway_facts.Facts(connections, pools, addresses, other)
                    text = gateway_facts.encode(facts)
                    await self._bank.post(bank_keys.FACTS_KIND, self._address, text, gateway_facts.TTL)
                    others = await OtherGateways.ask(self._bank, self._address)
                    self.others = tuple(sorted(one.other for one in others.facts.values() if one and one.other))
                except (BankUnavailable, ViciError):
                    posted = None
                else:
                    posted, due = now, time.monotonic() + gateway_facts.SECONDS
            await asyncio.sleep(FACTS_LOOK_SECONDS)
