"""Stubs in more banks than one (distributed and mixed), over real redis-servers that come and go."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import pytest

from bank_support import PATIENCE, RedisServer, downloaded, ending, keyring, listed, revised, stub_of
from bridge.bank import replica_in
from bridge.bank.interface import BankUnavailable, Ending, Move
from bridge.bank.redis_bank import RedisBank
from bridge.bank.replica import Replica
from bridge.bank.replicated import ReplicatedBank
from bridge.stub.bank_keys import heartbeat_key
from bridge.stub.keyring import Keyring
from bridge.stub.stub import Stub

pytestmark = pytest.mark.redis

ONE, TWO, THREE, CENTRAL = "192.0.2.1", "192.0.2.2", "192.0.2.3", "central"
PEER_TIMEOUT = 0.3


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[dict[str, RedisServer]]:
    """The banks of three gateways, and a central one."""
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(RedisServer(tmp_path / name.replace(".", "-")))
            for name in (ONE, TWO, THREE, CENTRAL)
        }


Open = Callable[..., Awaitable[ReplicatedBank]]


@pytest.fixture
async def bank_of(servers: dict[str, RedisServer], ring: Keyring) -> AsyncIterator[Open]:
    """Opens the bank of a gateway, as its sidecar does: `await bank_of(ONE)`."""
    async with AsyncExitStack() as stack:

        async def bank_of(
            name: str, *, central: bool = False, copies: int = 1, targets: tuple[str, ...] = (), serve: bool = True
        ) -> ReplicatedBank:
            def tier(name: str, timeout: float = 5.0) -> Replica:
                return replica_in(name, servers[name].url, RedisBank(servers[name].url, ring, get_timeout=timeout))

            bank = ReplicatedBank(
                tier(name),
                tier(CENTRAL) if central else None,
                [tier(other, PEER_TIMEOUT) for other in (ONE, TWO, THREE) if other != name],
                targets=targets,
                copies=copies,
                peer_timeout=PEER_TIMEOUT,
            )
            if serve:
                await bank.start()
            stack.push_async_callback(bank.close)
            return bank

        yield bank_of


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - there is no event of it
            await asyncio.sleep(0.02)


def holds(server: RedisServer, stub: Stub) -> bool:
    return bool(server.client.exists(stub.index.key))


# where stubs go


async def test_a_stub_is_near_and_at_the_configured_target(bank_of: Open, servers: dict[str, RedisServer]) -> None:
    bank, stub = await bank_of(ONE, targets=(THREE,)), stub_of()
    assert await bank.store([stub]) == [True]
    assert [holds(servers[name], stub) for name in (ONE, TWO, THREE)] == [True, False, True]


async def test_without_targets_each_stub_chooses_its_own_peer(bank_of: Open, servers: dict[str, RedisServer]) -> None:
    bank, stubs = await bank_of(ONE), [stub_of() for _ in range(400)]
    await bank.store(stubs)
    held = Counter(name for stub in stubs for name in (TWO, THREE) if holds(servers[name], stub))
    assert sum(held.values()) == 400
    assert min(held.values()) > 100


async def test_the_choice_of_a_stub_stays_when_another_peer_goes(servers: dict[str, RedisServer]) -> None:
    ring, stubs = keyring(), [stub_of() for _ in range(100)]

    def chosen(*peers: str) -> list[str]:
        tiers = [Replica(peer, RedisBank(servers[peer].url, ring)) for peer in peers]
        bank = ReplicatedBank(tiers[0], None, tiers[1:])
        return [bank.holders(stub.index)[1].name for stub in stubs]

    for before, after in zip(chosen(CENTRAL, ONE, TWO, THREE), chosen(CENTRAL, ONE, TWO), strict=True):
        assert after == before or before == THREE


async def test_in_mode_mixed_a_stub_is_in_the_central_bank_too(bank_of: Open, servers: dict[str, RedisServer]) -> None:
    bank, stub = await bank_of(ONE, central=True, copies=0), stub_of()
    await bank.store([stub])
    assert [name for name in servers if holds(servers[name], stub)] == [ONE, CENTRAL]


# signs of life


async def test_heartbeats_do_not_wait_for_a_bank_that_hangs(bank_of: Open, servers: dict[str, RedisServer]) -> None:
    bank = await bank_of(ONE)
    await bank.heartbeat(ONE, 1.0)
    servers[TWO].freeze()
    began = time.monotonic()
    for _ in range(5):
        assert await bank.heartbeat(ONE, 30.0) < 1.0
        await bank.ping()
        assert (await bank.gateways())[ONE].alive
    # a bank that hangs takes its 2 s for each
    assert time.monotonic() - began < 5.0
    assert all(servers[name].client.pttl(heartbeat_key(ONE)) > 1_000 for name in (ONE, THREE))
    servers[TWO].thaw()
    await until(lambda: servers[TWO].client.pttl(heartbeat_key(ONE)) > 1_000)


async def test_while_the_own_bank_hangs_the_others_get_heartbeats_and_no_expiry_counts(
    bank_of: Open, servers: dict[str, RedisServer]
) -> None:
    bank = await bank_of(ONE)
    await bank.heartbeat(ONE, 1.0)
    servers[ONE].freeze()
    began = time.monotonic()
    await bank.heartbeat(ONE, 30.0)
    assert time.monotonic() - began < 1.5
    await asyncio.sleep(PEER_TIMEOUT)
    # as long as it is not known to be down, its time is what counts
    if bank.near.up:
        assert await bank.heartbeat(ONE, 30.0) > PEER_TIMEOUT
    assert all(servers[name].client.pttl(heartbeat_key(ONE)) > 1_000 for name in (TWO, THREE))


async def test_what_a_bank_that_hung_is_told_last_is_what_it_knows(
    bank_of: Open, servers: dict[str, RedisServer]
) -> None:
    bank = await bank_of(ONE)
    servers[TWO].freeze()
    await bank.heartbeat(ONE, 30.0)
    await bank.leave(ONE)
    servers[TWO].thaw()
    second = next(tier for tier in bank._banks.all if tier.name == TWO)
    await until(lambda: not second.behind)
    assert not any(servers[name].client.exists(heartbeat_key(ONE)) for name in (ONE, TWO, THREE))


async def test_an_end_that_the_own_bank_knows_of_does_not_wait_for_a_bank_that_hangs(
    bank_of: Open, servers: dict[str, RedisServer]
) -> None:
    bank, stub = await bank_of(ONE), stub_of()
    await bank.delete([ending(stub)])
    servers[TWO].freeze()
    began = time.monotonic()
    assert await bank.ended([stub.index]) == [True]
    assert time.monotonic() - began < 1.5


# looking for them


@pytest.mark.parametrize("central", [False, True])
async def test_any_gateway_finds_a_stub_whose_gateway_died_with_its_bank(
    bank_of: Open, servers: dict[str, RedisServer], central: bool
) -> None:
    stubs = [stub_of() for _ in range(50)]
    await (await bank_of(ONE, central=central)).store(stubs)
    servers[ONE].kill()
    for name in (TWO, THREE):
        assert await (await bank_of(name, central=central)).get([stub.index for stub in stubs]) == stubs


async def test_in_mode_mixed_the_peers_serve_while_the_central_bank_is_away(
    bank_of: Open, servers: dict[str, RedisServer]
) -> None:
    stubs = [stub_of() for _ in range(50)]
    await (await bank_of(ONE, central=True)).store(stubs)
    servers[ONE].kill()
    servers[CENTRAL].kill()
    assert await (await bank_of(TWO, central=True)).get([stub.index for stub in stubs]) == stubs


async def test_a_peer_that_hangs_is_waited_for_once_and_for_a_bounded_time(
    bank_of: Open, servers: dict[str, RedisServer]
) -> None:
    bank, stub = await bank_of(TWO), stub_of()
    await until(lambda: bank._catch_up.done)
    await (await bank_of(ONE, copies=0)).store([stub])
    servers[THREE].freeze()
    assert await bank.get([stub.index]) == [stub]
    assert {"bank": THREE, "reachable": False, "pending": 0} in bank.status()
    assert await bank.get([stub.index]) == [stub]


async def test_a_bank_that_hung_and_answers_again_is_asked_again(
    bank_of: Open, servers: dict[str, RedisServer]
) -> None:
    bank, stub = await bank_of(TWO), stub_of()
    await (await bank_of(THREE, copies=0)).store([stub])
    servers[THREE].freeze()
    assert await bank.get([stub.index]) == [None]
    servers[THREE].thaw()
    await bank.heartbeat(TWO, 10)
    await until(lambda: all(row["reachable"] for row in bank.status()))
    assert await bank.get([stub.index]) == [stub]


async def test_of_several_copies_the_one_with_the_greatest_revision_is_given_out(
    bank_of: Open, servers: dict[str, RedisServer], ring: Keyring
) -> None:
    old = stub_of(revision=1)
    for name, revision in ((ONE, 2), (THREE, 3)):
        direct = RedisBank(servers[name].url, ring)
        await direct.store([revised(old, revision)])
        await direct.close()
    bank = await bank_of(TWO)
    assert await bank.get([old.index]) == [revised(old, 3)]
    assert {stub.revision for stub in await downloaded(bank)} == {2, 3}
    assert [row.index for row in await listed(bank)] == [old.index]


async def test_while_no_bank_answers_every_call_says_so(bank_of: Open, servers: dict[str, RedisServer]) -> None:
    bank, stub = await bank_of(ONE, central=True), stub_of()
    for server in servers.values():
        server.kill()
    for _ in range(2):
        for call in (
            bank.store([stub]),
            bank.get([stub.index]),
            bank.delete([ending(stub)]),
            bank.revisions([stub.index]),
            bank.heartbeat(ONE, 10),
            bank.ping(),
            downloaded(bank),
        ):
            with pytest.raises(BankUnavailable):
                await call
    assert bank.pending == 0


# banks that were away


async def test_a_bank_that_was_away_gets_what_it_missed(bank_of: Open, servers: dict[str, RedisServer]) -> None:
    bank = await bank_of(ONE, targets=(TWO,))
    kept, ended = stub_of(), stub_of()
    await bank.store([ended])
    servers[TWO].kill()
    assert await bank.store([kept]) == [True]
    assert await bank.delete([ending(ended)]) == [True]
    assert bank.pending == 2
    servers[TWO].start()
    await until(lambda: bank.pending == 0)
    assert holds(servers[TWO], kept)
    assert not holds(servers[TWO], ended)


async def test_the_revision_of_the_copy_that_is_most_behind_counts(
    bank_of: Open, servers: dict[str, RedisServer]
) -> None:
    bank, stub = await bank_of(ONE, targets=(TWO,)), stub_of(revision=7)
    await bank.store([stub])
    assert await bank.revisions([stub.index]) == [7]
    servers[TWO].client.flushdb()
    assert await bank.revisions([stub.index]) == [0]


async def test_a_return_is_reported_so_that_what_a_bank_lost_can_be_put_back(
    bank_of: Open, servers: dict[str, RedisServer]
) -> None:
    bank = await bank_of(ONE)
    await until(lambda: bank._catch_up.done)
    told = asyncio.Event()
    bank.on_return = told.set
    servers[THREE].kill()
    await until(lambda: any(not state["reachable"] for state in bank.status()))
    servers[THREE].start()
    async with asyncio.timeout(PATIENCE):
        await told.wait()


# nothing deleted comes back


async def moved_while_two_was_away(bank_of: Open, servers: dict[str, RedisServer]) -> Stub:
    """A stub of gateway one's with a copy at two, whose session went to three while two was away."""
    stub = stub_of()
    await (await bank_of(ONE, targets=(TWO,))).store([stub])
    servers[TWO].kill()
    three = await bank_of(THREE)
    assert await three.delete([ending(stub)]) == [True]
    # three dies, and with it what its sidecar had to tell two
    for tier in three._banks.all:
        tier._later._waiting.clear()
    await three.close()
    servers[TWO].start()
    assert holds(servers[TWO], stub)
    return stub


async def test_a_replay_at_a_bank_that_missed_the_end_finds_no_stub(
    bank_of: Open, servers: dict[str, RedisServer]
) -> None:
    stub = await moved_while_two_was_away(bank_of, servers)
    bank = await bank_of(TWO)
    assert not bank._catch_up.done
    assert await bank.get([stub.index]) == [None]
    await until(lambda: bank._catch_up.done)
    assert not holds(servers[TWO], stub)
    # from here on it needs nobody for that
    for name in (ONE, THREE):
        servers[name].kill()
    assert await bank.get([stub.index]) == [None]


async def test_a_mark_of_a_move_is_in_every_bank_and_counts_from_any(
    bank_of: Open, servers: dict[str, RedisServer]
) -> None:
    two, one = await bank_of(TWO), await bank_of(ONE)
    old, new = stub_of(gateway=ONE).index, stub_of(gateway=TWO).index
    until = int(time.time()) + 60
    await two.delete([Ending(old, until, move=Move(new, until))])
    assert await one.moved([old, new]) == [new, False]
    # the old gateway hears of it in its own bank, and if that lost it, from another
    assert servers[ONE].client.delete(old.moved) == 1
    assert await one.moved([old]) == [new]


async def test_a_download_does_not_bring_back_what_ended_here(bank_of: Open, servers: dict[str, RedisServer]) -> None:
    stub = await moved_while_two_was_away(bank_of, servers)
    assert await downloaded(await bank_of(THREE)) == []
    assert holds(servers[TWO], stub)


async def test_after_a_deletion_no_bank_finds_the_stub_nor_takes_it_again(
    bank_of: Open, servers: dict[str, RedisServer]
) -> None:
    banks = [await bank_of(name, central=True) for name in (ONE, TWO, THREE)]
    stub = stub_of()
    await banks[0].store([stub])
    assert await banks[1].delete([ending(stub)]) == [True]
    for bank in banks:
        assert await bank.get([stub.index]) == [None]
        assert await bank.ended([stub.index]) == [True]
    assert await banks[0].store([revised(stub, 9)]) == [False]
    assert not any(holds(server, stub) for server in servers.values())


async def test_an_operators_deletion_names_the_bank_that_it_did_not_reach(
    bank_of: Open, servers: dict[str, RedisServer]
) -> None:
    stub = stub_of()
    await (await bank_of(ONE, targets=(TWO,))).store([stub])
    servers[THREE].kill()
    with pytest.raises(BankUnavailable, match=f"not in the bank of {THREE}"):
        await (await bank_of(ONE, serve=False)).delete([ending(stub)])
    assert not holds(servers[TWO], stub)


# gateways


async def test_a_gateway_lives_for_all_others_while_one_bank_receives_its_heartbeat(
    bank_of: Open, servers: dict[str, RedisServer], ring: Keyring
) -> None:
    bank = await bank_of(ONE)
    await bank.heartbeat(ONE, 30)
    servers[ONE].kill()
    signs = await (await bank_of(TWO)).gateways()
    assert signs[ONE].alive
    assert signs[ONE].keys == frozenset(ring.ids)


@pytest.mark.parametrize("central", [False, True])
async def test_an_address_is_found_whichever_bank_has_its_stub(bank_of: Open, central: bool) -> None:
    one, three = await bank_of(ONE, central=central), await bank_of(THREE, central=central)
    stub = stub_of()
    assert await one.store([stub]) == [True]
    where = ("10.20.0.7", "10.20.0.7")
    assert {entry.of for entry in await three.addresses([where])} == {stub.index}
    await three.forget_addresses(await three.addresses([where]))
    assert await one.addresses([where]) == []
