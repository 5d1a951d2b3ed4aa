"""Several VPNs and several sessions on one client host: real charons, two clusters of gateways."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from bridge.lab import Lab
from bridge.lab.daemon import wait_until
from bridge.lab.demo import Ping
from vpns_support import ADDRESSES, SITES, Clusters, clusters

pytestmark = pytest.mark.lab

PATIENCE = 120


@pytest.fixture(scope="module")
def both() -> Iterator[Clusters]:
    with Lab() as lab:
        built = clusters(lab)
        built.start()
        yield built


@pytest.fixture(autouse=True)
def _fresh(both: Clusters) -> None:
    both.fresh()


def test_a_session_whose_gateway_died_is_resumed_while_that_of_another_vpn_is_up(both: Clusters) -> None:
    both.connect("x1")
    both.connect("y1")
    both.kill("y1")
    wait_until(lambda: both.at() == {"home": "x1", "work-gw2": "y2"}, "the session at y2", PATIENCE)
    wait_until(lambda: both.works("y"), "traffic")
    wait_until(lambda: both.works("x"), "traffic", PATIENCE)


def test_with_a_dead_gateway_in_each_vpn_each_session_is_resumed(both: Clusters) -> None:
    both.connect("x1")
    both.connect("y1")
    both.kill("x1", "y1")
    wait_until(lambda: both.at() == {"home-gw2": "x2", "work-gw2": "y2"}, "both sessions at the others", PATIENCE)
    wait_until(lambda: both.works("x") and both.works("y"), "traffic")


def test_after_20_seconds_without_its_link_each_session_is_up_once(both: Clusters) -> None:
    both.connect("x1")
    both.connect("y1")
    said = len(both.agent.text())
    both.lab.unplug(both.client)
    try:
        wait_until(lambda: both.agent.text()[said:].count("event=moved") >= 2, "attempts in vain", PATIENCE)
    finally:
        both.lab.plug(both.client)
    wait_until(lambda: {name[0] for name in both.at().values()} == {"x", "y"}, "both sessions", PATIENCE)
    wait_until(lambda: both.works("x") and both.works("y"), "traffic")
    assert len(both.sas()) == 2


def test_resume_leaves_the_session_of_another_vpn_alone(both: Clusters) -> None:
    both.connect("x1")
    both.connect("y1")
    healthy = [sa["initiator-spi"] for sa in both.sas() if sa["name"] == "home"]
    both.kill("y1")
    outcome = both.resume("--vpn", "y")
    assert (outcome["result"], outcome["vpn"], outcome["connection"]) == ("resumed", "y", "work-gw2")
    assert [sa["initiator-spi"] for sa in both.sas() if sa["name"] == "home"] == healthy
    wait_until(lambda: both.works("x"), "traffic", PATIENCE)
    wait_until(lambda: both.works("y"), "traffic", PATIENCE)


def test_resume_without_a_name_takes_the_session_that_was_lost_to_a_gateway_of_its_vpn(both: Clusters) -> None:
    vpns = {name: vpn | {"resume_on_down": False} for name, vpn in both.agent.config["vpns"].items()}
    with both.agent_with(vpns=vpns):
        both.connect("x1")
        both.connect("y1")
        both.kill("y1")
        wait_until(lambda: both.at() == {"home": "x1"}, "the end of the other session", PATIENCE)
        outcome = both.resume()
        assert (outcome["result"], outcome["vpn"], outcome["gateway"]) == ("resumed", "y", ADDRESSES["y2"])
        assert both.at() == {"home": "x1", "work-gw2": "y2"}


def test_a_gateway_of_another_vpn_is_none_that_a_session_may_go_to(both: Clusters) -> None:
    both.connect("x1")
    outcome = both.resume("--vpn", "x", "--to", ADDRESSES["y1"])
    assert (outcome["result"], outcome["reason"]) == ("failed", "gateway-not-configured")
    assert both.at() == {"home": "x1"}


def test_a_refused_session_does_not_end_one_of_the_same_connection_that_works(both: Clusters) -> None:
    both.connect("x1")
    both.connect("y1")
    both.kill("y1", "y2")
    with both.agent_with(resume={"answer_timeout": 0.5, "initiate_timeout": 2.0}):
        outcome = both.resume("--vpn", "y")
    assert outcome["result"] == "failed"
    assert both.at()["home"] == "x1"
    wait_until(lambda: both.works("x"), "traffic", PATIENCE)


SECOND = "192.168.50.11"
"""the client's other uplink"""
UPLINKS = """\
connections {
    a : connections.home { local_addrs = 192.168.50.10 }
    a-gw2 : connections.home-gw2 { local_addrs = 192.168.50.10 }
    b : connections.home { local_addrs = 192.168.50.11 }
    b-gw2 : connections.home-gw2 { local_addrs = 192.168.50.11 }
}
"""


@pytest.fixture
def uplinks(both: Clusters) -> Iterator[Clusters]:
    """Two sessions of the client's at x1, one over each of its uplinks."""
    entries = [
        {"address": ADDRESSES[gateway], "connection": connection}
        for gateway, connection in (("x1", "a"), ("x1", "b"), ("x2", "a-gw2"), ("x2", "b-gw2"))
    ]
    address = ("ip", "address", "add", f"{SECOND}/24", "dev", "eth0")
    both.client.run(*address)
    both.client.configure(UPLINKS, "uplinks.conf")
    both.client.charon.load()
    with both.agent_with(vpns={"x": {"gateways": entries}}):
        both.connect("x1", "a")
        both.connect("x1", "b")
        yield both
        both.fresh()
    (both.client.etc / "swanctl/conf.d/uplinks.conf").unlink()
    both.client.run("ip", "address", "delete", f"{SECOND}/24", "dev", "eth0")
    both.client.charon.load()


def over(both: Clusters) -> dict[str, tuple[str, str]]:
    """The client's sessions: connection to local address and gateway."""
    return {sa["name"]: (sa["local-host"], sa["remote-host"]) for sa in both.sas()}


MOVED = {"a-gw2": ("192.168.50.10", ADDRESSES["x2"]), "b-gw2": (SECOND, ADDRESSES["x2"])}


def test_a_drain_moves_both_sessions_of_a_site_each_over_its_own_uplink(uplinks: Clusters) -> None:
    before = {sa["local-host"]: sa["local-vips"] for sa in uplinks.sas()}
    drain = uplinks.gateways["x1"].sidecars[0].command("drain", "--json", "--to", ADDRESSES["x2"], timeout=120)
    done = json.loads(drain.stdout)
    assert (done["wanted"], done["moved"]) == (2, 2)
    assert over(uplinks) == MOVED
    assert {sa["local-host"]: sa["local-vips"] for sa in uplinks.sas()} == before
    wait_until(lambda: uplinks.works("x"), "traffic", PATIENCE)


def test_both_sessions_of_a_site_survive_their_gateway_each_over_its_own_uplink(uplinks: Clusters) -> None:
    uplinks.kill("x1")
    wait_until(lambda: over(uplinks) == MOVED, "both sessions at x2", PATIENCE)
    wait_until(lambda: uplinks.works("x"), "traffic")


def test_a_session_that_was_sent_away_stays_where_it_is_when_charon_does_not_install_the_new_one(
    uplinks: Clusters,
) -> None:
    before = over(uplinks)
    # the sidecar believes that it is there
    uplinks.client.charon.vici().unload_conn({"name": "a-gw2"})
    drain = uplinks.gateways["x1"].sidecars[0].command("drain", "--json", "--to", ADDRESSES["x2"], check=False)
    assert json.loads(drain.stdout)["moved"] == 1
    assert over(uplinks) == {"a": before["a"], "b-gw2": MOVED["b-gw2"]}
    wait_until(lambda: uplinks.works("x"), "traffic", PATIENCE)


@pytest.fixture
def restarting(both: Clusters) -> Iterator[Clusters]:
    """charon itself sets a session up again when its gateway is dead, and never gives up."""
    text = "connections { home { keyingtries = 0\n children { net { dpd_action = restart } } } }\n"
    both.client.configure(text, "restart.conf")
    both.client.charon.load()
    yield both
    (both.client.etc / "swanctl/conf.d/restart.conf").unlink()
    both.client.charon.load()


def test_one_session_is_up_after_the_dead_gateways_return_where_charon_restarts_it_too(restarting: Clusters) -> None:
    restarting.connect("x1")
    said = len(restarting.agent.text())
    restarting.kill("x1")
    wait_until(lambda: restarting.at() == {"home-gw2": "x2"}, "the session at x2", PATIENCE)
    wait_until(lambda: "half-open-ended" in restarting.agent.text()[said:], "the end of charon's own handshake")
    wait_until(lambda: [sa["name"] for sa in restarting.client.charon.sas()] == ["home-gw2"], "one IKE_SA")
    host = restarting.gateways["x1"]
    host.sidecars[0].start(wait=False)
    host.charon.start()
    host.sidecars[0].wait_ready()
    assert [sa["name"] for sa in restarting.client.charon.sas()] == ["home-gw2"]
    wait_until(lambda: restarting.works("x"), "traffic", PATIENCE)


def test_without_configuration_vpns_are_learned_from_charons_connections(both: Clusters) -> None:
    with both.agent_with(vpns={}):
        both.connect("x1")
        both.connect("y1")
        told = json.loads(both.agent.command("status", "--json").stdout)
        assert {row["connection"]: row["vpn"] for row in told["sas"]} == {"home": "home", "work": "work"}
        both.kill("x1", "y1")
        wait_until(lambda: both.at() == {"home-gw2": "x2", "work-gw2": "y2"}, "both sessions at the others", PATIENCE)
        assert [both.works(cluster) for cluster in "xy"] == [True, True]


@pytest.fixture
def alone(both: Clusters) -> Iterator[Clusters]:
    """The client's charon knows one gateway only, and its sidecar nothing."""
    vici = both.client.charon.vici()
    for name in ("home-gw2", "work", "work-gw2"):
        vici.unload_conn({"name": name})
    with both.agent_with(vpns={}, log={"level": "debug"}):
        yield both
        both.fresh()
    both.client.charon.load()


def test_a_client_that_knows_one_gateway_resumes_at_another_that_this_one_named(alone: Clusters) -> None:
    said = len(alone.agent.text())
    alone.connect("x1")
    wait_until(lambda: "event=gateways-received" in alone.agent.text()[said:], "the names of the other gateways", 30)
    alone.kill("x1")
    wait_until(lambda: alone.at() == {"home": "x2"}, "the session at x2", PATIENCE)
    wait_until(lambda: alone.works("x"), "traffic", PATIENCE)
    alone.client.swanctl("--rekey", "--ike", "home")
    wait_until(lambda: alone.at() == {"home": "x2"} and alone.works("x"), "the rekeyed session")


def test_a_resumed_session_that_gets_no_packets_any_more_is_set_up_again(both: Clusters) -> None:
    both.connect("x1")
    # from x2 nothing but IKE comes through, at first
    esp = (("-p", "esp"), ("-p", "udp", "--dport", "4500", "-m", "u32", "--u32", "0>>22&0x3C@8=1:0xffffffff"))
    for packets in esp:
        both.client.run("iptables", "-A", "INPUT", "-s", ADDRESSES["x2"], *packets, "-j", "DROP")
    ping = Ping(both.client, SITES["x"])
    said = len(both.agent.text())
    try:
        wait_until(lambda: ping.answers() > 0, "traffic")
        # the counters are read now and then
        wait_until(lambda: ping.answers() > 80, "traffic for a while")
        both.kill("x1")
        outcome = both.resume()
        assert outcome["result"] == "resumed", both.agent.tail(20)
        wait_until(lambda: "no-traffic-after-resumption" in both.agent.text()[said:], "the alarm", 60)
    finally:
        for packets in esp:
            both.client.run("iptables", "-D", "INPUT", "-s", ADDRESSES["x2"], *packets, "-j", "DROP")
        ping.stop()
    wait_until(lambda: "reason=no-traffic" in both.agent.text()[said:], "the new session", PATIENCE)
    assert both.at() == {"home-gw2": "x2"}
    wait_until(lambda: both.works("x"), "traffic", PATIENCE)


def test_a_gateway_that_does_not_answer_costs_a_quarter_of_a_second(both: Clusters) -> None:
    dead = [{"address": f"192.168.50.{number}", "connection": "home-gw2"} for number in (77, 78)]
    entries = [*dead, {"address": ADDRESSES["x2"], "connection": "home-gw2"}]
    home = {"address": ADDRESSES["x1"], "connection": "home"}
    with both.agent_with(vpns={"x": {"gateways": [home, *entries], "resume_on_down": False}}):
        both.connect("x1")
        both.kill("x1")
        outcome = both.resume()
    assert (outcome["result"], outcome["gateway"]) == ("resumed", ADDRESSES["x2"])
    # answer_timeout of the lab is 1.5 s for each
    assert 500 <= outcome["total_ms"] < 1400


def test_without_configuration_a_client_that_crashed_resumes_what_it_had(both: Clusters) -> None:
    with both.agent_with(vpns={}, held={"file": "/etc/ike-sa-sync/sessions"}):
        both.connect("x1")
        both.connect("y1")
        file = both.client.etc / "ike-sa-sync/sessions"
        # each session is about 200 octets
        wait_until(lambda: file.exists() and file.stat().st_size > 400, "both sessions in the file")
        both.agent.kill()
        both.client.charon.crash()
        said = len(both.agent.text())
        both.agent.start(wait=False)
        both.client.charon.start()
        wait_until(lambda: both.at() == {"home": "x1", "work": "y1"}, "both sessions where they were", PATIENCE)
        wait_until(lambda: both.works("x") and both.works("y"), "traffic")
        wait_until(lambda: both.agent.text()[said:].count("result=resumed") == 2, "word of both")
        file.unlink()
