"""Addresses that gateways share: the gateway that gets one takes over the sessions at it, as they are; the one that
loses it drops its own without a message to the clients.

Which gateway has the address is decided elsewhere (VRRP, an operator). The bank decides whose a session is
(bridge.gateway.session_owner).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Final

import structlog

from bridge.charon.charon import Charon
from bridge.charon.ike_sa import IkeSa
from bridge.charon.vici_types import SaInfo
from bridge.config import canonical_address
from bridge.gateway.fence import Fence
from bridge.gateway.session_owner import SessionOwner
from bridge.gateway.taken_sessions import TakenSessions
from bridge.gateway.takeover_run import Run, SessionTaker
from bridge.gateway.takeover_session import Session
from bridge.gateway.takeover_state import ADDRESS, Address, AddressEvent, State
from bridge.net import address_watch
from bridge.service.tasks import end, spawn

log = structlog.get_logger()

HERE_SECONDS: Final = 2.0
"""that an address may need to be usable: IPv6 looks for duplicates first"""
HERE_LOOK_SECONDS: Final = 0.05
STOP_SECONDS: Final = 2.0
"""that a batch may need which is being installed when its address is given up"""
LOAD_SECONDS: Final = 10.0
"""that a charon which was just started may take to have its connections"""
UNKNOWN: Final = {"error": "is not among takeover.addresses of this gateway"}


class Takeover:
    """Of the addresses that are configured, from `start` to `close`."""

    def __init__(
        self,
        addresses: Sequence[str],
        charon: Charon,
        owner: SessionOwner,
        taker: SessionTaker,
        sessions: TakenSessions,
        fence: Fence,
        *,
        present: Callable[[], Collection[str]] = address_watch.present,
        here_seconds: float = HERE_SECONDS,
    ) -> None:
        self.addresses = addresses
        self._present = present
        self._here_seconds = here_seconds
        self._charon = charon
        self._owner = owner
        self._taker = taker
        self._sessions = sessions
        self._fence = fence
        self._states = dict.fromkeys(addresses, ADDRESS.first)
        self._runs: dict[str, Run] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._since_start: set[str] = set()
        """addresses that were here when the sidecar was started, and that no takeover looked at so far"""
        self._resting: set[str] = set()
        """addresses that were given up because charon is about to be stopped"""
        self._leaving: set[str] = set()
        """addresses whose `yield` waits for its turn"""
        self._again: dict[str, asyncio.Task[None]] = {}
        self._restarted = float("-inf")
        """when charon was restarted last"""
        self._turn = asyncio.Lock()
        """one command after the other: news of the kernel and of VRRP may come at the same time"""
        self._background: list[asyncio.Task[None]] = []
        sessions.done = self._rekeyed

    # from start to end

    async def start(self, present: Iterable[str]) -> None:
        """Begin; `present` are the addresses that this host has. All others are fenced."""
        self._charon.tracker.on_lost.append(self.lost)
        self._since_start = set(present)
        for address in present:
            self._on(address, AddressEvent.TAKEN)
            self._on(address, AddressEvent.DONE)
        await self._fence.around(self._away())
        self._background = [*self._sessions.start(), spawn("session-owner", self._owner.run())]

    async def close(self) -> None:
        """End; charon goes on."""
        await end(*self._again.values(), *self._tasks.values(), *self._background)
        self._sessions.close()
        await self._fence.close()

    def is_away(self, address: str) -> bool:
        """Whether another gateway has an address, as far as this one was told."""
        return self._states[address] is Address.AWAY

    def _away(self) -> set[str]:
        return {address for address, state in self._states.items() if state is Address.AWAY} | self._leaving

    def _on(self, address: str, event: AddressEvent) -> None:
        self._states[address] = ADDRESS.after(self._states[address], event)

    # commands

    async def take(self, request: dict[str, Any]) -> dict[str, Any]:
        """Control command: take over the sessions at `address`, those of gateway `from` alone if that is given."""
        address = canonical_address(str(request["address"]))
        if address not in self._states:
            return {"error": f"{address} {UNKNOWN['error']}"}
        # VRRP's script may run before the address can be used, and long after it has gone again
        if not await self._is_here(address):
            return {"error": f"{address} is not at this host: sessions at it belong to the gateway that has it"}
        owners = frozenset((canonical_address(str(request["from"])), "")) if request.get("from") else None
        async with self._turn:
            return await self._begin(address, owners)

    async def _is_here(self, address: str) -> bool:
        deadline = time.monotonic() + self._here_seconds
        while True:
            try:
                if address in self._present():
                    return True
            except OSError as error:
                log.warning("addresses-unreadable", reason=error.strerror)
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(HERE_LOOK_SECONDS)

    async def _begin(self, address: str, owners: frozenset[str] | None) -> dict[str, Any]:
        task = self._tasks.get(address)
        if task is not None and not task.done():
            return await self.progress({"address": address})
        if owners is None and address in self._runs and self._sessions.under_way(address):
            # the kernel's news and VRRP's script are of one event
            return await self.progress({"address": address})
        self._resting.discard(address)
        self._on(address, AddressEvent.TAKEN)
        await self._fence.around(self._away())
        run = self._runs[address] = Run(address, owners, time.monotonic())
        run.at_start = address in self._since_start
        self._since_start.discard(address)
        run.loads_until = self._restarted + LOAD_SECONDS
        log.info("takeover-begins", address=address, owners="all" if owners is None else ",".join(sorted(owners)))
        self._tasks[address] = spawn(f"take over {address}", self._take(run))
        return await self.progress({"address": address})

    async def take_abandoned(self, address: str, owners: frozenset[str]) -> None:
        """Sessions at an address of this gateway were taken by another one, which does not have them any more."""
        if await self._is_here(address):
            async with self._turn:
                if self._states[address] is Address.HERE:
                    log.warning("sessions-taken-back", address=address)
                    await self._begin(address, owners)

    def lost(self, _: list[IkeSa]) -> None:
        """charon was restarted: what the bank has at the addresses of this gateway is taken over into the new one."""
        self._restarted = time.monotonic()
        self._sessions.lost()
        for address in [one for one in self._states if one in self._resting or not self.is_away(one)]:
            self._again[address] = spawn(f"take over {address} again", self._take_again(address))

    async def _take_again(self, address: str) -> None:
        task = self._tasks.get(address)
        if task is not None:
            await asyncio.wait([task])
        if await self._is_here(address):
            async with self._turn:
                if self._states[address] is Address.HERE or address in self._resting:
                    await self._begin(address, None)

    async def _take(self, run: Run) -> None:
        try:
            await self._taker.take(run)
        finally:
            run.ended = time.monotonic()
        self._on(run.address, AddressEvent.DONE)
        log.info(
            "takeover-ends",
            address=run.address,
            found=len(run.seen),
            not_taken=sum(number for _, number in run.not_taken),
            seconds=round(run.ended - run.began, 3),
        )

    async def progress(self, request: dict[str, Any]) -> dict[str, Any]:
        """Control command: how far the last takeover of `address` is."""
        address = canonical_address(str(request["address"]))
        run = self._runs.get(address)
        if run is None:
            return {"error": f"{address} was not taken over since the sidecar started"}
        return self._row(run)

    async def give_up(self, request: dict[str, Any]) -> dict[str, Any]:
        """Control command: drop all sessions at `address` without a message to their clients, and let nothing of it
        leave this host. With `until_restart` a charon that is started again takes them over, if the address is still
        here then."""
        address = canonical_address(str(request["address"]))
        if address not in self._states:
            return {"error": f"{address} {UNKNOWN['error']}"}
        if request.get("unless_here") and address in self._present():
            state = str(self._states[address])
            return {"address": address, "state": state, "sessions": 0, "stored": True, "fenced": True}
        # nothing of the address leaves while others have their turn
        self._leaving.add(address)
        self._since_start.discard(address)
        fencing = spawn(f"fence {address}", self._fence.around(self._away()))
        try:
            async with self._turn:
                await fencing
                answer = await self._give_up(address)
                if request.get("until_restart"):
                    self._resting.add(address)
                return answer
        finally:
            self._leaving.discard(address)

    async def _give_up(self, address: str) -> dict[str, Any]:
        self._resting.discard(address)
        task = self._tasks.pop(address, None)
        if task is not None:
            # a batch that is being installed may share its activation with resumptions of other clients
            self._runs[address].stopping = True
            await asyncio.wait([task], timeout=STOP_SECONDS)
            await end(task)
        if self._states[address] is not Address.AWAY:
            self._on(address, AddressEvent.YIELDED)
        await self._fence.around(self._away())
        stored, dropped = True, 0
        # handshakes that were under way may have ended meanwhile
        while sas := [sa for sa in self._charon.tracker.sas.values() if sa.local and sa.local.address == address]:
            stored = await self._owner.release(sas) and stored
            await self._owner.drop(sas)
            dropped += len(sas)
        await self._owner.announce(address)
        log.info("yielded", address=address, sessions=dropped, stored=stored)
        return {
            "address": address,
            "state": str(self._states[address]),
            "sessions": dropped,
            "stored": stored,
            "fenced": self._fence.in_place,
        }

    # its state

    def status(self) -> list[dict[str, Any]]:
        """Of each address: its state, the sessions here, and the last takeover."""
        here, taken = Counter[str](), Counter[str]()
        for sa in self._charon.tracker.established():
            if sa.local is not None:
                here[sa.local.address] += 1
                taken[sa.local.address] += sa.taken_over
        return [
            {
                "address": address,
                "state": str(state),
                "sessions": here[address],
                "taken_over": taken[address],
                "last": self._row(self._runs[address]) if address in self._runs else None,
            }
            for address, state in self._states.items()
        ]

    def _row(self, run: Run) -> dict[str, Any]:
        return run.row(self._sessions.under_way(run.address), time.monotonic())

    def _rekeyed(self, session: Session) -> None:
        if session.state is State.TAKEN_OVER:
            self._owner.keyed(session.sa)
        run = self._runs.get(session.stub.index.gateway)
        if run is not None:
            run.done(session.stub.index, session.state, time.monotonic())

    # at the start

    async def foreign(self, infos: Sequence[SaInfo]) -> list[SaInfo]:
        """Of SAs that charon has and this sidecar does not know, those that are no other gateway's; the others are
        dropped. Raises BankUnavailable."""
        shared = [info for info in infos if info.local.address in self._states]
        if not shared:
            return list(infos)
        dropped = await self._owner.drop_foreign(shared, self._away(), self._sessions.spis())
        return [info for info in infos if info.spis not in dropped and info.spis not in self._sessions]
