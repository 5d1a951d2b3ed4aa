"""Rebuilt IKE_SAs between their installation and their activation. charon has them PASSIVE: their CHILD_SAs carry
traffic, their IKE messages are ignored.

An activation costs charon a walk of all its IKE_SAs, twice. So it is not on the way of an answer: what was installed
within a window of time shares one. Until then the first requests of clients come here, by a rule of the packet filter
(`tag` of bridge.net.queue_rules). A liveness check, which confirms the IKE_SA, is answered here, and charon is told the
next Message ID before the answer is sent, so that it continues there at any time, whatever happens to this process.
Any other authentic request makes the activation due and is held until it is over; charon then processes it, and
confirms by that.

In a crowd many share one activation anyway, and charon's confirmation costs less than one here: then the activation
comes before the answers, as it does where one is late, or the bank does not take what a confirmation changes. Those of
a crowd are rebuilt without the tag, so that their requests go to charon directly.

The first IKE_SA of each kind (suite, connection, forward secrecy) after charon's start is activated before its client
is answered, and confirmed by charon: were charon to derive other keys than this program, that would show here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Final

import structlog

from bridge.charon.charon import Charon
from bridge.charon.ha_channel import ChannelError
from bridge.charon.ha_segments import LONGEST_PAUSE
from bridge.gateway.activated import REPEAT_SECONDS, Activated, Way
from bridge.gateway.activation_state import ACTIVATION, Event, State
from bridge.gateway.metrics import GatewayMetrics
from bridge.gateway.rebuilt import Rebuilt
from bridge.gateway.rebuilt_state import State as RebuiltState
from bridge.gateway.strays import Strays
from bridge.ike.client_requests import ClientRequests, Kind
from bridge.ike.key_confirmation import possible
from bridge.ike.transforms import Suite
from bridge.net.interface import Packet

log = structlog.get_logger()

WINDOW_LEAST, WINDOW_MOST = 0.5, 2.0
"""seconds from an installation to the activation that it shares"""
WINDOW_SHARE: Final = 100
"""an activation that takes t makes the next window this many t, within these limits"""
GATHER_SECONDS, POLL_SECONDS = 0.05, 0.001
"""between two looks at the pace of activations, and at what is on its way"""
CROWD: Final = 256
"""requests between their admission and their answer, from which on IKE_SAs are activated before their clients are
answered: charon confirms them then, which is less work for the sidecar, and takes the time of an activation"""
LATE_SECONDS: Final = 1.0
"""an activation that is overdue for so long may not come soon"""
WORTH: Final = 3.0
"""an activation that takes t and that a client waits for waits so many t, at most, for others on their way"""
OVERDUE_SECONDS: Final = 5.0
"""after which charon may hang: unless it has read all that it was sent, nothing is answered in its name"""
RETRY_SECONDS: Final = 1.0
"""after an activation that failed"""
CLOSE_SECONDS: Final = 5.0
"""that a sidecar that stops waits for charon"""
HELD_OF_ONE, HELD_MAX = 8, 2048
"""requests held for one IKE_SA, which may be fragments of one; and for all"""

_Kind = tuple[Suite, str, bool]


@dataclass(slots=True, eq=False)
class _Entry:
    """One IKE_SA until it is active. Times in the clock's seconds."""

    made: Rebuilt
    since: float
    """its installation"""
    state: State = ACTIVATION.first
    requests: ClientRequests | None = None
    held: list[Packet] = field(default_factory=list)

    @property
    def way(self) -> Way:
        return Way(self.made.install.local, self.made.install.remote)

    def on(self, event: Event) -> None:
        self.state = ACTIVATION.after(self.state, event)


class Activation:
    """`answer` sends a message to a packet's sender; `able` returns whether first requests of clients come to `packet`,
    and what they confirm reaches the bank; `load` how many requests are between their admission and their answer,
    `coming` whether some of them are not being installed yet. It follows charon's installer."""

    def __init__(
        self,
        charon: Charon,
        metrics: GatewayMetrics,
        strays: Strays,
        answer: Callable[[Packet, bytes], None],
        able: Callable[[], bool],
        coming: Callable[[], bool],
        load: Callable[[], int],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._charon = charon
        self._metrics = metrics
        self._strays = strays
        self._answer = answer
        self._able = able
        self._coming = coming
        self._load = load
        self._clock = clock
        self._entries: dict[bytes, _Entry] = {}
        """those that are not active yet, by both SPIs"""
        self._passive: dict[bytes, float] = {}
        """of these, those that are to be activated, with the time when they were installed; the oldest first"""
        self._active = Activated()
        self._held = 0
        self._proven: set[Hashable] = set()
        """kinds of which charon has confirmed an IKE_SA"""
        self._proven_in: int | None = None
        """by which charon"""
        self._landed = asyncio.Event()
        self._wanted = asyncio.Event()
        charon.installer.watcher = self

    def __len__(self) -> int:
        """How many are not active yet."""
        return len(self._entries)

    def is_crowded(self) -> bool:
        """Whether IKE_SAs are activated before their clients are answered."""
        return self._load() >= CROWD

    def can_confirm(self, made: Rebuilt) -> bool:
        """Whether the first request on an IKE_SA that was just installed can be answered here."""
        installed_in = self._charon.installer.where
        if installed_in != self._proven_in:
            self._proven.clear()
            self._proven_in = installed_in
        return (
            made.tagged
            and not self.is_crowded()
            and _kind(made) in self._proven
            and possible(made.install.suite)
            and self._able()
            and self._comes_soon()
        )

    def _comes_soon(self) -> bool:
        """Whether activations work: what a client is told now holds only once charon answers it."""
        late = bool(self._passive) and self._clock() - self._oldest > self._window + LATE_SECONDS
        return not late and not self._charon.installer.is_blocked()

    def has(self, made: Rebuilt) -> bool:
        """Whether charon has it, PASSIVE or active."""
        spis = made.sa.id.spis
        return spis in self._entries or spis in self._active

    def landed(self, made: Rebuilt) -> None:
        """charon has it PASSIVE, and its client is about to be answered."""
        spis, now = made.sa.id.spis, self._clock()
        if not self._charon.installer.is_passive(spis):
            # it was removed while charon took it in
            return
        self._entries[spis] = _Entry(made, now)
        self._passive[spis] = now
        self._landed.set()

    def verified(self, spis: bytes) -> None:
        """A request on an IKE_SA verified. If charon did that alone, others of its kind can be confirmed here."""
        kind = self._active.proven(spis)
        if kind is not None:
            self._proven.add(kind)

    def gone(self, spis: bytes) -> None:
        """charon ended an IKE_SA."""
        self._charon.installer.forget(spis)
        self._end(spis)

    # bridge.charon.installer.Watcher

    def begins(self, spis: Sequence[bytes]) -> None:
        """These are being activated."""
        for one in spis:
            if (entry := self._entries.get(one)) is not None:
                entry.on(Event.BEGINS)
                self._passive.pop(one, None)
        self._wanted.clear()

    def done(self, spis: Sequence[bytes]) -> None:
        """charon has these established: what was held is for it."""
        self._metrics.activation_seconds.observe(self._charon.installer.toggle_seconds)
        now = self._clock()
        for one in spis:
            if (entry := self._entries.pop(one, None)) is not None:
                entry.on(Event.DONE)
                self._keep(one, entry, now)
                for packet in self._let_go(entry):
                    packet.accept()
        if any(one in self._active for one in spis):
            self._charon.sas_soon()
        asyncio.get_running_loop().call_later(REPEAT_SECONDS + 1, self._forget_old)

    def _keep(self, spis: bytes, entry: _Entry, now: float) -> None:
        """Keep of one that is active what may be needed."""
        self._active.add(spis, now)
        if entry.requests is None:
            if (kind := _kind(entry.made)) not in self._proven:
                self._active.prove(spis, kind)
        elif entry.requests.last is not None:
            self._active.answered(spis, entry.way, entry.requests.last)

    def failed(self, spis: Sequence[bytes]) -> None:
        """They stay PASSIVE."""
        for one in spis:
            if (entry := self._entries.get(one)) is not None:
                entry.on(Event.FAILED)
                self._passive[one] = entry.since
        self._landed.set()

    def lost(self, spis: Sequence[bytes]) -> None:
        """charon does not have these any more."""
        for one in spis:
            self._end(one)

    def _end(self, spis: bytes) -> None:
        entry = self._entries.pop(spis, None)
        self._passive.pop(spis, None)
        self._active.end(spis)
        if entry is not None:
            entry.on(Event.ENDED)
            for packet in self._let_go(entry):
                packet.drop()

    def _forget_old(self) -> None:
        self._active.forget_old(self._clock())

    def _let_go(self, entry: _Entry) -> list[Packet]:
        held, entry.held = entry.held, []
        self._held -= len(held)
        return held

    # packets

    def packet(self, packet: Packet) -> None:
        """A request on an IKE_SA whose SPIr has the tag."""
        spis = packet.ike[:16]
        entry = self._entries.get(spis)
        if entry is None:
            if spis in self._active:
                self._on_active(packet, spis)
            else:
                self._not_here(packet, spis)
            return
        if entry.made.state is RebuiltState.REMOVED or not possible(entry.made.install.suite):
            # in the second case its client has no answer yet, so this is from another
            packet.drop()
            return
        requests = entry.requests
        if requests is None:
            requests = entry.requests = ClientRequests(entry.made.resumption, random=os.urandom)
        kind = requests.kind(packet.ike)
        if kind is Kind.REPEATED and requests.last is not None:
            self._repeat(spis, entry.way, requests.last.answer, packet)
        elif kind is Kind.NOTHING:
            self._strays.take(packet)
        elif kind is Kind.LIVENESS and self._may_answer(entry, packet, requests):
            packet.drop()
            self._answer(packet, requests.answer(packet.ike))
            self._metrics.checks_answered.inc()
            self._verified(entry, requests)
        else:
            self._hold(entry, packet)

    def _not_here(self, packet: Packet, spis: bytes) -> None:
        """charon processes requests of its own IKE_SAs whose SPIr ends like this, and of those that were activated. It
        may have some that are not known here: one that was rekeyed waits for its DELETE."""
        if spis in self._charon.tracker.sas or not self._charon.reconciled.is_set():
            packet.accept()
        else:
            self._strays.pass_on(packet)

    def _on_active(self, packet: Packet, spis: bytes) -> None:
        repeated = self._active.repeated(spis, packet.ike)
        if repeated is not None:
            self._repeat(spis, *repeated, packet)
        else:
            packet.accept()

    def _repeat(self, spis: bytes, way: Way, answer: bytes, packet: Packet) -> None:
        packet.drop()
        if way.is_of(packet) and spis in self._charon.tracker.sas:
            self._answer(packet, answer)

    def _is_overdue(self, entry: _Entry) -> bool:
        return self._clock() - entry.since > OVERDUE_SECONDS

    def _may_answer(self, entry: _Entry, packet: Packet, requests: ClientRequests) -> bool:
        """Whether a liveness check is answered here: charon is there, and expects the next request now."""
        return (
            entry.state is State.PASSIVE
            and entry.way.is_of(packet)
            and self._charon.installer.set_next_id_now(
                entry.made.sa.id, requests.expected + 1, idle=self._is_overdue(entry)
            )
        )

    def _hold(self, entry: _Entry, packet: Packet) -> None:
        if any(other.held and packet.ike == other.ike for other in entry.held):
            packet.drop()
        elif len(entry.held) >= HELD_OF_ONE or self._held >= HELD_MAX:
            # its client sends it again
            packet.drop()
        else:
            entry.held.append(packet)
            self._held += 1
            self._metrics.requests_held.inc()
        if entry.state is State.PASSIVE:
            self._wanted.set()

    def _verified(self, entry: _Entry, requests: ClientRequests) -> None:
        self._charon.tracker.verified(entry.made.sa.id, requests.expected)

    # activations

    async def run(self) -> None:
        """Activate what was installed, when it is due, until cancelled."""
        while True:
            await self._landed.wait()
            self._landed.clear()
            while self._passive:
                await self._until_due()
                try:
                    await self._charon.installer.activate()
                except Exception as error:
                    # whatever it is, clients wait for their SAs
                    known = isinstance(error, ChannelError)
                    level, cause = (log.warning, None) if known else (log.error, error)
                    level("activation-failed", sas=len(self._passive), reason=str(error), exc_info=cause)
                    await asyncio.sleep(RETRY_SECONDS)
                for spis in [one for one in self._passive if not self._charon.installer.is_passive(one)]:
                    self._end(spis)

    async def _until_due(self) -> None:
        installer = self._charon.installer
        while self._passive:
            if self._wanted.is_set():
                pause = min(installer.wait(), GATHER_SECONDS)
                if not pause and not self._is_worth_waiting():
                    return
                await asyncio.sleep(pause or POLL_SECONDS)
                continue
            left = self._oldest + self._window - self._clock()
            if left <= 0:
                self._wanted.set()
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._wanted.wait()

    @property
    def _oldest(self) -> float:
        return next(iter(self._passive.values()))

    @property
    def _window(self) -> float:
        return min(max(WINDOW_SHARE * self._charon.installer.toggle_seconds, WINDOW_LEAST), WINDOW_MOST)

    def _is_worth_waiting(self) -> bool:
        worth = min(WORTH * self._charon.installer.toggle_seconds, LONGEST_PAUSE)
        return self._coming() and self._clock() - self._oldest < worth

    async def close(self) -> None:
        """Have charon continue with what clients have confirmed; all others were removed. `run` must have ended."""
        if self._passive:
            try:
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self._charon.installer.activate()
            except (ChannelError, TimeoutError) as error:
                # the next sidecar finds them
                log.warning("activation-failed", sas=len(self._passive), reason=str(error) or "charon hangs")
        for spis in [*self._entries, *self._active]:
            self._end(spis)


def _kind(made: Rebuilt) -> _Kind:
    return made.install.suite, made.install.connection, bool(made.install.g_ir)
