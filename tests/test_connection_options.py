"""Options of connections that people have: a session with them is resumed with its traffic, and goes on."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from bridge.lab import Lab, Topology, standard
from bridge.lab.charon import render
from bridge.lab.daemon import wait_until
from bridge.lab.esp import Esp
from bridge.lab.topology import SITE
from failover_support import Outcome, complete, connect, established, fresh, resume, spis, stub_key, the_sa
from probe_support import stored_children

pytestmark = pytest.mark.lab

SECRET = 'secrets { eap-someone { id = someone\n secret = "of this lab only" } }\n'
Settings = Mapping[str, Any]

BOTH: dict[str, Settings] = {
    "encap": {"encap": "yes"},
    "fragmentation": {"fragmentation": "force"},
    "childless": {"childless": "force"},
    "without MOBIKE": {"mobike": "no"},
    "if_id": {"children.net.if_id_in": 5, "children.net.if_id_out": 5},
    "reauthentication configured": {"reauth_time": "1h"},
}
"""the same on both sides"""
GATEWAY: dict[str, Settings] = {
    "wildcard identity": {"remote.id": "*@example.org"},
    "two rounds": {"remote-2.auth": "eap-md5", "remote-2.eap_id": "%any"},
}
CLIENT: dict[str, Settings] = {
    "two rounds": {"local-2.auth": "eap-md5", "local-2.eap_id": "someone"},
}


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    """The standard lab; the client moves when it is told to."""
    with Lab() as lab:
        built = standard(lab, start=False)
        built.agent.config["resume_on_down"] = False
        for host in (built.gw1, built.gw2, built.client):
            host.configure(SECRET, "eap.conf")
        for host in (built.gw1, built.gw2):
            # beside the one that fits
            host.configure("connections { other : connections.gw { remote { id = *@example.net } } }\n", "other.conf")
        built.start()
        yield built


@contextlib.contextmanager
def configured(topology: Topology, gateway: Settings, client: Settings) -> Iterator[None]:
    """The gateways' connection `gw` and the client's `home` with more options, and as they were afterwards."""
    fresh(topology)
    parts = [(topology.gw1, "gw", gateway), (topology.gw2, "gw", gateway), (topology.client, "home", client)]
    for host, name, settings in parts:
        text = render({f"connections.{name}.{key}": value for key, value in settings.items()})
        host.configure(text + "\n", "zz.conf")
        host.charon.load()
    try:
        yield
    finally:
        fresh(topology)
        for host, _, _ in parts:
            (host.etc / "swanctl/conf.d/zz.conf").unlink()
            host.charon.load()


@contextlib.contextmanager
def session(topology: Topology) -> Iterator[None]:
    connect(topology)
    yield


@contextlib.contextmanager
def session_with_routes(topology: Topology, interface: str = "eth0") -> Iterator[None]:
    """Where the kernel does ESP, charon makes no routes for policies of single protocols, or of an interface: they are
    made here. The client's guard drops what these policies are not about: what is sent to an interface, and what ping
    asks the kernel its own address with."""
    kernel = topology.lab.esp is Esp.KERNEL
    gateways = (topology.gw1, topology.gw2) if kernel else ()
    back = ("10.20.0.0/16", "dev", interface)
    guard = topology.client.etc / "swanctl/conf.d/guard.conf"
    try:
        if kernel:
            topology.client.configure(
                "connections { guard { children { inner { start_action = none } } } }\n", guard.name
            )
        topology.client.charon.load()
        for gateway in gateways:
            gateway.run("ip", "route", "add", *back)
        topology.connect()
        sa = the_sa(topology.client)
        if kernel:
            topology.client.run("ip", "route", "add", "10.10.0.0/16", "dev", interface, "src", sa["local-vips"][0])
        key = stub_key(topology.gw1.address, sa["responder-spi"])
        wait_until(lambda: complete(topology, key), "the stub of the session")
        assert topology.client.ping(SITE) == 3
        yield
    finally:
        for gateway in gateways:
            gateway.run("ip", "route", "delete", *back, check=False)
        guard.unlink(missing_ok=True)


@contextlib.contextmanager
def session_with_interfaces(topology: Topology) -> Iterator[None]:
    """Where the kernel does ESP, policies with an if_id are those of an interface with it: one on each host."""
    hosts = (topology.gw1, topology.gw2, topology.client) if topology.lab.esp is Esp.KERNEL else ()
    try:
        for host in hosts:
            host.run("ip", "link", "add", "ipsec0", "type", "xfrm", "dev", "eth0", "if_id", "5")
            host.run("ip", "link", "set", "ipsec0", "up")
        with session_with_routes(topology, "ipsec0"):
            yield
    finally:
        for host in hosts:
            host.run("ip", "link", "delete", "ipsec0", check=False)


def failed_over(topology: Topology) -> Outcome:
    """gw1 dies, and the session is resumed at gw2, with traffic; charon rekeys it there."""
    topology.kill_gateway(topology.gw1)
    outcome = resume(topology)
    assert (outcome["result"], outcome["gateway"]) == ("resumed", topology.gw2.address)
    assert topology.client.ping(SITE) == 3
    before = spis(the_sa(topology.client))
    topology.client.swanctl("--rekey", "--ike", outcome["connection"])
    wait_until(
        lambda: len(established(topology.client)) == 1 and spis(the_sa(topology.client)) != before, "the rekeyed IKE_SA"
    )
    assert topology.client.ping(SITE) == 3
    return outcome


@pytest.mark.parametrize("name", sorted({*BOTH, *GATEWAY, *CLIENT}))
def test_a_session_with_this_option_is_resumed(topology: Topology, name: str) -> None:
    both = BOTH.get(name, {})
    options = configured(topology, {**both, **GATEWAY.get(name, {})}, {**both, **CLIENT.get(name, {})})
    with options, session_with_interfaces(topology) if name == "if_id" else session(topology):
        assert the_sa(topology.gw1)["name"] == "gw"
        failed_over(topology)
        assert the_sa(topology.gw2)["name"] == "gw"
    # an XFRM interface has no neighbours
    assert "address-not-announced" not in topology.gateways["gw2"].text()


@pytest.mark.parametrize("make_before_break", ["no", "yes"])
def test_a_session_that_its_client_reauthenticated_is_resumed(topology: Topology, make_before_break: str) -> None:
    topology.client.charon.settings["charon.make_before_break"] = make_before_break
    fresh(topology)
    topology.client.charon.stop()
    topology.client.charon.start()
    wait_until(lambda: "charon-connected" in topology.agent.text().rsplit("charon-disconnected", 1)[-1], "charon")
    before = spis(connect(topology))
    topology.client.swanctl("--rekey", "--ike", "home", "--reauth")
    wait_until(
        lambda: len(established(topology.client)) == 1 and spis(the_sa(topology.client)) != before, "the new IKE_SA"
    )
    wait_until(lambda: topology.client.ping(SITE, count=1) == 1, "traffic")
    key = stub_key(topology.gw1.address, the_sa(topology.client)["responder-spi"])
    wait_until(lambda: topology.bank.stubs() == [key] and complete(topology, key), "its stub alone")
    failed_over(topology)


def test_a_session_that_the_gateway_initiated_is_resumed_by_its_peer(topology: Topology) -> None:
    inside = "10.99.9.9"
    topology.client.run("ip", "address", "add", f"{inside}/32", "dev", "lo")
    peer = {"remote_addrs": topology.client.address, "remote.id": "client@example.org", "pools": ""}
    hub = peer | {"children.net.remote_ts": f"{inside}/32"}
    with configured(topology, hub, {"vips": "", "children.net.local_ts": f"{inside}/32"}):
        topology.gw1.charon.initiate("net", "gw")
        wait_until(lambda: len(topology.bank.stubs()) == 1 and len(established(topology.client)) == 1, "the session")
        assert the_sa(topology.gw1).get("initiator") == "yes"
        reached = ("ping", "-c", "2", "-i", "0.1", "-W", "2", "-I", inside, SITE)
        topology.client.run(*reached)
        topology.kill_gateway(topology.gw1)
        assert resume(topology)["result"] == "resumed"
        topology.client.run(*reached)
        assert the_sa(topology.client)["remote-host"] == topology.gw2.address
    topology.client.run("ip", "address", "delete", f"{inside}/32", "dev", "lo")


def test_a_session_with_20_child_sas_comes_back_with_all_of_them(topology: Topology) -> None:
    def children(side: str) -> Settings:
        return {f"children.c{n}.{side}": f"{SITE}/32[tcp/{7000 + n}]" for n in range(20)} | {
            f"children.c{n}.esp_proposals": "aes128gcm16" for n in range(20)
        }

    with configured(topology, children("local_ts"), children("remote_ts")):
        names, key = sorted(["net", *(f"c{n}" for n in range(20))]), connect(topology)["responder-spi"]
        for n in range(20):
            topology.client.charon.initiate(f"c{n}", "home")
        stub = stub_key(topology.gw1.address, key)
        wait_until(lambda: stored_children(topology, stub) == names, "all CHILD_SAs in the stub")
        topology.kill_gateway(topology.gw1)
        outcome = resume(topology)
        assert outcome["result"] == "resumed"
        assert sorted(outcome["children"]) == names
        assert len(the_sa(topology.gw2)["child-sas"]) == 21
        assert topology.client.ping(SITE) == 3


def test_a_session_with_250_selectors_comes_back(topology: Topology) -> None:
    many = ", ".join([f"{SITE}/32[icmp]", *(f"{SITE}/32[tcp/{7000 + n}]" for n in range(249))])
    options = configured(topology, {"children.net.local_ts": many}, {"children.net.remote_ts": many})
    with options, session_with_routes(topology):
        failed_over(topology)
        [child] = the_sa(topology.gw2)["child-sas"].values()
        assert len(child["local-ts"]) == 250


def test_among_501_connections_in_500_files_loaded_again_and_a_charon_that_read_its_configuration_again(
    topology: Topology,
) -> None:
    files = [host.etc / f"swanctl/conf.d/many-{n}.conf" for host in (topology.gw2, topology.client) for n in range(499)]
    for file in files:
        file.write_text(f"connections {{ {file.stem} {{ remote_addrs = 192.0.2.1\n version = 2 }} }}\n")
    try:
        for host in (topology.gw2, topology.client):
            host.swanctl("--load-all", "--clear", "--noprompt", timeout=120)
        fresh(topology)
        connect(topology)
        for host in (topology.gw1, topology.gw2, topology.client):
            assert host.charon.process is not None
            host.charon.process.send_signal(signal.SIGHUP)
        topology.client.swanctl("--load-all", "--clear", "--noprompt", timeout=120)
        failed_over(topology)
    finally:
        for file in files:
            file.unlink()
        for host in (topology.gw2, topology.client):
            host.swanctl("--load-all", "--noprompt", timeout=120)
