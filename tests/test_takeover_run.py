"""Takeovers as a whole, of a gateway with a real tracker, on a charon and a bank in memory: what is taken, what is not,
who owns it, and what happens when one of them fails meanwhile."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from bank_support import stub_of
from bridge.bank.interface import BankUnavailable, Ending, GatewaySign, Taking
from bridge.bank.write_queue import WriteQueue
from bridge.charon.ha_segments import segment_of
from bridge.charon.ike_sa import IkeSa, sa_of
from bridge.charon.install import Install
from bridge.charon.sa_recovery import inherit
from bridge.charon.sa_tracker import SaTracker
from bridge.charon.vici_types import ChildConfig, ConnectionInfo, SaInfo, Unique, ViciError
from bridge.config import GatewayConfig, TakeoverConfig
from bridge.gateway import takeover_session as reasons
from bridge.gateway.endings import Endings
from bridge.gateway.known_sessions import KnownSessions
from bridge.gateway.living import LivingSas
from bridge.gateway.publisher import Publisher
from bridge.gateway.session_owner import SessionOwner
from bridge.gateway.taken_sessions import TakenSessions
from bridge.gateway.takeover import Takeover
from bridge.gateway.takeover_barriers import Barriers
from bridge.gateway.takeover_rekeys import MANY, OUTSTANDING
from bridge.gateway.takeover_run import SessionTaker
from bridge.gateway.takeover_session import Session, owned
from bridge.gateway.takeover_state import State
from bridge.stub.child_sa import wire_spi
from bridge.stub.derivation import Derivation
from bridge.stub.stub import Index, Stub
from bridge.stub.types import Endpoint, Identity

SHARED, OWN, OTHER, THIRD = "192.0.2.100", "192.0.2.2", "192.0.2.1", "192.0.2.3"
NOW = 1_700_000_000.0


class Bank:
    """Stubs by index, with owners."""

    def __init__(self) -> None:
        self.stubs: dict[Index, Stub] = {}
        self.away = False
        self.alive = {OTHER, THIRD}
        self.on_taken: Callable[[Index], None] = lambda _: None
        self.takes = 0
        self.posts: dict[tuple[str, str], str] = {}
        self.before_take: Callable[[], None] = lambda: None

    def _reach(self) -> None:
        if self.away:
            raise BankUnavailable("down")

    async def download(self, address: str, batch: int = 256) -> AsyncIterator[list[Stub]]:
        self._reach()
        all_stubs = [stub for index, stub in self.stubs.items() if index.gateway == address]
        for first in range(0, len(all_stubs), batch):
            yield all_stubs[first : first + batch]

    async def get(self, indexes: Sequence[Index]) -> list[Stub | None]:
        self._reach()
        return [self.stubs.get(index) for index in indexes]

    async def take(self, pairs: Sequence[tuple[Stub, Stub]]) -> list[Taking]:
        self._reach()
        self.takes += 1
        self.before_take()
        said = []
        for old, new in pairs:
            same = self.stubs.get(old.index) == old
            if same:
                self.stubs[old.index] = new
            said.append(Taking.TAKEN if same else Taking.CHANGED)
        return said

    async def change(self, stubs: Sequence[Stub], endings: Sequence[Ending]) -> tuple[list[bool], list[bool]]:
        self._reach()
        said = []
        for stub in stubs:
            held = self.stubs.get(stub.index)
            older = held is not None and epoch(held) > epoch(stub)
            if older:
                self.on_taken(stub.index)
            else:
                self.stubs[stub.index] = stub
            said.append(not older)
        return said, [self.stubs.pop(one.index, None) is not None for one in endings]

    async def posted(self, kind: str, gateway: str) -> bytes | None:
        self._reach()
        said = self.posts.get((kind, gateway))
        return None if said is None else said.encode()

    async def post(self, kind: str, gateway: str, value: str, ttl: float) -> None:
        self.posts[kind, gateway] = value

    async def gateways(self) -> dict[str, GatewaySign]:
        return {address: GatewaySign(alive=True, keys=frozenset()) for address in self.alive}


def epoch(stub: Stub) -> int:
    return stub.derivation.epoch if stub.derivation is not None else 0


class Charon:
    """It keeps what it is given. `on_install` is called while it is."""

    def __init__(self, unique: Unique = Unique.NO) -> None:
        listener = SimpleNamespace(changed=lambda _: None, gone=self._gone, verified=lambda _: None)
        self.tracker = SaTracker(listener, wall=lambda: NOW, clock=lambda: 0.0)
        self.home = ConnectionInfo("home", 14400, 0, (ChildConfig("net"),), unique=unique)
        self.tracker.connections = {"home": self.home}
        self.has: dict[bytes, Install] = {}
        self.state = "ESTABLISHED"
        self.removed: list[bytes] = []
        self.rekeyed: list[str] = []
        self.lists = 0
        self.lists_fail = 0
        self.started_at = 0.0
        self.batches: list[list[bytes]] = []
        self.installs = asyncio.Event()
        self.installs.set()
        self.on_install: Callable[[], None] = lambda: None
        self.reconciled = asyncio.Event()
        self.reconciled.set()
        self.channel = SimpleNamespace(version=5, receive=lambda: None, drained=self._nothing)
        self.resyncs: list[set[int]] = []
        self.installer = SimpleNamespace(install=self._install, set_next_id=self._nothing, resync=self._resync)
        self.landing = SimpleNamespace(segment_of=segment_of)
        self.vici = SimpleNamespace(list_sas=self._list, rekey_children=self._rekey, started=self._started)
        self.gone: Callable[[Any], None] = lambda _: None

    def _gone(self, sa: Any) -> None:
        self.gone(sa)

    def connection(self, name: str) -> ConnectionInfo | None:
        return self.tracker.connections.get(name)

    async def know_connections(self, _: Any) -> None:
        pass

    async def _nothing(self, *_: Any, **__: Any) -> None:
        pass

    async def _started(self) -> float:
        return self.started_at

    async def _install(self, batch: Sequence[Install]) -> None:
        await self.installs.wait()
        self.batches.append([install.id.spis for install in batch])
        self.has |= {install.id.spis: install for install in batch}
        self.on_install()

    async def _list(self, _: str) -> list[SaInfo]:
        self.lists += 1
        if self.lists_fail:
            self.lists_fail -= 1
            raise ViciError("busy")
        return [
            SaInfo(
                "home", one.id.spi_i, one.id.spi_r, False, 2, self.state, one.local, one.remote,
                (), one.remote_vips, 0, None, None, (), "", "", "", str(number),
            )
            for number, one in enumerate(self.has.values())
        ]  # fmt: skip

    async def _resync(self, segments: set[int]) -> None:
        self.resyncs.append(segments)

    async def _rekey(self, wanted: Sequence[tuple[str, str]]) -> list[str]:
        self.rekeyed += [unique_id for unique_id, _ in wanted]
        return [""] * len(wanted)

    def sharing(self, _: Any) -> set[bytes]:
        return set()

    async def remove(self, ike_ids: Sequence[Any], **_: Any) -> None:
        for ike_id in ike_ids:
            self.removed.append(ike_id.spis)
            self.has.pop(ike_id.spis, None)


class Fence:
    in_place = True

    async def around(self, _: Any) -> None:
        pass

    async def close(self) -> None:
        pass


class Gateway:
    """One gateway that has the shared address."""

    def __init__(self, bank: Bank, *, unique: Unique = Unique.NO) -> None:
        self.bank, self.charon = bank, Charon(unique)
        self.endings, self.writer = Endings(wall=lambda: NOW), WriteQueue(bank)
        self.living = LivingSas(self.charon.tracker)
        revocations: Any = SimpleNamespace(revoked=lambda _: False)
        self.revocations = revocations
        charon: Any = self.charon
        any_bank: Any = bank
        config = GatewayConfig(address=OWN, takeover=TakeoverConfig(addresses=(SHARED,)))
        known = KnownSessions(self.endings, self.living, revocations)
        publisher = Publisher(config, self.writer, any_bank, known, wall=lambda: NOW)
        self.owner = SessionOwner(OWN, charon, any_bank, publisher, self.writer, self.endings, wall=lambda: NOW)
        self.sessions = TakenSessions(charon, SimpleNamespace(), SimpleNamespace())  # type: ignore[arg-type]
        barriers = Barriers(charon, self.endings, self.living, revocations)
        came = lambda sa, _: self.living.put(sa)  # noqa: E731
        self.taker = SessionTaker(charon, any_bank, self.owner, self.sessions, barriers, came, wall=lambda: NOW)
        self.takeover = Takeover(
            (SHARED,), charon, self.owner, self.taker, self.sessions, Fence(),  # type: ignore[arg-type]
            present=lambda: (SHARED,),
        )  # fmt: skip
        self.owner.dropped = lambda sa: self.sessions.forget(sa.id.spis)
        self.charon.gone = self.sessions.gone
        self.charon.tracker.on_lost.append(self.takeover.lost)

    async def take(self, **more: Any) -> dict[str, Any]:
        """A takeover, until all is installed."""
        await self.takeover.take({"address": SHARED, **more})
        return await self.settled()

    async def settled(self) -> dict[str, Any]:
        await self.takeover._tasks[SHARED]
        return await self.takeover.progress({"address": SHARED})

    @property
    def spis(self) -> set[bytes]:
        """What charon has and the sidecar knows."""
        assert set(self.charon.tracker.sas) == set(self.charon.has)
        return set(self.charon.has)


numbers = itertools.count(1)


def stub(
    bank: Bank, *, owner: str = OTHER, identity: bytes | None = None, vip: str = "", began: float = NOW - 100, **of: Any
) -> Stub:
    """A session at the shared address that the bank has."""
    number = next(numbers)
    derivation = Derivation(b"i" * 32, b"r" * 32, b"s" * 32, b"", b"", 0, 4, 7, owner, **of)
    made = replace(
        stub_of(gateway=SHARED),
        derivation=derivation,
        remote_id=Identity(3, identity or b"client%d@example" % number),
        remote=Endpoint("198.51.100.7", 1024 + number),
        remote_vips=(vip,) if vip else (),
        established=int(began),
        expires=int(NOW) + 3600,
    )
    bank.stubs[made.index] = made
    return made


def both_spis(one: Stub) -> bytes:
    return one.spi_i + one.spi_r


async def test_all_sessions_are_taken_over_with_few_lists() -> None:
    """A list is of all IKE_SAs of a connection: one for each batch would cost the square of their number."""
    bank = Bank()
    gateway, stubs = Gateway(bank), [stub(bank) for _ in range(3000)]
    row = await gateway.take()
    assert (row["found"], row["not_taken"], row["under_way"]) == (3000, [], 3000)
    assert gateway.spis == {both_spis(one) for one in stubs}
    assert gateway.charon.lists < 10
    assert {one.derivation.owner for one in bank.stubs.values() if one.derivation} == {OWN}


async def test_many_clients_with_one_identity_are_taken_over() -> None:
    bank = Bank()
    gateway = Gateway(bank)
    for _ in range(12):
        stub(bank, identity=b"group@example")
    row = await gateway.take()
    assert (row["found"], row["not_taken"]) == (12, [])


@pytest.mark.parametrize("unique", [Unique.NO, Unique.REPLACE])
@pytest.mark.parametrize("newer_first", [True, False])
@pytest.mark.parametrize("apart", [True, False], ids=["two batches", "one batch"])
@pytest.mark.parametrize("one_second", [True, False], ids=["began in one second", "began at different times"])
async def test_of_two_sessions_of_one_client_the_newer_one_is_taken(
    unique: Unique, newer_first: bool, apart: bool, one_second: bool
) -> None:
    """A gateway that fails leaves the stub of a session that its client has replaced since. The same identity says so
    where the connection allows one session, the same virtual IP always. An IKE_SA may be rekeyed in its first second:
    that of the two stubs counts then that was stored later."""
    bank = Bank()
    gateway = Gateway(bank, unique=unique)
    same: dict[str, Any] = {"identity": b"alice@example"} if unique is Unique.REPLACE else {"vip": "10.20.0.7"}
    early = NOW - 10 if one_second else NOW - 1000
    times = (NOW - 10, early) if newer_first else (early, NOW - 10)
    pair = [stub(bank, began=times[0], **same)]
    for _ in range(20 if apart else 0):
        stub(bank)
    pair.append(stub(bank, began=times[1], **same))
    newer, older = pair if newer_first else reversed(pair)
    stored = replace(newer, revision=older.revision + 1)
    bank.stubs[newer.index] = stored
    await gateway.take()
    assert both_spis(newer) in gateway.spis
    assert both_spis(older) not in gateway.spis


async def test_a_session_of_an_identity_that_is_locked_out_is_not_taken_over() -> None:
    bank = Bank()
    gateway, locked_out, other = Gateway(bank), stub(bank), stub(bank)
    gateway.revocations.revoked = lambda of: of.index == locked_out.index
    row = await gateway.take()
    assert row["not_taken"] == [{"reason": reasons.REVOKED, "sessions": 1}]
    assert gateway.spis == {both_spis(other)}
    # nor is its owner another one
    assert bank.stubs[locked_out.index] == locked_out


async def test_a_client_that_has_another_session_here_keeps_that_one() -> None:
    """It connected to the gateway's own address meanwhile, and was given the same virtual IP."""
    bank = Bank()
    gateway, before = Gateway(bank), stub(bank, vip="10.0.0.9")
    here = sa_of(replace(stub_of(gateway=OWN), remote_vips=("10.0.0.9",)))
    here.up = True
    gateway.charon.tracker.adopt(here)
    gateway.charon.tracker.virtual_ips.put(here.id.spis, here.remote_vips, 0.0)
    row = await gateway.take()
    assert row["not_taken"] == [{"reason": reasons.CLASHES, "sessions": 1}]
    assert gateway.charon.has == {}
    assert bank.stubs[before.index] == before


async def test_a_session_that_ended_while_no_sidecar_ran_is_not_taken_over() -> None:
    """It is of this gateway, its charon has run since before it began, and does not have it."""
    bank = Bank()
    gateway = Gateway(bank)
    gateway.charon.started_at = NOW - 500
    over = stub(bank, owner=OWN, began=NOW - 100)
    of_the_charon_before = stub(bank, owner=OWN, began=NOW - 1000)
    interrupted = stub(bank, owner=OWN, began=NOW - 100, unkeyed=True)
    gateway.takeover._since_start = {SHARED}
    row = await gateway.take()
    assert row["not_taken"] == [{"reason": reasons.ENDED, "sessions": 1}]
    assert gateway.spis == {both_spis(of_the_charon_before), both_spis(interrupted)}
    await gateway.writer.flush()
    assert over.index not in bank.stubs


async def test_what_waits_to_be_written_takes_no_session_from_the_gateway_that_took_it_over() -> None:
    """A gateway without its bank yields, and takes over when both are back: its older writes come afterwards."""
    bank = Bank()
    gateway, one = Gateway(bank), stub(bank, owner=OWN)
    await gateway.take()
    gateway.owner._taken_elsewhere(one.index)
    await gateway.owner._drop_lost([one.index])
    assert gateway.spis == {both_spis(one)}
    assert gateway.owner.lost == 0


async def test_a_gateway_that_yielded_without_its_bank_takes_its_sessions_again() -> None:
    """The bank does not know that they were given up."""
    bank = Bank()
    gateway, one = Gateway(bank), stub(bank, owner=OWN)
    row = await gateway.take()
    assert (row["not_taken"], gateway.spis) == ([], {both_spis(one)})


async def test_a_session_that_another_gateway_took_is_dropped_and_taken_back_once_that_one_lets_go() -> None:
    bank = Bank()
    gateway, one = Gateway(bank), stub(bank)
    lost_at: list[str] = []
    gateway.owner.lost_at = lost_at.append
    await gateway.take()
    theirs = owned(bank.stubs[one.index], OTHER, now=NOW)
    bank.stubs[one.index] = theirs
    await gateway.owner._drop_lost([one.index])
    assert (gateway.spis, gateway.owner.lost, lost_at) == (set(), 1, [SHARED])
    assert await gateway.owner.abandoned(SHARED) == (frozenset(), True)

    assert theirs.derivation is not None
    bank.stubs[one.index] = replace(theirs, derivation=replace(theirs.derivation, owner=""))
    abandoned, elsewhere = await gateway.owner.abandoned(SHARED)
    assert (abandoned, elsewhere) == (frozenset({""}), False)
    await gateway.takeover.take_abandoned(SHARED, abandoned)
    await gateway.settled()
    assert gateway.spis == {both_spis(one)}


async def test_a_session_of_this_gateway_that_charon_reports_again_keeps_its_epoch() -> None:
    """After a restart of the sidecar, where the bank did not know all of it."""
    bank = Bank()
    gateway, one = Gateway(bank), stub(bank)
    await gateway.take()
    sa = gateway.charon.tracker.sas[both_spis(one)]
    assert sa.derivation is not None
    sa.derivation = replace(sa.derivation, epoch=1)
    await gateway.owner._drop_lost([one.index])
    assert gateway.spis == {both_spis(one)}
    assert sa.derivation.epoch == 2


async def test_sessions_of_a_gateway_that_does_not_live_any_more_are_abandoned() -> None:
    bank = Bank()
    gateway = Gateway(bank)
    stub(bank)
    assert await gateway.owner.abandoned(SHARED) == (frozenset(), True)
    bank.alive.discard(OTHER)
    assert await gateway.owner.abandoned(SHARED) == (frozenset({OTHER}), False)


async def test_a_session_that_was_at_another_gateway_meanwhile_is_installed_again() -> None:
    bank = Bank()
    gateway, one = Gateway(bank), stub(bank)
    await gateway.take()
    bank.stubs[one.index] = owned(bank.stubs[one.index], OTHER, now=NOW)
    gateway.sessions.lost()
    await gateway.take()
    assert gateway.spis == {both_spis(one)}
    assert gateway.charon.removed == [both_spis(one)]
    assert epoch(bank.stubs[one.index]) == 4


async def test_yield_leaves_sessions_without_an_owner() -> None:
    bank = Bank()
    gateway, one = Gateway(bank), stub(bank)
    await gateway.take()
    answer = await gateway.takeover.give_up({"address": SHARED})
    assert (answer["sessions"], answer["stored"], gateway.spis) == (1, True, set())
    held = bank.stubs[one.index].derivation
    assert held is not None
    assert (held.owner, held.epoch) == ("", 2)


async def test_yield_lets_a_batch_be_installed_and_removes_it_then() -> None:
    """Resumptions of other clients may share its activation."""
    bank = Bank()
    gateway = Gateway(bank)
    for _ in range(20):
        stub(bank)
    gateway.charon.installs.clear()
    await gateway.takeover.take({"address": SHARED})
    giving_up = asyncio.ensure_future(gateway.takeover.give_up({"address": SHARED}))
    await asyncio.sleep(0.05)
    gateway.charon.installs.set()
    answer = await giving_up
    assert gateway.spis == set()
    assert len(gateway.charon.removed) == answer["sessions"] == 8
    assert answer["state"] == "away"


async def test_a_list_that_fails_is_asked_again() -> None:
    bank = Bank()
    gateway, one = Gateway(bank), stub(bank)
    gateway.charon.lists_fail = 2
    row = await gateway.take()
    assert (row["not_taken"], gateway.spis) == ([], {both_spis(one)})


async def test_a_client_that_rekeys_immediately_is_kept() -> None:
    bank = Bank()
    gateway = Gateway(bank)
    stub(bank)
    gateway.charon.state = "REKEYING"
    assert (await gateway.take())["under_way"] == 1


async def taken_and_rekeyed_twice() -> tuple[Gateway, Session, list[IkeSa]]:
    """A gateway with one session that it took over, and two IKE_SAs that may follow, which charon has yet to report."""
    bank = Bank()
    gateway, one = Gateway(bank), stub(bank)
    await gateway.take()
    session = gateway.sessions.get(both_spis(one))
    assert session is not None
    ids = [(bytes([number] * 8), bytes([number + 2] * 8)) for number in (1, 2)]
    return gateway, session, [sa_of(replace(one, spi_i=spi_i, spi_r=spi_r)) for spi_i, spi_r in ids]


@pytest.mark.parametrize("gone_first", [True, False], ids=["the old one is gone first", "the new one is up first"])
@pytest.mark.parametrize("which", [0, 1], ids=["the first", "the second"])
async def test_child_sas_without_new_keys_are_rekeyed_at_the_ike_sa_that_their_clients_rekey_gave(
    which: int, gone_first: bool
) -> None:
    """Both sides may rekey it at the same time: there are two new ones until they agree on one."""
    gateway, session, heirs = await taken_and_rekeyed_twice()
    tracker, old = gateway.charon.tracker, session.sa
    for number, new in enumerate(heirs, 1):
        new.children, new.unique_id = (), f"heir {number}"
        tracker.sas[new.id.spis] = new
        tracker.notes.rekeyed_from[new.id.spis] = old
    heir = heirs[which]
    if gone_first:
        tracker.end(old.id)
    tracker.notes.rekeyed_from.pop(heir.id.spis)
    inherit(heir, old)
    heir.up = True
    gateway.sessions.changed(heir)
    if not gone_first:
        # the old one may be of use until its DELETE is answered
        gateway.sessions.changed(old)
        tracker.end(old.id)
    assert gateway.sessions.get(heir.id.spis) is session
    assert (session.sa, session.state, session.left) == (heir, State.REKEYING, ["net"])
    task = asyncio.ensure_future(gateway.sessions._rekeys.run())
    for _ in range(20):
        await asyncio.sleep(0)
    task.cancel()
    assert gateway.charon.rekeyed == [heir.unique_id]


async def test_of_two_new_ike_sas_the_one_that_stays_has_the_session() -> None:
    """charon may have both up for a moment."""
    gateway, session, heirs = await taken_and_rekeyed_twice()
    tracker, old = gateway.charon.tracker, session.sa
    for new in heirs:
        new.up = True
        tracker.sas[new.id.spis] = new
        gateway.sessions.changed(new)
    tracker.end(old.id)
    winner, loser = heirs
    tracker.end(loser.id)
    assert gateway.sessions.get(winner.id.spis) is session
    assert (session.sa, session.state) == (winner, State.REKEYING)
    tracker.end(winner.id)
    assert (gateway.sessions.get(winner.id.spis), session.state) == (None, State.GONE)


async def test_what_charon_did_not_activate_is_removed_from_it() -> None:
    bank = Bank()
    gateway, one = Gateway(bank), stub(bank)
    gateway.charon.state = "PASSIVE"
    row = await gateway.take()
    assert row["not_taken"] == [{"reason": reasons.NOT_KEPT, "sessions": 1}]
    assert gateway.charon.removed == [both_spis(one)]


async def test_a_session_that_ends_while_it_is_installed_ends_nothing_else() -> None:
    bank = Bank()
    gateway, one, other = Gateway(bank), stub(bank), stub(bank)

    def ends() -> None:
        sa = gateway.charon.tracker.sas[both_spis(one)]
        del gateway.charon.has[both_spis(one)]
        gateway.charon.tracker.end(sa.id)

    gateway.charon.on_install = ends
    await gateway.take()
    assert gateway.spis == {both_spis(other)}


async def test_a_charon_that_is_restarted_during_a_takeover_gets_all_sessions() -> None:
    bank = Bank()
    gateway, stubs = Gateway(bank), [stub(bank) for _ in range(20)]
    connections = dict(gateway.charon.tracker.connections)

    def restart() -> None:
        gateway.charon.on_install = lambda: None
        gateway.charon.has.clear()
        gateway.charon.tracker.forget_all()
        gateway.charon.tracker.connections = {}
        asyncio.get_running_loop().call_later(0.3, gateway.charon.tracker.connections.update, connections)

    gateway.charon.on_install = restart
    await gateway.take()
    await gateway.takeover._again[SHARED]
    await gateway.settled()
    assert gateway.spis == {both_spis(one) for one in stubs}


async def test_the_loser_of_the_compare_and_set_does_not_take_the_session() -> None:
    bank = Bank()
    gateway, one = Gateway(bank), stub(bank)

    def first() -> None:
        bank.before_take = lambda: None
        bank.stubs[one.index] = owned(one, THIRD, now=NOW)

    bank.before_take = first
    row = await gateway.take()
    assert row["not_taken"] == [{"reason": reasons.CHANGED, "sessions": 1}]
    assert gateway.spis == set()


async def test_a_stub_that_changes_meanwhile_is_taken_as_it_is_then() -> None:
    bank = Bank()
    gateway, one = Gateway(bank), stub(bank)

    def changes() -> None:
        bank.before_take = lambda: None
        bank.stubs[one.index] = replace(one, revision=one.revision + 1)

    bank.before_take = changes
    await gateway.take()
    assert gateway.spis == {both_spis(one)}


async def test_a_bank_that_fails_in_the_middle_counts_each_session_once() -> None:
    bank = Bank()
    gateway = Gateway(bank)
    for _ in range(20):
        stub(bank)
    expired = stub(bank)
    bank.stubs[expired.index] = replace(expired, expires=1)

    def fails() -> None:
        if bank.takes == 2:
            bank.away = True
            asyncio.get_running_loop().call_later(0.2, setattr, bank, "away", False)

    bank.before_take = fails
    row = await gateway.take(**{"from": OTHER})
    assert (row["found"], row["under_way"]) == (21, 20)
    assert row["not_taken"] == [{"reason": reasons.EXPIRED, "sessions": 1}]


async def test_whose_word_the_bank_has_of_an_address() -> None:
    bank = Bank()
    gateway = Gateway(bank)
    assert not await gateway.owner.another_takes(SHARED)
    stub(bank)
    await gateway.take()
    assert bank.posts == {("takeover", SHARED): OWN}
    assert not await gateway.owner.another_takes(SHARED)
    await bank.post("takeover", SHARED, OTHER, 60.0)
    assert await gateway.owner.another_takes(SHARED)
    assert not await gateway.owner.another_takes("192.0.2.101")
    bank.away = True
    with pytest.raises(BankUnavailable):
        await gateway.owner.another_takes(SHARED)


async def test_a_second_trigger_of_one_takeover_changes_nothing() -> None:
    """The kernel's news and VRRP's script."""
    bank = Bank()
    gateway = Gateway(bank)
    stub(bank)
    await gateway.take()
    row = await gateway.take()
    assert (row["found"], row["under_way"]) == (1, 1)


async def test_a_session_with_new_keys_says_so_in_the_bank() -> None:
    """Until then a sidecar that is restarted has to rekey its CHILD_SAs."""
    bank = Bank()
    gateway, one = Gateway(bank), stub(bank)
    await gateway.take()
    session = gateway.sessions.get(both_spis(one))
    assert session is not None
    held = bank.stubs[one.index].derivation
    assert held is not None
    assert held.unkeyed
    [child] = session.sa.children
    gateway.sessions._rekeys._asked[both_spis(one)] = session
    session.sa.put_child(replace(child, spi_in=99))
    gateway.sessions.changed(session.sa)
    assert session.state is State.TAKEN_OVER
    await gateway.writer.flush()
    held = bank.stubs[one.index].derivation
    assert held is not None
    assert not held.unkeyed


async def test_a_sidecar_that_was_restarted_rekeys_what_it_had_not_rekeyed() -> None:
    bank = Bank()
    gateway, one = Gateway(bank), stub(bank, owner=OWN, unkeyed=True)
    sa = sa_of(one)
    gateway.charon.tracker.adopt(sa)
    gateway.sessions.recovered(one, sa, "7")
    task = asyncio.ensure_future(gateway.sessions._rekeys.run())
    for _ in range(100):
        await asyncio.sleep(0)
    task.cancel()
    assert gateway.charon.rekeyed == ["7"]


async def test_a_client_that_did_not_answer_is_asked_once_more_when_it_sends_something() -> None:
    """If it answers nothing then either, its IKE_SA is removed: answered liveness checks would hide that its traffic is
    lost."""
    bank = Bank()
    gateway, one = Gateway(bank), stub(bank)
    await gateway.take()
    session = gateway.sessions.get(both_spis(one))
    assert session is not None
    rekeys = gateway.sessions._rekeys

    async def silent() -> None:
        rekeys._no_longer_waits(session.sa.id.spis)
        rekeys._asked[session.sa.id.spis] = session
        session.offsets, session.waits_since = [], 0.0
        await rekeys._try_next(session)

    await silent()
    row = await gateway.takeover.progress({"address": SHARED})
    assert (session.state, row["left"], row["under_way"]) == (State.LEFT, 1, 0)
    gateway.sessions.verified(session.sa.id)
    assert session.state is State.REKEYING
    await silent()
    for _ in range(5):
        await asyncio.sleep(0)
    assert gateway.charon.removed == [both_spis(one)]
    assert gateway.spis == set()


async def test_a_client_that_rekeys_by_itself_after_it_was_left_alone_is_taken_over() -> None:
    bank = Bank()
    gateway, one = Gateway(bank), stub(bank)
    await gateway.take()
    session = gateway.sessions.get(both_spis(one))
    assert session is not None
    rekeys = gateway.sessions._rekeys
    rekeys._no_longer_waits(session.sa.id.spis)
    rekeys._asked[session.sa.id.spis] = session
    session.offsets = []
    await rekeys._try_next(session)
    [child] = session.sa.children
    session.sa.put_child(replace(child, spi_in=99))
    gateway.sessions.changed(session.sa)
    row = await gateway.takeover.progress({"address": SHARED})
    assert (session.state, row["taken"], row["left"]) == (State.TAKEN_OVER, 1, 0)


@pytest.mark.parametrize("others", [0, 2000], ids=["alone", "among many"])
async def test_where_many_wait_charon_is_asked_for_whole_segments(others: int) -> None:
    """A VICI command for each would have charon look at all its IKE_SAs each time; but the CHILD_SAs of other sessions
    in a segment are rekeyed with it."""
    bank = Bank()
    gateway = Gateway(bank)
    for number in range(1000):
        one = stub(bank)
        bank.stubs[one.index] = replace(one, remote=Endpoint(f"198.51.{number // 250}.{number % 250}", 4500))
    for number in range(others):
        sa = sa_of(replace(stub_of(gateway=OWN), remote=Endpoint(f"203.0.{number // 250}.{number % 250}", 4500)))
        gateway.charon.tracker.adopt(sa)
    await gateway.take()
    task = asyncio.ensure_future(gateway.sessions._rekeys.run())
    for _ in range(2000):
        await asyncio.sleep(0)
    task.cancel()
    if others:
        assert gateway.charon.resyncs == []
        assert len(gateway.charon.rekeyed) == OUTSTANDING
    else:
        assert 1 <= len(gateway.charon.resyncs) <= 16
        assert len(gateway.charon.rekeyed) <= OUTSTANDING


async def test_many_sessions_are_installed_and_rekeyed_segment_by_segment() -> None:
    """So that none of a segment is there already, to be rekeyed once more, nor is left to be asked for alone."""
    bank = Bank()
    gateway = Gateway(bank)
    for number in range(4000):
        one = stub(bank)
        bank.stubs[one.index] = replace(one, remote=Endpoint(f"198.51.{number // 250}.{number % 250}", 4500))
    segments = {both_spis(one): segment_of(one.remote.address) for one in bank.stubs.values()}
    keyed: list[bytes] = []

    def rekey(chosen: Callable[[IkeSa], bool]) -> None:
        for sa in [sa for sa in gateway.charon.tracker.established() if chosen(sa)]:
            keyed.append(sa.id.spis)
            [child] = sa.children
            sa.put_child(replace(child, spi_in=child.spi_in + 2**16))
            gateway.sessions.changed(sa)

    async def resync(wanted: set[int]) -> None:
        rekey(lambda sa: segments[sa.id.spis] in wanted)

    async def rekey_children(wanted: Sequence[tuple[str, str]]) -> list[str]:
        gateway.charon.rekeyed += [unique_id for unique_id, _ in wanted]
        rekey(lambda sa: (sa.unique_id, "net") in wanted)
        return [""] * len(wanted)

    gateway.charon.installer.resync = resync
    gateway.charon.vici.rekey_children = rekey_children
    count, all_keyed = gateway.sessions.done, asyncio.Event()

    def done(session: Session) -> None:
        count(session)
        if len(gateway.takeover._runs[SHARED].keyed) == len(segments):
            all_keyed.set()

    gateway.sessions.done = done
    task = asyncio.ensure_future(gateway.sessions._rekeys.run())
    await gateway.take()
    await all_keyed.wait()
    task.cancel()
    # each of a few batches has the whole of its segments, but for what was the first
    _, *batches = gateway.charon.batches
    assert len(batches) <= 16
    found = [segment for batch in batches for segment in {segments[spis] for spis in batch}]
    assert sorted(found) == sorted(set(segments.values()))
    assert len(keyed) < 1.1 * len(segments)
    assert len(gateway.charon.rekeyed) < MANY


@pytest.mark.parametrize(("ended_at", "taken"), [(0, False), (1, True), (2, False)])
async def test_a_session_that_ended_here_is_taken_only_if_another_gateway_had_it_since(
    ended_at: int, taken: bool
) -> None:
    bank = Bank()
    gateway, one = Gateway(bank), stub(bank, epoch=2)
    gateway.endings.add(one.index, int(NOW) + 3600, ended_at)
    row = await gateway.take()
    assert bool(gateway.spis) is taken
    if not taken:
        assert row["not_taken"] == [{"reason": reasons.ENDED, "sessions": 1}]
        return
    # and is stored again from now on
    [sa] = gateway.charon.tracker.sas.values()
    gateway.owner.keyed(sa)
    await gateway.writer.flush()
    held = bank.stubs[one.index].derivation
    assert held is not None
    assert (held.epoch, held.unkeyed) == (3, False)


async def test_sessions_whose_clients_send_esp_are_installed_first() -> None:
    bank = Bank()
    gateway, stubs = Gateway(bank), [stub(bank) for _ in range(1000)]
    late = stubs[-1]
    bank.stubs[late.index] = replace(late, children=(replace(late.children[0], spi_in=77),))
    gateway.sessions.active.add(wire_spi(77))
    await gateway.take()
    first, second, *others = gateway.charon.batches
    assert both_spis(late) not in first
    assert second[0] == both_spis(late)
    assert sum(map(len, others)) == 1000 - len(first) - len(second)
