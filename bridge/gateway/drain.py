"""Draining: clients of this gateway are asked to go on at another one, while this one lives (the load-balance scenario
of draft-xu-ike-sa-sync-01).

With `until_even` only a surplus moves: as many sessions as this gateway has more than the mean of all that could
resume some of them, and as the target has less. So several gateways can give some to one that returned, in any order or
at the same time, and none of them ends below the mean.

A target that could resume none of the sessions is refused before any client is asked: one without a heartbeat, without
a bank key of this gateway, or without the sessions' connections. Sessions that it could not resume are left alone.

Each chosen client gets a Move (bridge.ike.stub_exchange). One whose sidecar answers resumes at the target; when the
bank says that the session went on there, its IKE_SA here is ended. One without a sidecar notices nothing. The states
of a client are those of bridge.gateway.drain_state; who is asked when is in bridge.gateway.drain_run.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import structlog

from bridge.bank.interface import BankUnavailable, StubBank
from bridge.charon.charon import Charon
from bridge.charon.ike_sa import IkeSa
from bridge.config import canonical_address
from bridge.gateway.drain_run import Candidate, DrainRun, Plan
from bridge.gateway.other_gateways import OtherGateways, order
from bridge.gateway.session_elsewhere import SessionElsewhere
from bridge.ike.stub_exchange import StubMessage
from bridge.net.interface import Sender
from bridge.service.tasks import end, spawn

log = structlog.get_logger()

RATE: Final = 2000.0
"""moves begun a second at most, by default: two cores resume about as many sessions"""
ALREADY: Final = {"error": "this gateway is being drained already"}
ANY: Final = "any"
"""target: each session goes to one of the living gateways, shared by rendezvous hashing"""
HERE: Final = "this gateway"
"""its name where it has no address in the configuration"""


def surplus(sessions_at: Mapping[str, int], here: str, there: str) -> int:
    """How many sessions of `here` go to `there`, so that neither crosses the mean of all."""
    mean = sum(sessions_at.values()) / len(sessions_at)
    return max(math.floor(min(sessions_at[here] - mean, mean - sessions_at[there])), 0)


class Drain:
    """Drains this gateway, one run at a time. Its coroutines are commands of the control socket."""

    def __init__(
        self,
        charon: Charon,
        bank: StubBank,
        sender: Sender,
        address: str | None,
        elsewhere: SessionElsewhere,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._charon = charon
        self._bank = bank
        self._sender = sender
        self._address = address
        self._elsewhere = elsewhere
        self._clock = clock
        self._wall = wall
        self._run: DrainRun | None = None
        self._task: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """End without waiting for any client."""
        if self._task is not None:
            await end(self._task)

    @property
    def _under_way(self) -> bool:
        return self._task is not None and not self._task.done()

    # commands

    async def start(self, request: dict[str, Any]) -> dict[str, Any]:
        """Begin. `to`: address of the target, or ANY; `share` of the sessions, `rate`: moves begun a second,
        `until_even`: the surplus over the mean of the gateways instead of a share; `shared` false: no session at an
        address that gateways share, since another gateway takes it over as it is; `instead`: of one that goes on."""
        if request.get("instead") and self._task is not None:
            # clients that move already say so when they are asked again
            await end(self._task)
        if self._under_way:
            return ALREADY
        to = request["to"] if request["to"] == ANY else canonical_address(request["to"])
        sas = [sa for sa in self._charon.tracker.established() if sa.resumable and sa.published and sa.remote]
        if not request.get("shared", True):
            sas = [sa for sa in sas if sa.derivation is None]
        if to == self._address or any(sa.local is not None and sa.local.address == to for sa in sas):
            return {"error": f"{to} is this gateway"}
        try:
            others = await OtherGateways.ask(self._bank, self._address)
        except BankUnavailable as error:
            return {"error": f"the bank does not answer, and no session can move without it: {error}"}
        if others.without_heartbeat:
            return {"error": "the bank takes no writes now, and no session can move without: see `ike-sa-sync status`"}
        to = to if to in others.facts else others.named(to)
        if to in others.other_keys:
            return {"error": f"{to} has another bank key, and could open no stub of this gateway: copy the key file"}
        if to == ANY and not others.facts:
            return {"error": "no other gateway lives that has a bank key of this one"}
        if to != ANY and to not in others.facts:
            alive = ", ".join(sorted([*others.facts, *others.other_keys]))
            return {"error": f"no gateway lives at {to}; others that do: {alive or 'none'}"}
        candidates: list[Candidate] = []
        lacking: Counter[str] = Counter()
        for sa in sas:
            assert sa.published is not None
            names = [child.name for child in sa.children]
            targets = order(sa.published, others.facts) if to == ANY else [to]
            reasons = {target: others.lacks(target, sa.connection, names) for target in targets}
            able = [target for target in targets if reasons[target] is None]
            if able:
                assert sa.remote is not None
                known = [(target, address) for target in able for address in others.at(target, sa.remote.address)]
                candidates.append(Candidate(sa, known))
            else:
                lacking[next(reason for reason in reasons.values() if reason)] += 1
        if sas and not candidates:
            return {"error": f"{to} could resume no session of this gateway: {'; '.join(sorted(lacking))}"}
        wanted, sessions_at = math.ceil(request["share"] * len(sas)), {}
        if request.get("until_even"):
            try:
                sessions_at = await self._sessions_at(others, sas)
            except BankUnavailable as error:
                return {"error": f"the bank does not answer: {error}"}
            if to not in sessions_at:
                return {"error": f"{to} does not say how many sessions it has"}
            wanted = surplus(sessions_at, self._address or HERE, to)
        if self._under_way:
            # begun by another operator while the bank was asked
            return ALREADY
        # those known to have a sidecar first: fewer others are asked in vain
        random.shuffle(candidates)
        candidates.sort(key=lambda one: not one.sa.companion)
        plan = Plan(candidates, lacking, to, request["rate"], len(sas), wanted, sessions_at)
        tracker, bank, sender, ends = self._charon.tracker, self._bank, self._sender, self._elsewhere
        self._run = DrainRun(tracker, bank, sender, ends, plan, clock=self._clock, wall=self._wall)
        self._task = spawn("drain", self._run.run())
        log.info("drain-begins", to=to, sessions=len(sas), wanted=wanted)
        return await self.progress({})

    async def _sessions_at(self, others: OtherGateways, sas: Sequence[IkeSa]) -> dict[str, int]:
        """How many sessions this gateway has, and each other one that could resume some of its own. Raises
        BankUnavailable."""
        needs = {(sa.connection, tuple(child.name for child in sa.children)) for sa in sas}
        able = {name for name in others.facts if any(others.lacks(name, *need) is None for need in needs)}
        published = await others.sessions(self._bank)
        return {self._address or HERE: self._charon.tracker.count()[0]} | {
            name: count for name, count in sorted(published.items()) if name in able
        }

    async def progress(self, _: dict[str, Any]) -> dict[str, Any]:
        """How far the last run is."""
        if self._run is None:
            return {"error": "this gateway was not drained"}
        return self._run.progress()

    async def stop(self, _: dict[str, Any]) -> dict[str, Any]:
        """Ask no more clients, and wait for those that move."""
        if self._run is not None and self._task is not None and not self._task.done():
            self._run.stopping = True
            await asyncio.wait([self._task])
        return await self.progress({})

    def moving(self, message: StubMessage) -> None:
        """A client's report, not proved yet."""
        if self._run is not None:
            self._run.moving(message)
