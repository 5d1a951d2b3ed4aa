"""Connections whose ways with the kernel's policies, interfaces, marks and routes are their own (`make test-vm`): a
resumed session has them as its first one had."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from bridge.lab import Lab, Topology, standard
from bridge.lab.charon import render
from bridge.lab.daemon import wait_until
from bridge.lab.esp import Esp
from bridge.lab.host import Host
from bridge.lab.topology import SITE
from failover_support import complete, established, fresh, last_move, resume, stub_key, the_sa

pytestmark = [pytest.mark.vm, pytest.mark.lab]

CHARON_TABLE = "220"
INTERFACE_ID = "42"
MARK = "7"


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    with Lab() as lab:
        topology = standard(lab, start=False)
        topology.agent.config["resume_on_down"] = False
        for sidecar in topology.gateways.values():
            # an emulated processor may take its time
            sidecar.config["bank"]["get_timeout"] = 5.0
        topology.start()
        assert lab.esp is Esp.KERNEL
        yield topology


@contextlib.contextmanager
def client_with(
    topology: Topology,
    child: Mapping[str, Any],
    charon: Mapping[str, Any] | None = None,
    guard: Mapping[str, Any] | None = None,
    **agent: Any,
) -> Iterator[Host]:
    """The client with options of its child, of its charon and of its guard, and as it was afterwards."""
    client, sidecar = topology.client, topology.agent
    # home-gw2 inherits from home; two traps for the same packets would leave it to the kernel where the session is
    options = {f"connections.home.children.net.{key}": value for key, value in child.items()}
    if "start_action" in child:
        options["connections.home-gw2.children.net.start_action"] = "none"
    options |= {f"connections.guard.children.inner.{key}": value for key, value in (guard or {}).items()}
    text = render(options)
    settings, config = dict(client.charon.settings), dict(sidecar.config)
    client.configure(text + "\n", "shape.conf")
    client.charon.settings.update(charon or {})
    sidecar.config.update(agent)
    restart(topology)
    fresh(topology)
    try:
        yield client
    finally:
        (client.etc / "swanctl/conf.d/shape.conf").unlink()
        client.charon.settings, sidecar.config = settings, config
        restart(topology)


def restart(topology: Topology) -> None:
    """The client's charon and sidecar, with the configuration as it is now."""
    topology.agent.stop()
    topology.client.charon.stop()
    topology.client.charon.forget()
    topology.agent.start(wait=False)
    topology.client.charon.start()
    topology.agent.wait_ready()


def resumed_from_gw1(topology: Topology) -> dict[str, Any]:
    """The session that is at gw1, resumed at gw2 after the death of gw1."""
    before = the_sa(topology.client)
    wait_until(lambda: complete(topology, stub_key(topology.gw1.address, before["responder-spi"])), "the stub")
    topology.kill_gateway(topology.gw1)
    outcome = resume(topology)
    assert (outcome["result"], outcome["children"]) == ("resumed", ["net"]), outcome
    after = the_sa(topology.client)
    assert after["local-vips"] == before["local-vips"]
    return after


def out(host: Host, *argv: str) -> str:
    return host.run(*argv).stdout


def test_a_trap_policy_sets_the_session_up_and_stands_after_a_resumption(topology: Topology) -> None:
    with client_with(topology, {"start_action": "trap"}, resume_on_down=True) as client:
        client.ping(SITE, count=1)
        wait_until(lambda: client.ping(SITE, count=1) == 1, "the session that a packet asked for", 60)
        before = the_sa(client)
        wait_until(lambda: complete(topology, stub_key(topology.gw1.address, before["responder-spi"])), "the stub")
        topology.kill_gateway(topology.gw1)

        # packets meet the trap when charon has given the old session up
        def at_gw2() -> bool:
            client.ping(SITE, count=1, timeout=0.2)
            return [sa["remote-host"] for sa in established(client)] == [topology.gw2.address]

        wait_until(at_gw2, "the session at gw2", 60)
        wait_until(lambda: last_move(topology).get("result") == "resumed", "the attempt's end", 60)
        wait_until(lambda: client.ping(SITE, count=1) == 1, "traffic", 60)
        wait_until(lambda: len(client.charon.sas()) == 1, "the end of what the trap has begun", 60)
        assert "net" in client.swanctl("--list-pols", "--trap")


def test_an_xfrm_interface_carries_the_resumed_session(topology: Topology) -> None:
    with client_with(
        topology,
        {"if_id_in": INTERFACE_ID, "if_id_out": INTERFACE_ID},
        {"charon.install_routes": "no"},
        # its policies are without if_id: they would drop what is sent to the interface
        guard={"start_action": "none"},
    ) as client:
        client.run("ip", "link", "add", "ipsec0", "type", "xfrm", "dev", "eth0", "if_id", INTERFACE_ID)
        try:
            client.run("ip", "link", "set", "ipsec0", "up")
            topology.connect()
            [address] = the_sa(client)["local-vips"]
            client.run("ip", "route", "add", "10.10.0.0/16", "dev", "ipsec0", "src", address)
            assert client.ping(SITE) == 3
            resumed_from_gw1(topology)
            assert client.ping(SITE) == 3
            states = out(client, "ip", "xfrm", "state")
            assert states.count("if_id 0x2a") == states.count("proto esp") == 2
        finally:
            client.run("ip", "link", "delete", "ipsec0")


def test_marks_are_on_the_resumed_sessions_policies(topology: Topology) -> None:
    with client_with(topology, {"mark_in": MARK, "mark_out": MARK}) as client:
        mark = ("iptables", "-t", "mangle", "-A", "PREROUTING", "-p", "esp", "-j", "MARK", "--set-mark", MARK)
        udp = ("-p", "udp", "--dport", "4500", "-j", "MARK", "--set-mark", MARK)
        client.run(*mark)
        client.run(*mark[:5], *udp)
        try:
            topology.connect()
            assert marked_ping(client)
            resumed_from_gw1(topology)
            assert marked_ping(client)
            assert out(client, "ip", "xfrm", "policy").count("mark 0x7/") >= 2
        finally:
            client.run("iptables", "-t", "mangle", "-F", "PREROUTING")


def marked_ping(client: Host) -> bool:
    """Whether echo requests with the mark are answered; others find no policy."""
    done = client.run("ping", "-n", "-c", "3", "-i", "0.2", "-W", "5", "-m", MARK, SITE, check=False)
    return done.stdout.count(" bytes from ") == 3


def test_a_child_without_policies_has_none_after_a_resumption(topology: Topology) -> None:
    with client_with(topology, {"policies": "no"}) as client:
        topology.connect()
        assert policies(client) == 0
        resumed_from_gw1(topology)
        assert policies(client) == 0
        assert out(client, "ip", "xfrm", "state").count("proto esp") == 2


def policies(host: Host) -> int:
    """How many policies about the site the kernel has, but for those of the guard, which drop."""
    lines = out(host, "ip", "-oneline", "xfrm", "policy").splitlines()
    return sum("10.10.0.0/16" in line and "action block" not in line for line in lines)


def test_the_virtual_ip_is_on_the_interface_that_is_configured(topology: Topology) -> None:
    client = topology.client
    client.run("ip", "link", "add", "inner0", "type", "dummy")
    client.run("ip", "link", "set", "inner0", "up")
    try:
        with client_with(topology, {}, {"charon.install_virtual_ip_on": "inner0"}):
            topology.connect()
            resumed_from_gw1(topology)
            [address] = the_sa(client)["local-vips"]
            assert f"inet {address}/32" in out(client, "ip", "address", "show", "dev", "inner0")
            assert client.ping(SITE) == 3
    finally:
        client.run("ip", "link", "delete", "inner0")


def test_charon_that_installs_no_routes_installs_none_for_a_resumed_session(topology: Topology) -> None:
    with client_with(topology, {}, {"charon.install_routes": "no"}) as client:
        topology.connect()
        [address] = the_sa(client)["local-vips"]
        client.run("ip", "route", "add", "10.10.0.0/16", "dev", "eth0", "src", address)
        try:
            assert client.ping(SITE) == 3
            resumed_from_gw1(topology)
            assert client.ping(SITE) == 3
            assert out(client, "ip", "route", "show", "table", CHARON_TABLE) == ""
        finally:
            client.run("ip", "route", "delete", "10.10.0.0/16", check=False)
