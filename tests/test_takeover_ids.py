"""Message IDs that are off by one, in each direction: what the dead gateway did last is not in the bank."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from bridge.lab import Topology
from bridge.lab.host import Host
from bridge.lab.topology import BANK_KEY
from failover_support import established, spis
from takeover_support import SHARED, SHARED6, answered, connect, give_up, rekey, rekeyed_child, sharing, take, take_away

pytestmark = pytest.mark.lab

ALTER = """
import asyncio, sys, time
from msgspec.structs import replace
from bridge.bank.redis_bank import RedisBank
from bridge.stub.keyring import Keyring

async def alter(url, key, address, own, peers):
    bank = RedisBank(url, Keyring.load(key))
    [stub] = [stub async for page in bank.download(address) for stub in page]
    was = stub.derivation
    now = replace(was, next_request=was.next_request + own, next_expected=was.next_expected + peers)
    print(await bank.take([(stub, replace(stub, derivation=now))]))
    await bank.close()

asyncio.run(alter(*sys.argv[1:4], *map(int, sys.argv[4:])))
"""


@pytest.fixture(scope="module")
def topology(each_release: str | None) -> Iterator[Topology]:
    with sharing(each_release) as topology:
        connect(topology)
        yield topology


def handed_over(topology: Topology, own: int, peers: int, address: str = SHARED) -> Host:
    """The session at the other gateway, which was told message IDs that are off by so many."""
    old, new = (topology.gw1, topology.gw2) if established(topology.gw1) else (topology.gw2, topology.gw1)
    # both sides have sent requests: IDs below the first are none
    rekeyed_child(old, lambda: rekey(old, child="net"))
    rekeyed_child(topology.client, lambda: rekey(topology.client, child="net"))
    give_up(topology, old, address)
    take_away(old)
    new.run(sys.executable, "-c", ALTER, topology.bank.url, BANK_KEY, address, str(own), str(peers))
    outcome = take(topology, new, address=address)
    assert (outcome["found"], outcome["taken"], outcome["left"]) == (1, 1, 0)
    return new


@pytest.mark.parametrize("own", [-1, -2, 1])
def test_the_gateways_own_message_id_is_found(topology: Topology, own: int) -> None:
    [before] = established(topology.client)
    handed_over(topology, own, 0)
    assert answered(topology, topology.client)
    [after] = established(topology.client)
    assert spis(after) == spis(before)


@pytest.mark.parametrize("peers", [-1, 1])
def test_the_clients_message_id_is_learned_from_its_request(topology: Topology, peers: int) -> None:
    [before] = established(topology.client)
    new = handed_over(topology, 0, peers)
    rekeyed_child(topology.client, lambda: rekey(topology.client, child="net"))
    assert "takeover-message-id-learned" in topology.gateways[new.name].text()
    assert answered(topology, topology.client)
    [after] = established(topology.client)
    assert spis(after) == spis(before)


def test_both_are_found_over_ipv6_too(each_release: str | None) -> None:
    with sharing(each_release, client={"remote_addrs": SHARED6}) as topology:
        connect(topology, address=SHARED6)
        [before] = established(topology.client)
        new = handed_over(topology, -1, 1, SHARED6)
        rekeyed_child(topology.client, lambda: rekey(topology.client, child="net"))
        assert "takeover-message-id-learned" in topology.gateways[new.name].text()
        assert answered(topology, topology.client)
        [after] = established(topology.client)
        assert spis(after) == spis(before)
