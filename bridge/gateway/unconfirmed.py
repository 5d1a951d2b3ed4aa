"""The IKE_SAs that were rebuilt here and have not proved themselves: the table of them, and how each leaves it
(protocol rules 2 and 3). Their states are those of bridge.gateway.rebuilt_state.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import structlog

from bridge.bank.interface import Move
from bridge.bank.write_queue import WriteQueue
from bridge.charon.charon import Charon
from bridge.charon.ha_channel import ChannelError
from bridge.charon.ha_message import IkeId
from bridge.charon.ike_sa import IkeSa
from bridge.charon.vici_types import ViciError
from bridge.gateway.admission import Source, source_of
from bridge.gateway.client_stubs import ClientStubs
from bridge.gateway.endings import Endings
from bridge.gateway.metrics import GatewayMetrics
from bridge.gateway.rebuilt import Rebuilt
from bridge.gateway.rebuilt_state import Event, State
from bridge.gateway.recent import Recent
from bridge.service.tasks import end, spawn
from bridge.stub.stub import Index, Stub
from bridge.stub.types import Endpoint

log = structlog.get_logger()

LATE_SECONDS = 30.0
"""how long after its SA was confirmed a request may still lie in a queue, or be repeated by a client that was slow"""


class Unconfirmed:
    """The rebuilt SAs that wait for their first verified request, oldest first. `confirm_timeout` in seconds; `ended`
    returns those indexes whose sessions ended or went on elsewhere."""

    def __init__(
        self,
        charon: Charon,
        endings: Endings,
        ended: Callable[[Sequence[Index]], Awaitable[AbstractSet[Index]]],
        handout: ClientStubs,
        writer: WriteQueue,
        metrics: GatewayMetrics,
        *,
        confirm_timeout: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._charon = charon
        self._endings = endings
        self._ended = ended
        self._handout = handout
        self._writer = writer
        self._metrics = metrics
        self.on_resumed: Callable[[IkeSa, Stub], None] = lambda sa, old: None
        """called with a confirmed SA and the stub that it was made from"""
        self._confirm_timeout = confirm_timeout
        self._clock = clock
        self._by_digest: dict[bytes, Rebuilt] = {}
        self._by_spis: OrderedDict[bytes, Rebuilt] = OrderedDict()
        self._by_index: dict[Index, list[Rebuilt]] = {}
        self._by_source: Counter[Source] = Counter()
        self._confirmed: Recent[tuple[bytes, Endpoint]] = Recent(LATE_SECONDS, clock=clock)
        self._drops: set[asyncio.Task[None]] = set()
        self._verified: list[Rebuilt] = []
        """those that are about to be confirmed together"""
        self._confirming: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Remove all of them, but for those that their clients have confirmed."""
        if self._confirming:
            # no longer than a look-up
            await asyncio.wait(self._confirming)
        await end(*self._drops)
        with contextlib.suppress(ChannelError):
            await self._remove(list(self._by_spis.values()), Event.CLOSED)

    def __len__(self) -> int:
        return len(self._by_spis)

    def __contains__(self, made: Rebuilt) -> bool:
        return self._by_spis.get(made.sa.id.spis) is made

    def of_request(self, digest: bytes) -> Rebuilt | None:
        """What a request with this digest made."""
        return self._by_digest.get(digest)

    def is_over(self, spi_i: bytes, peer: Endpoint) -> bool:
        """Whether a request with this SPIi, from where the confirmed SA's client is, comes too late: it has its SA."""
        return (spi_i, peer) in self._confirmed

    def of_source(self, source: Source) -> int:
        """How many wait that clients of one source asked for."""
        return self._by_source[source]

    def attempts(self, index: Index) -> int:
        """How many wait that were made from one stub."""
        return len(self._by_index.get(index, ()))

    def made_from(self, index: Index) -> set[bytes]:
        """The SAs that wait and were made from one stub, by both SPIs."""
        return {made.sa.id.spis for made in self._by_index.get(index, ())}

    def add(self, made: Rebuilt) -> None:
        """One that is about to be installed."""
        self._by_digest[made.digest] = made
        self._by_index.setdefault(made.old.index, []).append(made)
        self._by_spis[made.sa.id.spis] = made
        self._by_source[source_of(made.install.remote.address)] += 1
        self._charon.tracker.adopt(made.sa)
        self._charon.tracker.granted.put(made.sa)

    def installed(self, made: Rebuilt) -> None:
        """charon has it: from now on its client has `confirm_timeout`."""
        made.on(Event.INSTALLED)
        made.deadline = self._clock() + self._confirm_timeout

    def verified(self, ike_id: IkeId) -> None:
        """Rule 2: the first request that verified under the new keys confirms the SA."""
        made = self._by_spis.get(ike_id.spis)
        if made is None:
            return
        before = made.state
        made.on(Event.VERIFIED)
        if made.state is before:
            return
        self._verified.append(made)
        if len(self._verified) == 1:
            task = spawn("confirm", self._confirm())
            self._confirming.add(task)
            task.add_done_callback(self._confirming.discard)

    async def _confirm(self) -> None:
        """Confirm those that verified in one pass of the event loop: in a storm these are many. Their sessions may have
        ended, or gone on elsewhere, since their stubs were looked up."""
        verified, self._verified = self._verified, []
        try:
            ended = await self._ended([made.old.index for made in verified])
        except Exception:
            # as where the bank is away: the clients have proved the keys, and this gateway knows of no end
            log.exception("confirmed-without-bank", sas=len(verified))
            ended = frozenset()
        over: list[Rebuilt] = []
        for made in verified:
            if made not in self:
                continue
            if made.old.index in ended or made.old.index in self._endings:
                over.append(made)
            else:
                self._confirmed_now(made)
        if over:
            await self._ended_before(over)

    async def _ended_before(self, over: Sequence[Rebuilt]) -> None:
        """The sessions of these had ended when their clients confirmed them."""
        for made in over:
            log.info("sa-ended-before-confirmed", old_gateway=made.old.index.gateway, **made.sa.id.logged)
            self.forget(made, Event.ENDED)
        try:
            # with a DELETE: their clients take the sessions for resumed
            await self._charon.end({made.sa.id.spis for made in over})
        except ViciError as error:
            log.warning("ended-sas-not-removed", reason=str(error), sas=len(over))

    def _confirmed_now(self, made: Rebuilt) -> None:
        made.on(Event.LIVES)
        self._take_out(made)
        index, sa = made.old.index, made.sa
        self._leave_old(made)
        self._confirmed.add((sa.id.spi_i, made.install.remote))
        self._charon.tracker.has_come_up(sa)
        self._metrics.resumed.inc()
        self.on_resumed(sa, made.old)
        if not self._charon.installer.is_passive(sa.id.spis):
            # of one that is, VICI has little to say
            self._charon.sas_soon()
        log.info(
            "sa-resumed",
            connection=sa.connection,
            spi_i=sa.id.spi_i.hex(),
            spi_r=sa.id.spi_r.hex(),
            peer=sa.remote.address if sa.remote else "",
            old_gateway=index.gateway,
            old_spi=index.spi.hex(),
        )

    def _leave_old(self, made: Rebuilt) -> None:
        """The session went on as `made`: what it was before, and other attempts to resume it, are over."""
        index = made.old.index
        others = [other for other in self._by_index.get(index, ()) if other is not made]
        for other in others:
            self.forget(other, Event.SUPERSEDED)
        self._endings.add(index, made.old.expires)
        # whatever the old gateway may have written since: the session is here now. A mark asks that gateway to end it
        new, until = self._handout.index(made.sa), max(made.old.expires, made.old.rekey_at)
        move = Move(new, until) if new.gateway != index.gateway else None
        self._writer.submit_delete(index, expires=made.old.expires, move=move)
        if others:
            self._later("drop", self.drop([other.sa.id for other in others], kept=True))
        # the old SA is here too: the client lost its path, not this gateway
        for spis in {made.old.spi_i + made.old.spi_r, *(leftover.spis for leftover in made.leftovers)}:
            if (old := self._charon.tracker.sas.get(spis)) is not None:
                self._later("end", self._end(old))

    def gone(self, sa: IkeSa) -> None:
        """charon ended an SA: nothing waits for it any more."""
        made = self._by_spis.get(sa.id.spis)
        if made is not None:
            if made.state is State.CONFIRMING:
                # its client proved the keys, and ended or rekeyed it before the bank answered
                self._leave_old(made)
            self.forget(made, Event.GONE)

    def forget(self, made: Rebuilt, why: Event) -> None:
        """It will never be confirmed."""
        if made not in self:
            return
        was = made.state
        made.on(why)
        self._take_out(made)
        self._charon.tracker.forget(made.sa.id)
        if was is State.UNCONFIRMED and self._handout.policy != "off":
            # its client got a stub of it: worth nothing now
            self._endings.add(self._handout.index(made.sa), made.sa.expires)
            self._writer.submit_delete(self._handout.index(made.sa), expires=made.sa.expires)

    def _take_out(self, made: Rebuilt) -> None:
        self._by_digest.pop(made.digest, None)
        if self._by_spis.pop(made.sa.id.spis, None) is not None:
            source = source_of(made.install.remote.address)
            self._by_source[source] -= 1
            if not self._by_source[source]:
                del self._by_source[source]
        attempts = self._by_index.get(made.old.index, [])
        if made in attempts:
            attempts.remove(made)
        if not attempts:
            self._by_index.pop(made.old.index, None)

    async def remove_late(self) -> None:
        """Remove what was not confirmed in time."""
        now = self._clock()
        late = []
        for made in self._by_spis.values():
            if made.state is State.UNCONFIRMED:
                if made.deadline > now:
                    break
                late.append(made)
        try:
            await self._remove(late, Event.LATE)
        except ChannelError as error:
            log.warning("unconfirmed-not-removed", reason=str(error))
        for made in late:
            self._metrics.removed.inc()
            log.info(
                "sa-unconfirmed-removed",
                spi_i=made.sa.id.spi_i.hex(),
                spi_r=made.sa.id.spi_r.hex(),
                peer=made.install.remote.address,
            )

    async def _remove(self, gone: list[Rebuilt], why: Event) -> None:
        """Raises ChannelError; charon's installer repeats what it could not tell charon."""
        ike_ids = [made.sa.id for made in gone]
        shared = self._charon.sharing(ike_ids)
        # before anything is waited for: none of them can be confirmed meanwhile
        for made in gone:
            self.forget(made, why)
        if gone and self._charon.channel.ready():
            await self._charon.remove(ike_ids, sharing=shared)

    def _later(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = spawn(name, work)
        self._drops.add(task)
        task.add_done_callback(self._drops.discard)

    async def _end(self, old: IkeSa) -> None:
        try:
            await self._charon.end_surely(old)
        except ChannelError as error:
            log.warning("old-sa-not-removed", reason=str(error), **old.id.logged)

    async def drop(self, ike_ids: list[IkeId], *, kept: bool = False, sharing: Collection[bytes] | None = None) -> None:
        """Take from charon what a confirmed SA stands for, or what was given up. `kept`: another SA has their
        addresses; `sharing` as of Charon.remove."""
        try:
            await self._charon.remove(ike_ids, kept=kept, sharing=sharing)
        except ChannelError as error:
            log.warning("old-sa-not-removed", reason=str(error))
