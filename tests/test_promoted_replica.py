"""A replica that was behind takes over the bank, with the stub of a session that went on since: real charons, a Redis
with a replica under Sentinel."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence

import pytest

from bridge.lab import Lab
from bridge.lab.daemon import wait_until
from bridge.lab.host import Host
from bridge.net.packet import Datagram
from chaos.attacker import Attacker
from chaos.world import World
from failover_support import stub_key, the_sa

pytestmark = pytest.mark.lab

AGAIN_SECONDS = 90.0
"""for a bank that took over: gateways compare it every 30 s"""


@pytest.fixture
def world() -> Iterator[World]:
    with Lab() as lab:
        made = World(lab, clients=1)
        made.begin()
        yield made


def asks_the_bank(host: Host) -> bool:
    return bool(host.sidecars[0].ask("status")["counters"]["bank_reachable"])


def thrown(attacker: Attacker, request: Datagram, gateways: Sequence[Host]) -> None:
    """Send a captured request to gateways, of which each refuses it."""

    def refusals() -> list[float]:
        return [host.sidecars[0].ask("status")["counters"]["refusals_total[no-stub]"] for host in gateways]

    before = refusals()
    for host in gateways:
        attacker.replay(request, host)
    wait_until(lambda: all(now > then for now, then in zip(refusals(), before, strict=True)), "all refusals")


def test_a_captured_request_rebuilds_nothing_where_its_session_was_and_soon_nowhere(world: World) -> None:
    [client] = world.clients
    first, second, third = world.gateways
    attacker = Attacker(world)
    before = the_sa(client)
    assert before["remote-host"] != second.address
    old = stub_key(before["remote-host"], before["responder-spi"])
    primary = world.primary()
    assert primary is not None
    [replica] = [redis for redis in world.redis if redis is not primary]
    wait_until(lambda: replica.cli("hexists", old, "vips") == "1", "the stub at the replica")
    world.lag()
    done = client.sidecars[0].command("resume", "--json", "--to", second.address)
    assert json.loads(done.stdout)["result"] == "resumed"
    wait_until(lambda: primary.cli("exists", old) == "0", "the end of the old stub")
    [request] = [seen for seen in attacker.requests if seen.dst == second.address]
    primary.kill()
    wait_until(lambda: world.primary() is replica, "the replica to take over")
    assert replica.cli("exists", old) == "1"
    # the gateway that it came from, and the one where it went on
    knowing = [host for host in world.gateways if host.address in (before["remote-host"], second.address)]
    thrown(attacker, request, knowing)
    wait_until(lambda: old not in (world.stubs() or {old}), "the end of the stub that came back", AGAIN_SECONDS)
    new = stub_key(second.address, the_sa(client)["responder-spi"])
    wait_until(lambda: world.stubs() == {new}, "the stub of the session", AGAIN_SECONDS)
    # one that has yet to notice that the bank is back does not ask it
    wait_until(lambda: all(asks_the_bank(host) for host in world.gateways), "the bank's return at all gateways")
    thrown(attacker, request, world.gateways)
    assert world.sas(first) == world.sas(third) == []
    assert [sa["responder-spi"] for sa in world.sas(second)] == [the_sa(client)["responder-spi"]]
    wait_until(lambda: time.time() - world.last_answer(client) < 1.0, "traffic")
