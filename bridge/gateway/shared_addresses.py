"""The addresses that this gateway shares with others, with all that belongs to them: the takeover of sessions, the
fence, what clients send there, and the kernel's news of the addresses themselves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any, Final

import structlog

from bridge.bank.interface import BankUnavailable, StubBank
from bridge.bank.redis_bank import RedisBank
from bridge.bank.write_queue import WriteQueue
from bridge.charon.charon import Charon
from bridge.charon.ike_sa import IkeSa
from bridge.charon.ports import charon_ports
from bridge.charon.vici_types import SaInfo
from bridge.config import GatewayConfig
from bridge.gateway.fence import Fence
from bridge.gateway.metrics import GatewayMetrics
from bridge.gateway.moving_sessions import MovingSessions
from bridge.gateway.publisher import Publisher
from bridge.gateway.session_owner import SessionOwner
from bridge.gateway.taken_sessions import TakenSessions
from bridge.gateway.takeover import Takeover
from bridge.gateway.takeover_barriers import Barriers
from bridge.gateway.takeover_run import SessionTaker
from bridge.net import address_watch
from bridge.net.address_watch import AddressWatch
from bridge.net.raw_socket import RawUdp
from bridge.net.shared_esp import SharedEsp
from bridge.net.shared_requests import SharedRequests
from bridge.service.control import Command
from bridge.service.process import StartError
from bridge.service.tasks import end, spawn

log = structlog.get_logger()

LOOK_SECONDS: Final = 5.0
"""between two looks at the addresses of this host: news of the kernel may be lost"""
PAUSE_SECONDS: Final = 1.0
"""between two looks at its sessions, at least"""


class SharedAddresses:
    """Of a gateway whose configuration has takeover.addresses. `moving` gets the sessions that come and go."""

    def __init__(
        self,
        config: GatewayConfig,
        charon: Charon,
        bank: StubBank,
        publisher: Publisher,
        writer: WriteQueue,
        barriers: Barriers,
        moving: MovingSessions,
    ) -> None:
        """Raises StartError."""
        if not isinstance(bank, RedisBank):
            raise StartError("takeover.addresses needs bank.mode centralised")
        try:
            self._again = RawUdp(transparent=True)
        except OSError as error:
            raise StartError(f"raw sockets: {error}") from error
        self._netlink = config.takeover.trigger == "netlink"
        self._moving = moving
        self.fence = Fence(config.intercept)
        self.owner = SessionOwner(config.address or "", charon, bank, publisher, writer, barriers.endings)
        ports = config.intercept.ports or charon_ports()
        self.sessions = TakenSessions(charon, self._again, SharedEsp(ports))
        self.taker = SessionTaker(charon, bank, self.owner, self.sessions, barriers, moving.taken_over)
        self.takeover = Takeover(config.takeover.addresses, charon, self.owner, self.taker, self.sessions, self.fence)
        charon.tracker.shared = frozenset(config.takeover.addresses)
        charon.tracker.owner = self.owner.address
        charon.tracker.on_message_id = self._own_request
        self.owner.dropped = self._dropped
        self.owner.before_drop = moving.moving_away
        self.owner.lost_at = self._lost_at
        self._requests = SharedRequests(config.takeover.addresses, ports, self.sessions.heard)
        self._watch = AddressWatch(self._changed, self._look_now)
        self._there: dict[str, bool] = {}
        self._turns: dict[str, asyncio.Queue[bool]] = {
            address: asyncio.Queue() for address in config.takeover.addresses
        }
        self._looking = asyncio.Event()
        self._announced: set[str] = set()
        """addresses at which a gateway, possibly this one, said that it takes sessions"""
        self._news = asyncio.Event()
        self._later: asyncio.TimerHandle | None = None
        """the look because of what this gateway said itself"""
        self._contested: set[str] = set()
        """addresses that are here, and that another gateway took sessions at"""
        self._tasks: list[asyncio.Task[None]] = []

    def commands(self) -> dict[str, Command]:
        """Those of the control socket."""
        return {
            "takeover": self.takeover.take,
            "takeover-progress": self.takeover.progress,
            "yield": self.takeover.give_up,
        }

    async def start(self, stack: AsyncExitStack) -> None:
        """Begin, ended with `stack`. What this host has already is taken over, if the kernel's news counts."""
        self._requests.start()
        stack.callback(self._requests.close)
        stack.callback(self._again.close)
        present = self._present() or ()
        await self.takeover.start(present)
        stack.push_async_callback(self.takeover.close)
        if self._netlink:
            self._watch.start()
            stack.callback(self._watch.close)
            for address in present:
                self._changed(address, True)
            self._tasks += [spawn(f"follow {address}", self._follow(address)) for address in self._turns]
            self._tasks.append(spawn("shared-addresses-look", self._look()))
        self._tasks += [
            spawn("shared-sessions", self._look_at_sessions()),
            spawn("shared-sessions-news", self._hear()),
        ]
        stack.push_async_callback(end, *self._tasks)

    def look_soon(self) -> None:
        """Another gateway may have taken sessions that are here."""
        self._looking.set()

    def announced(self, address: str) -> None:
        """A gateway said that it takes sessions at an address: this one also gets the news of each batch of its own."""
        self._announced.add(address)
        self._news.set()

    async def foreign(self, infos: list[SaInfo]) -> list[SaInfo] | None:
        """See Takeover.foreign; None where the bank does not answer."""
        try:
            return await self.takeover.foreign(infos)
        except BankUnavailable:
            return None

    def status(self) -> dict[str, Any]:
        """For `status`."""
        return {"addresses": self.takeover.status(), "fence": {"in_place": self.fence.in_place}}

    # the kernel's news

    def _present(self) -> Sequence[str] | None:
        """The shared addresses that this host has; None where the kernel does not say, which is no change."""
        try:
            found = address_watch.present()
        except OSError as error:
            log.warning("addresses-unreadable", reason=error.strerror)
            return None
        return [address for address in self.takeover.addresses if address in found]

    def _changed(self, address: str, there: bool) -> None:
        if (turns := self._turns.get(address)) is not None:
            turns.put_nowait(there)

    async def _follow(self, address: str) -> None:
        while True:
            there = await self._turns[address].get()
            present = self._present()
            if present is None and not there:
                continue
            # it may be at another interface too, or have changed again
            here = there if present is None else address in present
            known, self._there[address] = self._there.get(address, False), here
            if here and not known:
                log.info("shared-address-changed", address=address, here=True)
                await self.takeover.take({"address": address})
            elif not here and not self.takeover.is_away(address):
                log.info("shared-address-changed", address=address, here=False)
                await self.takeover.give_up({"address": address})

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self._look_now()

    def _look_now(self) -> None:
        if (present := self._present()) is not None:
            for address in self.takeover.addresses:
                self._changed(address, address in present)

    # charon's news, and the owner's

    def _own_request(self, sa: IkeSa) -> None:
        self.sessions.sent(sa)
        self.owner.own_request(sa)

    def _dropped(self, sa: IkeSa) -> None:
        self.sessions.forget(sa.id.spis)
        self._moving.dropped(sa)

    def recovered(self, sas: Sequence[IkeSa], infos: Sequence[SaInfo]) -> None:
        """IKE_SAs of this gateway that the sidecar knows again after a restart, and what VICI listed of them."""
        unique_ids = {info.spis: info.unique_id for info in infos}
        for sa in sas:
            if sa.derivation is not None and sa.derivation.unkeyed:
                stub = sa.stub(sa.index_here(), with_secret=False, expires=sa.stub_expires)
                self.sessions.recovered(stub, sa, unique_ids.get(sa.id.spis, ""))

    def _lost_at(self, address: str) -> None:
        if not self.takeover.is_away(address):
            self._contested.add(address)
            self.look_soon()

    async def _hear(self) -> None:
        """Look at once because of another gateway, and seldom because of this one: it looks at all its sessions, and
        takes each batch of many over."""
        while True:
            await self._news.wait()
            self._news.clear()
            addresses, self._announced = self._announced, set()
            try:
                others = [one for one in sorted(addresses) if await self.owner.another_takes(one)]
            except BankUnavailable:
                others = sorted(addresses)
            if others:
                self.look_soon()
            elif self._later is None:
                # what another gateway said just before may have been replaced
                self._later = asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look_later)

    def _look_later(self) -> None:
        self._later = None
        self.look_soon()

    async def _look_at_sessions(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS if self._contested else None):
                    await self._looking.wait()
            self._looking.clear()
            try:
                await self.owner.look()
                for address in sorted(self._contested):
                    await self._take_back(address)
            except BankUnavailable as error:
                log.info("owners-not-read", reason=str(error))
            await asyncio.sleep(PAUSE_SECONDS)

    async def _take_back(self, address: str) -> None:
        """Sessions at an address that this gateway has were taken by another one. It may not have them any more."""
        if self.takeover.is_away(address):
            self._contested.discard(address)
            return
        abandoned, elsewhere = await self.owner.abandoned(address)
        if abandoned:
            await self.takeover.take_abandoned(address, abandoned)
        if not elsewhere:
            self._contested.discard(address)


def gauges(metrics: GatewayMetrics, shared: SharedAddresses | None) -> None:
    """What is told of it; zeros, and nothing missing, where no address is shared."""
    taker = shared.taker if shared is not None else None
    metrics.total("sessions_taken_over", "sessions taken over as they are", lambda: taker.taken if taker else 0)
    metrics.total(
        "sessions_not_taken_over",
        "sessions at a shared address that could not be taken over",
        lambda: sum(taker.not_taken.values()) if taker else 0,
    )
    metrics.total(
        "sessions_lost_to_takeover",
        "sessions dropped here because another gateway took them",
        lambda: shared.owner.lost if shared else 0,
    )
    metrics.gauge(
        "fence_in_place",
        "1 while nothing of a shared address of another gateway can leave",
        lambda: float(shared is None or shared.fence.in_place),
    )
    metrics.total(
        "fence_dropped",
        "packets that the fence kept from leaving",
        lambda: shared.fence.dropped if shared is not None else 0,
    )
