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

from bridge.bank.interface import BEATS, RESTART_SECONDS, BankUnavailable, StubBank
from bridge.charon.charon import Charon
from bridge.gateway.charon_pulse import CharonPulse
from bridge.gateway.metrics import GatewayMetrics
from bridge.service.metrics import Metrics
from bridge.service.tasks import end, spawn

log = structlog.get_logger()

CHARON_SECONDS: Final = 0.05
"""between two looks whether charon is still there"""
DOUBTFUL_SECONDS: Final = 30.0
"""how long after the bank refused a heartbeat, or was slow, those of other gateways may still be missing"""
SLOW_SECONDS: Final = 30.0
"""that no heartbeat was written within a third of `detect` before that is reported"""


class BankState(StrEnum):
    """What the bank can do now."""

    AWAY = "away"
    READ_ONLY = "read-only"
    WELL = "well"


class Heartbeat:
    """Keeps `ike:gateway:<address>` alive, `detect` s each time, and takes it away when charon goes, or the way to
    its clients. `address` is this gateway's in the index; None stands for the local address of the first SA that is up.
    `written` gets each attempt: whether it was written, the seconds that the bank took for that, and the other gateways
    whose heartbeats are in the bank (None where that is not known). `cut_off` gives, at a time of `clock`, whether no
    client can be sent to."""

    def __init__(
        self,
        bank: StubBank,
        charon: Charon,
        address: str | None,
        metrics: GatewayMetrics,
        detect: float,
        written: Callable[[bool, float, Collection[str] | None], Awaitable[None]],
        *,
        cut_off: Callable[[float], bool] = lambda _: False,
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
        """charon is there, its IKE_SAs are known, and its clients can be sent to"""
        self._pulse = CharonPulse(charon.vici, detect)
        self._cut_off = cut_off
        self._clock = clock
        self._state: BankState | None = None
        self._refused_at: float | None = None
        self._slow_since: float | None = None
        self._slow = False
        self._task: asyncio.Task[None] | None = None

    @property
    def charon_alive(self) -> bool | None:
        """Whether the charon runs whose IKE_SAs are known here; None while it does not answer."""
        alive = self._charon.alive()
        return None if alive and self._pulse.hangs else alive

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
        """Whether heartbeats may be missing in the bank because it did not take them, or took them late."""
        return self._refused_at is not None and self._clock() - self._refused_at < DOUBTFUL_SECONDS

    def start(self) -> None:
        """Begin."""
        self._task = spawn("heartbeat", self._run())
        self._pulse.start()

    def gauges(self, metrics: Metrics) -> None:
        """What is known of the bank, for `status`."""
        metrics.gauge("bank_reachable", "1 while the bank answers", lambda: float(self.bank_reachable))
        metrics.gauge("bank_writable", "1 while the bank takes writes", lambda: float(self.bank_writable))

    async def close(self) -> None:
        """End, once. The heartbeat stays for RESTART_SECONDS where charon goes on: that this sidecar ends is no failure
        of its gateway, unless it does not come back."""
        task, self._task = self._task, None
        if task is None:
            return
        await self._pulse.close()
        await end(task)
        address = self.own_address
        if self.bank_writable and address is not None and self._there():
            with contextlib.suppress(BankUnavailable):
                await self._bank.heartbeat(address, RESTART_SECONDS)

    async def _run(self) -> None:
        while True:
            began = time.monotonic()
            await self.beat()
            await self._pause(began + self._detect / BEATS)

    async def beat(self) -> None:
        """Ask the bank whether it is there, write a heartbeat, and read those of others, in parallel: where the bank is
        far, one after the other would take longer than others wait for a heartbeat."""
        began = self._clock()
        address = self.own_address
        # neither before a charon is there, nor while the SAs of a new one are not known: others would take this gateway
        # for one that still has its sessions
        if not await self._left() and self._there() and self._charon.reconciled.is_set():
            self._served = True
        writes = address is not None and self._served
        ping, written, signs = await asyncio.gather(
            self._bank.ping(),
            self._bank.heartbeat(address, self._detect) if address is not None and writes else _nothing(),
            self._bank.gateways() if writes else _nothing(),
            return_exceptions=True,
        )
        failed = [each for each in (ping, written, signs) if isinstance(each, BaseException)]
        for error in failed:
            if not isinstance(error, BankUnavailable):
                raise error
        state = BankState.WELL if not failed else BankState.READ_ONLY
        if isinstance(ping, float):
            self._metrics.ping_seconds.observe(ping)
        else:
            state = BankState.AWAY
        took = self._clock() - began
        if failed or took > self._detect:
            # heartbeats that come less often than they expire are missing too
            self._refused_at = self._clock()
        self._say(state, str(failed[0]) if failed else "")
        others = None
        if isinstance(signs, dict) and state is BankState.WELL:
            others = self.others = tuple(sorted(name for name, sign in signs.items() if sign.alive and name != address))
        seconds = written if isinstance(written, float) else took
        self._look_at_pace(state is BankState.WELL, seconds)
        await self._written(state is BankState.WELL, seconds, others)

    def _look_at_pace(self, written: bool, seconds: float) -> None:
        """Report a bank that is always too slow for this gateway to notice the failure of another one."""
        if not written or seconds <= self._detect / BEATS:
            self._slow_since = None
            self._slow = False
            return
        now = self._clock()
        if self._slow_since is None:
            self._slow_since = now
        elif not self._slow and now - self._slow_since >= SLOW_SECONDS:
            self._slow = True
            log.warning(
                "bank-slow",
                component="heartbeat",
                seconds=round(seconds, 3),
                effect="failures of other gateways are not noticed",
                fix="set failover.detect to more than three times as long on all gateways, or a bank that is nearer",
            )

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
        """Until the next heartbeat is due, or charon or the way to its clients has gone."""
        # once at least: where the bank is slow, the next heartbeat is due when the last one was written
        while not await self._left():
            if (left := until - time.monotonic()) <= 0:
                return
            await asyncio.sleep(min(left, CHARON_SECONDS))

    async def _left(self) -> bool:
        """Whether charon or the way to its clients has gone just now; the heartbeat is taken away then."""
        if not self._served or self._there():
            return False
        self._served = False
        if self.charon_alive is False:
            log.warning("charon-ended", effect="the other gateways are notified")
        with contextlib.suppress(BankUnavailable):
            if (address := self.own_address) is not None:
                await self._bank.leave(address)
        return True

    def _there(self) -> bool:
        return self.charon_alive is True and not self._cut_off(self._clock())

    @property
    def own_address(self) -> str | None:
        """This gateway's in the index, once it is known."""
        if self._address is not None:
            return self._address
        return next((sa.local.address for sa in self._charon.tracker.established() if sa.local), None)


async def _nothing() -> None:
    return
