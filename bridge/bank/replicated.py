"""Stubs in more banks than one: distributed and mixed, draft-xu-ike-sa-sync-01 section 3.5.

A gateway's own bank is *near*, all others are *far*: those of its peers, and in mode mixed the central one. What makes
copies agree is in the banks themselves (redis/*.lua): of two revisions the newer stays, and a session that ended is
never stored again. So changes may come to them in any order, and more than once.

    store     near, central, and the banks of the stub's targets
    delete    everywhere: in each bank that has a copy or could get one
    get       near and central in parallel; what neither has is asked of all peers in parallel, for a bounded time. An
              end that any of them knows of counts, and of several copies the one with the greatest revision

A bank that was away may have missed ends. What only the near bank says is asked of the others too until it has caught
up: it knows all ends that they know.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from hashlib import blake2b
from typing import Any

import structlog

from bridge.bank.catch_up import CatchUp
from bridge.bank.interface import (
    DOWNLOAD_BATCH,
    AddressEntry,
    BankUnavailable,
    Ending,
    GatewaySign,
    Marked,
)
from bridge.bank.replica import Replica
from bridge.bank.replicas import Replicas, each_of
from bridge.service.tasks import end, spawn
from bridge.stub.readable import Readable
from bridge.stub.stub import Index, Stub

log = structlog.get_logger()


class ReplicatedBank:
    """StubBank over a near bank, a central one if there is any, and those of `peers`, by their gateways' addresses.

    Stubs go to the peers in `targets`, or without any to `copies` of the peers, by the stub's index. A look-up waits
    `peer_timeout` s for peers. `on_return` is called when one of the banks is back: it may have lost what it held.
    """

    def __init__(
        self,
        near: Replica,
        central: Replica | None,
        peers: Sequence[Replica],
        *,
        targets: Sequence[str] = (),
        copies: int = 1,
        peer_timeout: float = 0.1,
    ) -> None:
        self.on_return: Callable[[], None] = lambda: None
        self.near = near
        self._banks = banks = Replicas(near, central, peers, peer_timeout)
        self._catch_up = CatchUp(near, banks.far)
        for tier in banks.all:
            tier.bank.on_return = partial(self._returned, tier)
        self._targets = [peer for peer in peers if peer.name in targets]
        self._copies = copies
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Serve: watch the banks, bring them what they missed, and catch up with them."""
        self._returned(self.near)
        for tier in self._banks.all:
            tier.on_up = self._returned
            tier.start()
        self._banks.serving = True
        self._task = spawn("catch-up", self._catch_up.run())

    async def close(self) -> None:
        """Let go of all banks."""
        if self._task is not None:
            await end(self._task)
        await self._banks.close()

    def _returned(self, tier: Replica) -> None:
        self._catch_up.returned(tier)
        self.on_return()

    @property
    def unreadable(self) -> int:
        """Stubs found that did not open."""
        return sum(tier.bank.unreadable for tier in self._banks.all)

    @property
    def spoilt(self) -> int:
        """Keys and members found that no gateway writes."""
        return sum(tier.bank.spoilt for tier in self._banks.all)

    @property
    def pending(self) -> int:
        """Changes that one bank has and another one has yet to get."""
        return sum(tier.pending for tier in self._banks.all)

    def status(self) -> list[dict[str, Any]]:
        """For `ike-sa-sync status`: each bank."""
        return [tier.status() for tier in self._banks.all]

    # Initiate, Update, Delete

    def holders(self, index: Index) -> list[Replica]:
        """The banks that a stub of this gateway is stored in."""
        chosen = self._targets or sorted(self._banks.peers, key=lambda peer: _weight(peer.name, index))[: self._copies]
        return [self.near, *([self._banks.central] if self._banks.central else []), *chosen]

    async def store(self, stubs: Sequence[Stub]) -> list[bool]:
        """See StubBank and `change`."""
        return (await self.change(stubs, ()))[0]

    async def delete(self, endings: Sequence[Ending]) -> list[bool]:
        """See StubBank and `change`."""
        return (await self.change((), endings))[1]

    async def change(self, stubs: Sequence[Stub], endings: Sequence[Ending]) -> tuple[list[bool], list[bool]]:
        """See StubBank. Stored is what one bank has; False where one of those that it belongs in refused. Deleted is
        what any bank deleted. Banks that did not do their part get it later.

        Without `start` nothing would bring it to them: then a deletion that one did not take raises BankUnavailable.
        """
        shares: dict[Replica, list[int]] = {tier: [] for tier in self._banks.all} if endings else {}
        for position, stub in enumerate(stubs):
            for tier in self.holders(stub.index):
                shares.setdefault(tier, []).append(position)
        serving = self._banks.serving or not endings
        asked = [tier for tier in shares if tier.up or not serving] or list(shares)
        outcomes = await each_of(
            asked, lambda tier: tier.change([stubs[position] for position in shares[tier]], endings)
        )
        taken: dict[int, bool] = {}
        for tier, (stored, _) in outcomes.items():
            for position, done in zip(shares[tier], stored, strict=True):
                taken[position] = taken.get(position, True) and done
        away = [tier for tier in shares if tier not in outcomes]
        if len(taken) < len(stubs) or (endings and not outcomes):
            raise BankUnavailable("none of the banks took it")
        if away and not serving:
            names = ", ".join(tier.name for tier in away)
            raise BankUnavailable(f"deleted, but not in the bank of {names}, which does not answer: repeat it later")
        for tier in away:
            for position in shares[tier]:
                tier.store_later(stubs[position])
            for ending in endings:
                tier.delete_later(ending)
        deleted = [any(done) for done in zip(*(gone for _, gone in outcomes.values()), strict=True)]
        return [taken[position] for position in range(len(stubs))], deleted

    # GET

    async def get(self, indexes: Sequence[Index]) -> list[Stub | None]:
        """See StubBank. What no bank has within its time is None."""
        found: dict[Index, Stub] = {}
        ended: set[Index] = set()
        first = [tier for tier in (self.near, self._banks.central) if tier is not None and tier.up]
        answered = await self._look(dict.fromkeys(first, indexes), None, found, ended)
        missing = [index for index in indexes if index not in found and index not in ended]
        at_hand = list(found)
        questions: dict[Replica, Sequence[Index]] = {}
        for tier in self._banks.far:
            wanted = missing + at_hand if tier in self._catch_up else missing
            if wanted and tier not in first and tier.up:
                questions[tier] = wanted
        answered += await self._look(questions, self._banks.peer_timeout, found, ended)
        if not answered and indexes:
            raise BankUnavailable("none of the banks answers")
        return [None if index in ended else found.get(index) for index in indexes]

    async def _look(
        self,
        questions: dict[Replica, Sequence[Index]],
        timeout: float | None,
        found: dict[Index, Stub],
        ended: set[Index],
    ) -> int:
        """Ask banks in parallel, adding to `found` and `ended`; how many answered."""
        answers = await each_of(questions, lambda tier: tier.answer(tier.bank.look(questions[tier]), timeout))
        for tier, rows in answers.items():
            for index, (stub, over) in zip(questions[tier], rows, strict=True):
                if over:
                    ended.add(index)
                if stub is not None and (index not in found or found[index].revision < stub.revision):
                    found[index] = stub
        return len(answers)

    async def look(self, indexes: Sequence[Index]) -> list[tuple[Stub | None, bool]]:
        """See StubBank."""
        over = await self.ended(indexes)
        return [(stub, bool(gone)) for stub, gone in zip(await self.get(indexes), over, strict=True)]

    async def revisions(self, indexes: Sequence[Index]) -> list[int | None]:
        """See StubBank: of the banks that a stub should be in and that answer, the one that is most behind counts."""
        shares: dict[Replica, list[int]] = {}
        for position, index in enumerate(indexes):
            for tier in self.holders(index):
                if tier.up:
                    shares.setdefault(tier, []).append(position)
        answers = await each_of(
            shares, lambda tier: tier.answer(tier.bank.revisions([indexes[position] for position in shares[tier]]))
        )
        least: dict[int, int] = {}
        for tier, revisions in answers.items():
            for position, revision in zip(shares[tier], revisions, strict=True):
                if revision is not None:
                    least[position] = min(revision, least.get(position, revision))
        if not least and indexes:
            raise BankUnavailable("none of the banks answers")
        return [least.get(position) for position in range(len(indexes))]

    async def ended(self, indexes: Sequence[Index]) -> list[bool | None]:
        """See StubBank: an end that any bank knows of counts."""
        answers = await self._banks.ask_soon(lambda bank: bank.ended(indexes))
        return [
            None if all(each is None for each in known) else any(known) for known in zip(*answers.values(), strict=True)
        ]

    async def addresses(self, ranges: Sequence[tuple[str, str]]) -> list[AddressEntry]:
        """See StubBank: what any bank says."""
        answers = await self._banks.ask(lambda bank: bank.addresses(ranges))
        return list(dict.fromkeys(entry for entries in answers.values() for entry in entries))

    async def forget_addresses(self, entries: Sequence[AddressEntry]) -> None:
        """See StubBank: in all banks within reach."""
        await self._banks.ask(lambda bank: bank.forget_addresses(entries))

    async def endings(self) -> AsyncGenerator[list[Ending]]:
        """See StubBank: what any bank knows."""
        async with aclosing(self._banks.read_all(lambda tier: tier.bank.endings())) as pages:
            async for page in pages:
                yield page

    async def moved(self, indexes: Sequence[Index]) -> list[Marked]:
        """See StubBank: a mark in any bank counts."""
        answers = await self._banks.ask_soon(lambda bank: bank.moved(indexes))
        return [
            next(filter(None, marks), None if None in marks else False) for marks in zip(*answers.values(), strict=True)
        ]

    # Download

    async def download(self, gateway: str, batch: int = DOWNLOAD_BATCH) -> AsyncGenerator[list[Stub]]:
        """See StubBank: what is near first, then what only others have. A stub may come again at a newer revision."""
        seen: dict[Index, int] = {}

        async def read(tier: Replica) -> AsyncGenerator[list[Stub]]:
            async with aclosing(tier.bank.download(gateway, batch)) as pages:
                async for page in pages:
                    if tier is not self.near and self.near.up:
                        over = await self.near.bank.ended([stub.index for stub in page])
                        page = [stub for stub, gone in zip(page, over, strict=True) if not gone]
                    yield [stub for stub in page if seen.get(stub.index, -1) < stub.revision]

        async with aclosing(self._banks.read_all(read)) as pages:
            async for page in pages:
                seen.update((stub.index, stub.revision) for stub in page)
                yield page

    # gateways and keys

    async def reseal(self, gateway: str) -> int:
        """See StubBank: in all banks within reach."""
        return sum((await self._banks.ask(lambda bank: bank.reseal(gateway))).values())

    async def heartbeat(self, gateway: str, ttl: float) -> float:
        """See StubBank: in all banks, each at its own pace. One that was down and takes it is up again."""
        began = time.monotonic()
        near_up = self.near.up
        await self._banks.tell(lambda bank: bank.heartbeat(gateway, ttl))
        return max(self.near.behind if near_up else 0.0, time.monotonic() - began)

    async def leave(self, gateway: str) -> None:
        """See StubBank: in all banks, each at its own pace."""
        await self._banks.tell(lambda bank: bank.leave(gateway))

    async def gateways(self) -> dict[str, GatewaySign]:
        """See StubBank: a gateway lives if any bank says so, and has the keys that all of those name."""
        merged: dict[str, GatewaySign] = {}
        for signs in (await self._banks.ask_soon(lambda bank: bank.gateways())).values():
            for name, sign in signs.items():
                before = merged.get(name)
                if before is None or not before.alive:
                    merged[name] = sign
                elif sign.alive:
                    merged[name] = GatewaySign(True, before.keys & sign.keys)
        return merged

    async def post(self, kind: str, gateway: str, value: str, ttl: float) -> None:
        """See StubBank: in all banks within reach."""
        await self._banks.ask(lambda bank: bank.post(kind, gateway, value, ttl))

    async def posted(self, kind: str, gateway: str) -> bytes | None:
        """See StubBank: what any bank has."""
        answers = await self._banks.ask_soon(lambda bank: bank.posted(kind, gateway))
        return next((value for value in answers.values() if value is not None), None)

    async def revocation_stamp(self) -> bytes:
        """See StubBank: of the banks at hand; what only a peer's has comes with `revocations`. A bank that answers
        again is a change."""
        first = [tier for tier in (self.near, self._banks.central) if tier is not None and tier.up]
        asked, timeout = (first, None) if first else (self._banks.far, self._banks.peer_timeout)
        stamps = await each_of(asked, lambda tier: tier.answer(tier.bank.revocation_stamp(), timeout))
        if not stamps:
            raise BankUnavailable("none of the banks answers")
        return b" ".join([b"%s=%s" % (tier.name.encode(), stamp) for tier, stamp in stamps.items()])

    async def revocations(self) -> Sequence[Sequence[bytes]]:
        """See StubBank."""
        answers = await self._banks.ask(lambda bank: bank.revocations())
        return [marks for answer in answers.values() for marks in answer]

    async def put_revocations(self, marks: Mapping[bytes, int], stale: Collection[bytes]) -> None:
        """See StubBank. Gateways bring them to a bank that was away. Without `start`, where no gateway would, it raises
        BankUnavailable where one did not answer."""
        serving = self._banks.serving
        up = [tier for tier in self._banks.all if tier.up or not serving] or self._banks.all
        outcomes = await each_of(up, lambda tier: tier.answer(tier.bank.put_revocations(marks, stale)))
        if not outcomes:
            raise BankUnavailable("none of the banks took it")
        if not serving and len(outcomes) < len(self._banks.all):
            names = ", ".join(tier.name for tier in self._banks.all if tier not in outcomes)
            raise BankUnavailable(f"not taken by the bank of {names}, which does not answer: repeat it later")

    def renew(self) -> None:
        """See StubBank: of the one at hand, whose keyspace is watched from outside."""
        self.near.bank.renew()

    async def ping(self) -> float:
        """See StubBank: of the fastest."""
        return min((await self._banks.ask_soon(lambda bank: bank.ping(), patiently=())).values())

    # last: from here on `list` is this method in the annotations of the class

    async def list(self, gateway: str | None = None) -> AsyncGenerator[list[Readable]]:
        """See StubBank: each stub once, from the nearest bank that has it."""
        seen: set[Index] = set()
        async with aclosing(self._banks.read_all(lambda tier: tier.bank.list(gateway))) as pages:
            async for page in pages:
                yield [row for row in page if row.index not in seen]
                seen.update(row.index for row in page)


def _weight(peer: str, index: Index) -> bytes:
    """Rendezvous hashing: each stub ranks the peers its own way, and the ranks of the others stay when one goes."""
    return blake2b(b"%s/%s" % (peer.encode(), index.spi), digest_size=8).digest()
