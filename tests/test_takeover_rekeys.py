"""A gateway dies in the middle of a rekey, from either side: one side has the new SA, and a message is lost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from bridge.lab import Lab, Topology
from bridge.lab.daemon import wait_until
from bridge.lab.host import Host
from failover_support import established, spis
from takeover_support import (
    answered,
    connect,
    die,
    forget_neighbours,
    move,
    rekey,
    rekeyed_child,
    shared_topology,
    start,
    take,
    wait_log,
    wait_stub,
)

pytestmark = pytest.mark.lab

PATIENT = {"charon.retransmit_timeout": 0.5, "charon.retransmit_base": 1.0, "charon.retransmit_tries": 40}
REQUEST = "generating CREATE_CHILD_SA request"
REFUSAL = "N(TEMP_FAIL)"
ANSWER = "generating CREATE_CHILD_SA response"
DELETE = "sending DELETE for IKE_SA"
CREATE_CHILD_SA, INFORMATIONAL = 36, 37
"""exchange types (RFC 7296 section 3.1)"""


@pytest.fixture
def topology(request: pytest.FixtureRequest, each_release: str | None) -> Iterator[Topology]:
    """A client that sends its requests again for 20 s, or with its own settings: of charon and of its connection."""
    settings, client = getattr(request, "param", (PATIENT, {}))
    with Lab(release=each_release) as lab:
        topology = shared_topology(lab, client=client)
        topology.client.charon.settings.update(settings)
        start(topology, topology.gw1)
        yield topology


def lose(host: Host, exchange: int, *, requests_only: bool = False) -> None:
    """Lose what a host sends of an exchange, by the exchange type in the IKE header. It follows the UDP header, and on
    port 4500 a non-ESP marker. The third of the flags is that of a response."""
    rules = []
    for match, header in (("udp sport 500", 64), ("udp sport 4500 @th,64,32 0", 96)):
        requests = f"@th,{header + 154},1 0" if requests_only else ""
        rules.append(f"{match} @th,{header + 144},8 {exchange} {requests} drop")
    chain = f"type filter hook output priority raw; {'; '.join(rules)};"
    host.run("nft", f"table inet lost {{ chain output {{ {chain} }}; }}")


def lose_nothing(host: Host) -> None:
    host.run("nft", "delete table inet lost")


def sides(topology: Topology, asking: str) -> tuple[Host, Host]:
    """Who asks for the rekey, and who answers."""
    return (topology.client, topology.gw1) if asking == "client" else (topology.gw1, topology.client)


def ike_name(asking: str) -> str:
    return "home" if asking == "client" else "gw"


@pytest.mark.parametrize("known", [True, False], ids=["stored", "not stored"])
@pytest.mark.parametrize("asking", ["client", "gateway"])
def test_the_answer_to_the_rekey_of_a_child_sa_is_lost(topology: Topology, asking: str, known: bool) -> None:
    """Whether the bank knows of the new CHILD_SA or not."""
    client, gw1, gw2 = topology.client, topology.gw1, topology.gw2
    before = connect(topology)
    rekey_with_a_lost_answer(topology, asking, known, child="net")

    assert move(topology, gw1, gw2)["found"] == 1
    lose_nothing(client)
    wait_until(lambda: answered(topology, client), "traffic")
    rekeyed_child(client, lambda: rekey(client, child="net"))
    assert answered(topology, client)
    [after] = established(client)
    assert spis(after) == spis(before)


def rekey_with_a_lost_answer(topology: Topology, asking: str, known: bool, **what: str) -> None:
    """One side rekeys, and the answer is lost; what changes is `known` to the bank or not."""
    who, answering = sides(topology, asking)
    if not known:
        topology.gateways["gw1"].kill()
    for host in (topology.gw1, topology.client):
        if host is answering:
            lose(host, CREATE_CHILD_SA)
        else:
            host.run("nft", "add table inet lost")
    seen = len(answering.charon.text())
    rekey(who, **what)
    wait_log(answering, ANSWER, seen)


def test_a_request_to_rekey_the_ike_sa_is_not_processed_any_more(topology: Topology) -> None:
    """The other gateway gets it, with the client's retransmission, before the CHILD_SA has new keys: these follow at
    the new IKE_SA."""
    client, gw1, gw2 = topology.client, topology.gw1, topology.gw2
    before = connect(topology)
    rekey_with_a_lost_answer(topology, "client", False, ike="home")

    assert move(topology, gw1, gw2)["found"] == 1
    lose_nothing(client)
    wait_until(lambda: answered(topology, client), "traffic")
    [after] = established(client)
    assert spis(after) != spis(before)
    wait_until(lambda: "takeover-rekeyed" in topology.gateways["gw2"].text(), "new keys")
    rekeyed_child(client, lambda: rekey(client, child="net"))
    assert answered(topology, client)


LONG: tuple[dict[str, Any], dict[str, str]] = (PATIENT | {"charon.retransmit_tries": 400}, {})


@pytest.mark.parametrize("topology", [LONG], indirect=True)
@pytest.mark.parametrize("done", [True, False], ids=["done later", "never done"])
def test_a_client_that_is_rekeying_the_ike_sa_refuses_new_keys_until_it_is_done(topology: Topology, done: bool) -> None:
    """TEMPORARY_FAILURE (RFC 7296 section 2.25): it is asked again, under the message IDs that follow."""
    client, gw1, gw2 = topology.client, topology.gw1, topology.gw2
    before = connect(topology)
    lose(client, CREATE_CHILD_SA, requests_only=True)
    rekey(client, ike="home")
    wait_log(client, REQUEST)
    move(topology, gw1, gw2, "--timeout", "0.5")
    # more often than there are message IDs to try
    wait_until(lambda: client.charon.text().count(REFUSAL) >= 5, "five refusals")
    if done:
        lose_nothing(client)
        wait_until(lambda: answered(topology, client, 1), "traffic")
        wait_until(lambda: "takeover-rekeyed" in topology.gateways["gw2"].text(), "new keys")
        rekeyed_child(client, lambda: rekey(client, child="net"))
        rekeyed_child(client, lambda: rekey(gw2, child="net"))
        [after] = established(client)
        assert spis(after) != spis(before)
    else:
        wait_until(lambda: established(gw2) == [], "the end of the session", 60)
        lose_nothing(client)
        topology.connect()
    assert answered(topology, client)
    assert "takeover-message-id-tried" not in topology.gateways["gw2"].text()


@pytest.mark.parametrize("asking", ["client", "gateway"])
def test_the_ike_sa_was_rekeyed_and_the_old_one_is_not_deleted_yet(topology: Topology, asking: str) -> None:
    client, gw1, gw2 = topology.client, topology.gw1, topology.gw2
    before = connect(topology)
    who, _ = sides(topology, asking)
    lose(who, INFORMATIONAL)
    seen = len(who.charon.text())
    rekey(who, ike=ike_name(asking))
    wait_log(who, DELETE, seen)
    new = next(sa for sa in established(client) if spis(sa) != spis(before))
    wait_stub(topology, new["responder-spi" if asking == "client" else "initiator-spi"])

    die(topology, gw1)
    if asking == "client":
        lose_nothing(client)
    assert take(topology, gw2)["taken"] == 1
    assert answered(topology, client)
    rekeyed_child(client, lambda: rekey(client, child="net"))
    assert answered(topology, client)
    assert spis(new) in [spis(sa) for sa in established(client)]


OWN_DPD: tuple[dict[str, Any], dict[str, str]] = (
    {},
    {"dpd_delay": "2s", "children.net.dpd_action": "restart", "keyingtries": "0"},
)


@pytest.mark.parametrize("topology", [OWN_DPD], indirect=True)
@pytest.mark.parametrize("asking", ["client", "gateway"])
def test_the_answer_to_the_rekey_of_the_ike_sa_is_lost_and_the_client_connects_again(
    topology: Topology, asking: str
) -> None:
    """One side has an IKE_SA whose keys no other host has: the client's own dead peer detection decides."""
    client, gw1, gw2 = topology.client, topology.gw1, topology.gw2
    before = connect(topology)
    rekey_with_a_lost_answer(topology, asking, True, ike=ike_name(asking))

    die(topology, gw1)
    forget_neighbours(client)
    take(topology, gw2)
    lose_nothing(client)
    wait_until(lambda: answered(topology, client, 1), "traffic", 60)
    # the one that was taken over stays until charon gives up its request
    here, there = ({spis(sa) for sa in established(host)} for host in (client, gw2))
    assert (here & there) - {spis(before)}
