"""What a bank forgot, and a gateway did not: ends are told again, and what ended is not published again. With a real
Redis and no charon."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from bank_support import GATEWAY, RedisServer, ending, keyring, stub_of
from bridge.bank.key_file import KeyFile
from bridge.bank.key_rotation import KeyRotation
from bridge.bank.prefetch import Prefetch
from bridge.bank.redis_bank import RedisBank
from bridge.bank.write_queue import WriteQueue
from bridge.charon.charon import Charon
from bridge.charon.ike_sa import IkeSa, sa_of
from bridge.charon.sa_tracker import SaTracker
from bridge.charon.vici_types import parse_ike_sa
from bridge.config import BankConfig, FailoverConfig, GatewayConfig
from bridge.gateway.bank_events import BankEvents
from bridge.gateway.bank_followers import BankFollowers
from bridge.gateway.bank_reconciler import BankReconciler
from bridge.gateway.endings import Endings
from bridge.gateway.failover import Failover
from bridge.gateway.known_sessions import KnownSessions
from bridge.gateway.left_in_kernel import LeftInKernel
from bridge.gateway.living import LivingSas
from bridge.gateway.metrics import GatewayMetrics
from bridge.gateway.publisher import Publisher
from bridge.gateway.revocation import LockOut, Revocations
from bridge.gateway.session_elsewhere import SessionElsewhere
from bridge.net.interface import Sender
from bridge.service.tasks import end, spawn
from bridge.stub.stub import Stub

pytestmark = pytest.mark.redis

RING = keyring()
PATIENCE = 10.0


class Nobody:
    def changed(self, sa: IkeSa) -> None: ...
    def gone(self, sa: IkeSa) -> None: ...
    def verified(self, ike_id: object) -> None: ...
    def down(self, sa: object) -> None: ...


class FakeVici:
    connected = False


class FakeCharon:
    """A charon whose SAs are `sas` of its tracker."""

    def __init__(self) -> None:
        self.tracker = SaTracker(Nobody(), wall=lambda: 0.0, clock=lambda: 0.0)
        self.reconciled = asyncio.Event()
        self.reconciled.set()
        self.vici = FakeVici()


class Gateway:
    """What a gateway does for its bank, and nothing else of it."""

    def __init__(self, server: RedisServer, *, detect: float = 1.0) -> None:
        self.bank = RedisBank(server.url, RING)
        self.prefetch = Prefetch(self.bank)
        self.writer = WriteQueue(self.bank)
        self.charon = FakeCharon()
        self.endings = Endings()
        charon = cast(Charon, self.charon)
        self.revocations = revocations = Revocations(self.bank, RING)
        known = KnownSessions(self.endings, LivingSas(self.charon.tracker), revocations)
        config = GatewayConfig(address=GATEWAY, bank=BankConfig(url=server.url))
        self.publisher = Publisher(config, self.writer, self.bank, known)
        lock_out = LockOut(revocations, self.bank, charon, self.endings, self.writer, GATEWAY)
        self.publisher.locked_out = lock_out.soon
        rotation = KeyRotation(self.bank, KeyFile(RING, "/nonexistent"), GATEWAY)
        self.failover = Failover(
            FailoverConfig(detect=detect),
            GATEWAY,
            self.bank,
            self.prefetch,
            charon,
            cast(Sender, None),
            self.endings.__contains__,
        )
        elsewhere = SessionElsewhere(charon, self.bank, GatewayMetrics())
        self.reconciler = BankReconciler(config, self.bank, charon, self.publisher, known, elsewhere)
        self.events = BankEvents(server.url)
        left = LeftInKernel(charon, self.bank, GATEWAY)
        self.followers = BankFollowers(
            self.prefetch, self.failover, self.reconciler, elsewhere, lock_out, rotation, left
        )
        self.followers.follow(self.events)
        self.lock_out = lock_out

    def has(self, stub: Stub) -> IkeSa:
        """charon has the SA of this stub from now on."""
        sa = sa_of(stub)
        self.charon.tracker.sas[sa.id.spis] = sa
        self.publisher.publish(sa)
        return sa


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as running:
        yield running


@asynccontextmanager
async def running(gateway: Gateway) -> AsyncIterator[Gateway]:
    gateway.events.start()
    gateway.reconciler.start()
    enforced = spawn("lock-out", gateway.lock_out.run())
    try:
        yield gateway
    finally:
        await end(enforced)
        await gateway.reconciler.close()
        await gateway.events.close()
        await gateway.writer.close()
        await gateway.bank.close()


async def until(condition: Callable[[], Any]) -> None:
    for _ in range(int(PATIENCE / 0.02)):
        if condition():
            return
        await asyncio.sleep(0.02)
    pytest.fail("waited in vain")


def stubs(server: RedisServer) -> list[bytes]:
    return list(server.client.keys("ike:stub:*"))


async def test_a_session_that_went_on_elsewhere_is_not_put_back_into_an_emptied_bank(server: RedisServer) -> None:
    async with running(Gateway(server)) as gateway:
        moved, stays = stub_of(), stub_of()
        gateway.has(moved)
        gateway.has(stays)
        await until(lambda: len(stubs(server)) == 2)
        # the gateway that it went on at deletes it; charon here has yet to notice
        other = RedisBank(server.url, RING)
        await other.delete([ending(moved)])
        await until(lambda: moved.index in gateway.endings)
        server.client.flushall()
        gateway.reconciler.returned()
        await until(lambda: stubs(server) == [stays.index.key.encode()])
        # and the emptied bank knows that it ended
        assert await other.ended([moved.index, stays.index]) == [True, False]
        # nor is it published again for a change of its own
        gateway.publisher.publish(gateway.charon.tracker.sas[moved.spi_i + moved.spi_r])
        await gateway.writer.flush()
        assert len(stubs(server)) == 1
        await other.close()


async def test_a_bank_of_an_older_state_loses_the_stubs_whose_ends_it_forgot(server: RedisServer) -> None:
    async with running(Gateway(server)) as gateway:
        elsewhere, ended_here = stub_of(gateway="192.0.2.9"), stub_of()
        other = RedisBank(server.url, RING)
        await other.store([elsewhere])
        sa = gateway.has(ended_here)
        await until(lambda: len(stubs(server)) == 2)
        state = {key: server.client.dump(key) for key in server.client.keys("*")}
        # one went on here, one ended here
        gateway.endings.add(elsewhere.index, elsewhere.expires)
        await other.delete([ending(elsewhere)])
        del gateway.charon.tracker.sas[sa.id.spis]
        gateway.publisher.withdraw(sa)
        await until(lambda: not stubs(server))
        server.client.flushall()
        for key, value in state.items():
            server.client.restore(key, 0, value)
        assert len(stubs(server)) == 2
        # no connection was lost: the next comparison finds it
        gateway.reconciler._compare_now.set()
        await until(lambda: not stubs(server))
        assert await other.ended([elsewhere.index, ended_here.index]) == [True, True]
        await other.close()


async def test_a_bank_that_comes_back_gets_all_ends(server: RedisServer) -> None:
    async with running(Gateway(server)) as gateway:
        ended = [stub_of() for _ in range(600)]
        for stub in ended:
            gateway.endings.add(stub.index, stub.expires)
        server.kill()
        await asyncio.sleep(0.1)
        server.start()
        bank = RedisBank(server.url, RING)

        async def told() -> bool:
            return all(await bank.ended([stub.index for stub in ended]))

        for _ in range(int(PATIENCE / 0.05)):
            if await told():
                break
            await asyncio.sleep(0.05)
        assert await told()
        await bank.close()


async def test_a_recovered_sa_says_which_stub_it_came_from(server: RedisServer) -> None:
    """The folder of `state` may be gone; the SA's own stub says that its predecessor is spent."""
    async with running(Gateway(server)) as gateway:
        old = stub_of(gateway="192.0.2.9")
        sa = sa_of(stub_of())
        sa.predecessor = old.index
        gateway.charon.tracker.sas[sa.id.spis] = sa
        gateway.publisher.publish(sa)
        await gateway.writer.flush()
        fresh = Gateway(server)
        assert old.index not in fresh.endings
        listed = parse_ike_sa(
            sa.connection,
            {
                "initiator-spi": sa.id.spi_i.hex().encode(),
                "responder-spi": sa.id.spi_r.hex().encode(),
                "local-host": GATEWAY.encode(),
                "remote-host": b"198.51.100.7",
            },
        )
        [recovered] = await fresh.publisher.recover([listed]) or []
        assert recovered.predecessor == old.index
        assert old.index in fresh.endings
        await fresh.bank.close()
