"""Kinds of sessions that are taken over: address families, proposals, several CHILD_SAs, PFS, rekeyed IKE_SAs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from bridge.lab import Lab, Topology
from bridge.lab.charon import render
from bridge.lab.daemon import wait_until
from bridge.lab.host import Host
from bridge.lab.pki import certify
from bridge.lab.topology import SITE, client_host
from failover_support import established, replaced, spis
from takeover_support import (
    SHARED6,
    answered,
    client_settings,
    connect,
    die,
    move,
    rekey,
    rekeyed_child,
    shared_topology,
    sharing,
    start,
    take,
    wait_children,
    wait_stub,
)

pytestmark = pytest.mark.lab

CBC = "aes128-sha256-x25519"
AEAD = "aes256gcm16-prfsha384-ecp256"
PFS = "aes128gcm16-x25519"
NAME = "vpn.example.org"
ROUTER, PORT = "192.168.50.31", "23456"
"""the address that a NAT gives to its client, and the port"""
SIDES = ("gateway", "client")


def settings(**both: str) -> dict[str, Any]:
    return {side: {key.replace("__", "."): value for key, value in both.items()} for side in SIDES}


def taken_over(topology: Topology) -> None:
    """gw1 dies; the session goes on at gw2, and both sides rekey it."""
    [before] = established(topology.client)
    outcome = move(topology, topology.gw1, topology.gw2)
    assert (outcome["found"], outcome["taken"]) == (1, 1)
    assert answered(topology, topology.client)
    [after] = established(topology.client)
    assert spis(after) == spis(before)
    rekeyed_child(topology.client, lambda: rekey(topology.client, child="net"))
    rekeyed_child(topology.client, lambda: rekey(topology.gw2, child="net"))
    assert answered(topology, topology.client)


@pytest.mark.parametrize("proposal", [CBC, AEAD])
def test_aead_and_cbc_with_pfs_after_rekeying_the_ike_sa(each_release: str | None, proposal: str) -> None:
    with sharing(each_release, **settings(proposals=proposal, children__net__esp_proposals=PFS)) as topology:
        connect(topology)
        for host, name in ((topology.client, "home"), (topology.gw1, "gw")):
            [before] = established(topology.client)
            rekey(host, ike=name)
            wait_until(lambda before=before: replaced(topology.client, spis(before)), "a new IKE_SA")  # type: ignore[misc]
        [there] = established(topology.gw1)
        wait_stub(topology, there["initiator-spi" if there.get("initiator") == "yes" else "responder-spi"])
        taken_over(topology)


def test_three_child_sas(each_release: str | None) -> None:
    """Each of them carries traffic. charon's ESP in user space sets up no CHILD_SA whose network its host has no
    address in."""
    networks = {"one": "10.10.31.", "two": "10.10.32."}
    gateway = {f"children.{name}.local_ts": f"{network}0/24" for name, network in networks.items()}
    client = {f"children.{name}.remote_ts": f"{network}0/24" for name, network in networks.items()}
    with sharing(each_release, gateway=gateway, client=client) as topology:
        for host in (topology.gw1, topology.gw2):
            for network in networks.values():
                host.run("ip", "address", "add", f"{network}1/32", "dev", "lo")
        sa = connect(topology)
        for name in networks:
            topology.client.charon.initiate(name, "home")
        wait_children(topology, sa["responder-spi"], "net", *networks)
        before = child_spis(topology)
        assert sorted(name for name, _ in before) == ["net", "one", "two"]
        assert move(topology, topology.gw1, topology.gw2)["taken"] == 1
        # one is rekeyed after the other
        wait_until(lambda: not before & child_spis(topology), "the end of the old CHILD_SAs")
        wait_until(
            lambda: sorted(name for name, _ in child_spis(topology)) == ["net", "one", "two"], "each of them once"
        )
        for target in (SITE, *(f"{network}1" for network in networks.values())):
            assert answered(topology, topology.client, target=target)


def test_a_child_sa_that_was_not_stored_is_set_up_again_when_the_client_rekeys_it(
    each_release: str | None,
) -> None:
    """The others continue; the new gateway answers CHILD_SA_NOT_FOUND."""
    gateway, client = ({f"children.one.{side}": "10.10.31.0/24"} for side in ("local_ts", "remote_ts"))
    with sharing(each_release, gateway=gateway, client=client) as topology:
        for host in (topology.gw1, topology.gw2):
            host.run("ip", "address", "add", "10.10.31.1/32", "dev", "lo")
        connect(topology)
        topology.gateways["gw1"].kill()
        topology.client.charon.initiate("one", "home")
        before = child_spis(topology)
        assert move(topology, topology.gw1, topology.gw2)["taken"] == 1
        wait_until(lambda: len(before & child_spis(topology)) == 1, "new keys of the other one")
        assert answered(topology, topology.client)
        rekey(topology.client, child="one")
        wait_until(lambda: not before & child_spis(topology), "the end of the old CHILD_SA")
        wait_until(lambda: sorted(name for name, _ in child_spis(topology)) == ["net", "one"], "each of them once")
        for target in (SITE, "10.10.31.1"):
            assert answered(topology, topology.client, target=target)


def child_spis(topology: Topology) -> set[tuple[str, str]]:
    """Names and inbound SPIs of the client's installed CHILD_SAs."""
    [sa] = established(topology.client)
    installed = [child for child in sa["child-sas"].values() if child["state"] == "INSTALLED"]
    return {(child["name"], child["spi-in"]) for child in installed}


def test_eap_with_a_virtual_ip(each_release: str | None) -> None:
    """The gateway shows a certificate, the client logs in by EAP: its address and its EAP identity stay."""
    gateway = {"local.auth": "pubkey", "local.certs": "ecdsa.pem", "remote.auth": "eap-md5", "remote.eap_id": "%any"}
    client = {"remote.auth": "pubkey", "remote.id": NAME, "local.auth": "eap-md5", "local.eap_id": "someone"}
    with Lab(release=each_release) as lab:
        topology = shared_topology(lab, gateway=gateway, client=client)
        hosts = dict.fromkeys((topology.gw1, topology.gw2), (f"CN={NAME}", NAME))
        certify("ecdsa", hosts | {topology.client: ("CN=client.example.org", "client.example.org")})
        for host in (*hosts, topology.client):
            host.configure('secrets { eap-someone { id = someone\n secret = "of this lab only" } }\n', "eap.conf")
        start(topology, topology.gw1)
        connect(topology)
        [before] = established(topology.gw1)
        taken_over(topology)
        [after] = established(topology.gw2)
        for key in ("remote-eap-id", "remote-vips", "remote-id"):
            assert after[key] == before[key]
        assert (after["remote-eap-id"], after["remote-vips"]) == ("someone", ["10.20.1.1"])


def test_a_client_behind_a_nat_that_rewrites_its_port(each_release: str | None) -> None:
    with Lab(release=each_release) as lab:
        topology = shared_topology(lab)
        inner = behind_a_nat(topology)
        start(topology, topology.gw1)
        inner.charon.start()
        topology = dataclasses.replace(topology, client=inner)
        connect(topology)
        [before] = established(topology.gw1)
        assert (before["remote-host"], before["remote-port"]) == (ROUTER, PORT)
        taken_over(topology)
        [after] = established(topology.gw2)
        assert (after["remote-host"], after["remote-port"]) == (ROUTER, PORT)


def behind_a_nat(topology: Topology) -> Host:
    """A client without a sidecar, not started, behind a router that gives it another port."""
    lab = topology.lab
    router = lab.add_host("nat", f"{ROUTER}/24", forward=True)
    lab.add_network("in-nat")
    lab.attach(router, "10.99.0.1/24", network="in-nat")
    nat = ("iptables", "-t", "nat", "-A", "POSTROUTING", "-o", "eth0", "-p", "udp", "-j", "MASQUERADE")
    router.run(*nat, "--to-ports", PORT)
    inner = client_host(lab, "inner", "10.99.0.10", topology.secret, network="in-nat")
    inner.run("ip", "route", "add", "default", "via", "10.99.0.1")
    inner.configure(render({f"connections.home.{key}": value for key, value in client_settings().items()}), "own.conf")
    return inner


def test_ipv6(each_release: str | None) -> None:
    with sharing(each_release, client={"remote_addrs": SHARED6}) as topology:
        connect(topology, address=SHARED6)
        [before] = established(topology.client)
        die(topology, topology.gw1)
        assert take(topology, topology.gw2, address=SHARED6)["taken"] == 1
        wait_until(lambda: topology.client.ping(SITE, count=1, timeout=1.0) == 1, "traffic")
        [after] = established(topology.client)
        assert spis(after) == spis(before)
