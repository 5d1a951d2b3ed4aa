"""Where a gateway finds the stubs that requests name: in the bank, or in the requests themselves, where clients hold
their own (`sync.client_stub`).

No stub counts whose session ended here or went on from here, whatever the bank says: it may have forgotten. A client's
stub counts only with the request's PROOF under it, and not where the bank knows that its session ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Final

import structlog

from bridge.bank.interface import BankUnavailable, StubBank
from bridge.bank.prefetch import Prefetch
from bridge.gateway.client_stubs import ClientStubs
from bridge.gateway.known_sessions import KnownSessions
from bridge.gateway.metrics import GatewayMetrics
from bridge.ike.resumption_request import verify_request
from bridge.ike.sync_messages import SyncRequest
from bridge.service.tasks import end
from bridge.stub.stub import Index, Stub

log = structlog.get_logger()


MARKS_SECONDS: Final = 0.1
"""that marks of locked-out identities may come later than stubs"""


class Missing(StrEnum):
    """Why there is no stub."""

    NO_STUB = "no-stub"
    BANK_UNAVAILABLE = "bank-unavailable"


class StubLookup:
    """Finds stubs. `reachable` returns whether the bank is worth asking, `timeout` (s) how long it may take."""

    def __init__(
        self,
        stubs: Prefetch,
        bank: StubBank,
        handout: ClientStubs,
        known: KnownSessions,
        metrics: GatewayMetrics,
        *,
        reachable: Callable[[], bool],
        timeout: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._endings = known.endings
        self._stubs = stubs
        self._revocations = known.revocations
        self._bank = bank
        self._handout = handout
        self._metrics = metrics
        self._reachable = reachable
        self._timeout = timeout
        self._clock = clock

    async def find(self, requests: Sequence[SyncRequest]) -> list[Stub | Missing]:
        """The stub that each request names, or why there is none."""
        indexes = [Index(request.sync.gateway, request.sync.spi) for request in requests]
        held = [self._held(request, index) for request, index in zip(requests, indexes, strict=True)]
        stubs: dict[Index, Stub | None] = {}
        ended: dict[Index, bool | None] = {}
        # known from the heartbeat: no client shall wait to learn it
        if self._reachable():
            began = self._clock()
            try:
                async with asyncio.timeout(self._timeout):
                    await self._ask_both(indexes, held, stubs, ended)
            except (BankUnavailable, TimeoutError) as error:
                self._metrics.bank_errors.inc()
                reason = str(error) or f"no answer in {self._timeout} s"
                log.warning("bank-unreachable", component="lookup", reason=reason)
            finally:
                self._metrics.bank_seconds.observe(self._clock() - began)
        else:
            stubs.update(self._stubs.served(indexes))
        return [self._choose(index, own, stubs, ended) for index, own in zip(indexes, held, strict=True)]

    async def ended(self, indexes: Sequence[Index]) -> set[Index]:
        """Those whose sessions have ended or gone on, as far as the bank answers within the time of a look-up."""
        ended = {index for index in indexes if index in self._endings}
        asked = [index for index in indexes if index not in ended]
        if asked and self._reachable():
            with contextlib.suppress(BankUnavailable, TimeoutError):
                async with asyncio.timeout(self._timeout):
                    replies = await self._bank.ended(asked)
                ended |= {index for index, over in zip(asked, replies, strict=True) if over}
        return ended

    def _held(self, request: SyncRequest, index: Index) -> Stub | None:
        """The stub in the request, if it opens and the request proves that it is the sender's."""
        if request.sealed_stub is None:
            return None
        stub = self._handout.open(request.sealed_stub, index)
        return stub if stub is not None and verify_request(request, stub.suite.prf, stub.sk_d) else None

    async def _ask_both(
        self,
        indexes: Sequence[Index],
        held: Sequence[Stub | None],
        stubs: dict[Index, Stub | None],
        ended: dict[Index, bool | None],
    ) -> None:
        """Stubs, and in the same time whether other identities are locked out than before."""
        if self._revocations.fresh:
            await self._ask(indexes, held, stubs, ended)
            return
        # tasks both of them: their questions go out together, the stubs' over the connection that was used last
        asked = asyncio.ensure_future(self._ask(indexes, held, stubs, ended))
        marks = asyncio.ensure_future(self._revocations.look())
        try:
            await asked
            # where the bank does not answer, a stub that was fetched before does not wait for it longer
            await asyncio.wait({marks}, timeout=MARKS_SECONDS)
        finally:
            await end(asked, marks)
        if not marks.cancelled() and (error := marks.exception()) and not isinstance(error, BankUnavailable):
            raise error

    async def _ask(
        self,
        indexes: Sequence[Index],
        held: Sequence[Stub | None],
        stubs: dict[Index, Stub | None],
        ended: dict[Index, bool | None],
    ) -> None:
        """Fill in what the bank says."""
        pairs = list(zip(indexes, held, strict=True))
        prefer = self._handout.policy == "prefer"
        wanted = list(dict.fromkeys(index for index, own in pairs if own is None or not prefer))
        if wanted:
            stubs.update(zip(wanted, await self._stubs.get(wanted), strict=True))
        doubtful = list(dict.fromkeys(index for index, own in pairs if own is not None and stubs.get(index) is None))
        if doubtful:
            ended.update(zip(doubtful, await self._bank.ended(doubtful), strict=True))

    def _choose(
        self, index: Index, own: Stub | None, stubs: dict[Index, Stub | None], ended: dict[Index, bool | None]
    ) -> Stub | Missing:
        if index in self._endings or ended.get(index):
            return Missing.NO_STUB
        stub = stubs.get(index)
        if stub is not None:
            return stub
        if own is not None:
            self._metrics.presented.inc()
            return own
        return Missing.NO_STUB if index in stubs else Missing.BANK_UNAVAILABLE
