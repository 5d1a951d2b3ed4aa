"""The provisioning scripts, the Debian package and its systemd units, on machines that boot (`make test-vm`)."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.lab.daemon import wait_until
from vm_fixtures import provision
from vm_support import (
    PACKAGE,
    PATIENCE,
    SITE,
    Machine,
    Machines,
    active,
    assert_no_trace,
    bank_cli,
    empty_bank,
    expected,
    reachable,
    stubs,
)

pytestmark = pytest.mark.vm


@pytest.fixture(autouse=True)
def _connected(provisioned: Machines) -> None:
    """Before each test: everything runs, and the client has one session, at gw1."""
    machines = provisioned
    gw1, gw2, client = machines["gw1"], machines["gw2"], machines["client"]
    for gateway in (gw1, gw2):
        if not gateway.leader():
            gateway.power_on()
            time.sleep(5)  # charon's start and an SA of its first seconds cannot be told apart
    for machine, role in ((gw1, "gateway"), (gw2, "gateway"), (client, "client")):
        machine.run("systemctl", "start", "ike-sa-sync-ha.socket", f"ike-sa-sync-{role}", "strongswan")
        wait_until(lambda machine=machine, role=role: reachable(machine, role), "charon, reached", PATIENCE)  # type: ignore[misc]
    for machine in (client, gw1, gw2):
        for connection in ("home", "home-gw2") if machine is client else ("gw",):
            machine.run("swanctl", "--terminate", "--ike", connection, "--force", check=False)
    wait_until(lambda: not any(machine.sas() for machine in (gw1, gw2, client)), "no SA", PATIENCE)
    empty_bank(machines)
    client.run("swanctl", "--initiate", "--child", "net", "--ike", "home")
    wait_until(lambda: len(stubs(machines)) == 1, "the stub", PATIENCE)


def test_every_provisioned_machine_is_ready(machines: Machines) -> None:
    for name, role in (("gw1", "gateway"), ("gw2", "gateway"), ("client", "client")):
        print(machines[name].run("ike-sa-sync", "check", "-c", f"/etc/ike-sa-sync/{role}.yaml"))


def test_provisioning_again_restarts_nothing(machines: Machines) -> None:
    units = ("strongswan", "ike-sa-sync-gateway", "ike-sa-sync-client", "redis-server")
    before = {(name, unit): machine.main_pid(unit) for name, machine in machines.items() for unit in units}
    provision(machines)
    assert {(name, unit): machine.main_pid(unit) for name, machine in machines.items() for unit in units} == before
    assert machines["client"].ping(SITE)


def test_esp_is_the_kernels_and_the_queue_is_nftables(machines: Machines) -> None:
    assert "proto esp" in machines["gw1"].run("ip", "xfrm", "state")
    assert "queue" in machines["gw1"].run("nft", "list", "table", "inet", "ike-sa-sync")


def test_the_demo_shows_the_main_job(machines: Machines) -> None:
    told = machines["client"].run("failover-demo")
    print(told)
    assert "resumed at 192.168.50.2" in told


def test_a_session_survives_the_death_of_its_gateways_machine(machines: Machines) -> None:
    machines["gw1"].power_off()
    outcome = machines["client"].resume()
    assert (outcome["result"], outcome["gateway"]) == ("resumed", machines["gw2"].address)
    assert machines["client"].ping(SITE)


def test_a_gateway_restarted_in_the_midst_of_stub_changes_loses_none(machines: Machines) -> None:
    gw1, client = machines["gw1"], machines["client"]
    for _ in range(4):
        # while systemd has the socket alone, and while the sidecar starts
        gw1.run("systemctl", "stop", "ike-sa-sync-gateway")
        client.run("swanctl", "--rekey", "--ike", "home")
        gw1.run("systemctl", "start", "--no-block", "ike-sa-sync-gateway")
        client.run("swanctl", "--rekey", "--child", "net")
        client.run("swanctl", "--rekey", "--ike", "home")
        # and in the midst of its work
        gw1.run("systemctl", "restart", "--no-block", "ike-sa-sync-gateway")
        client.run("swanctl", "--rekey", "--ike", "home")
        wait_until(lambda: gw1.main_pid("ike-sa-sync-gateway") != "0", "the sidecar", PATIENCE)
    wait_until(lambda: stubs(machines) == expected(gw1) != [], "the stub of the last SA alone", PATIENCE)
    wait_until(lambda: [len(sa["children"]) for sa in gw1.status("gateway")["sas"]] == [1], "its CHILD_SA", PATIENCE)
    gw1.run("systemctl", "stop", "ike-sa-sync-gateway")
    client.run("swanctl", "--terminate", "--ike", "home")
    gw1.run("systemctl", "start", "ike-sa-sync-gateway")
    wait_until(lambda: stubs(machines) == [], "the end of the stub", PATIENCE)


def test_strongswan_is_restarted_alone_and_its_sessions_move_first(machines: Machines) -> None:
    gw1, gw2, client = machines["gw1"], machines["gw2"], machines["client"]
    before = gw1.main_pid("ike-sa-sync-gateway")
    gw1.run("systemctl", "restart", "strongswan")
    assert gw1.main_pid("ike-sa-sync-gateway") == before
    wait_until(lambda: reachable(gw1, "gateway"), "charon, reached again", PATIENCE)
    wait_until(lambda: stubs(machines) == expected(gw2) != [], "the stub of the session at the other gateway", PATIENCE)
    assert [sa["remote-host"].decode() for sa in client.sas()] == [gw2.address]
    assert client.ping(SITE)


def test_strongswan_is_restarted_alone_where_no_session_can_move(machines: Machines) -> None:
    gw1, gw2, client = machines["gw1"], machines["gw2"], machines["client"]
    gw2.run("systemctl", "stop", "ike-sa-sync-gateway")
    # where charon goes on, it stays for as long as a restart of the sidecar takes
    bank_cli(machines, "DEL", f"ike:gateway:{gw2.address}")
    before = gw1.main_pid("ike-sa-sync-gateway")
    gw1.run("systemctl", "restart", "strongswan")
    assert gw1.main_pid("ike-sa-sync-gateway") == before
    wait_until(lambda: reachable(gw1, "gateway"), "charon, reached again", PATIENCE)
    wait_until(lambda: not client.sas(), "the end of the old session", PATIENCE)
    client.run("swanctl", "--initiate", "--child", "net", "--ike", "home")
    wait_until(lambda: stubs(machines) == expected(gw1) != [], "the stub of the new session", PATIENCE)


def test_strongswan_is_stopped_before_the_daemon_that_announces_its_clients(machines: Machines) -> None:
    after = machines["gw1"].run("systemctl", "show", "--property=After", "--value", "strongswan").split()
    assert {"bird.service", "frr.service"} <= set(after)


def test_the_address_is_held_while_the_sidecar_is_stopped_and_charons_words_do_not_start_it(
    machines: Machines,
) -> None:
    gw1, client = machines["gw1"], machines["client"]
    gw1.run("systemctl", "stop", "ike-sa-sync-gateway")
    client.run("swanctl", "--rekey", "--ike", "home")
    wait_until(lambda: active(gw1, "ike-sa-sync-ha.service"), "charon's words, noticed", PATIENCE)
    assert "127.0.0.2:4510" in gw1.run("ss", "-Hunap", "state", "all")
    assert gw1.main_pid("ike-sa-sync-gateway") == "0"
    assert client.ping(SITE)


def test_a_sidecar_that_hangs_is_restarted_by_the_watchdog(machines: Machines) -> None:
    gw1 = machines["gw1"]
    before = gw1.main_pid("ike-sa-sync-gateway")
    gw1.run("kill", "-STOP", before)
    wait_until(lambda: gw1.main_pid("ike-sa-sync-gateway") not in ("0", before), "another sidecar", PATIENCE)
    wait_until(lambda: active(gw1, "ike-sa-sync-gateway"), "ready", PATIENCE)
    wait_until(lambda: stubs(machines) == expected(gw1) != [], "the stub, still", PATIENCE)


@pytest.mark.parametrize("role", ["gateway", "client"])
def test_the_units_are_sandboxed(machines: Machines, role: str) -> None:
    machine = machines[{"gateway": "gw1", "client": "client"}[role]]
    told = machine.run("systemd-analyze", "security", "--no-pager", f"ike-sa-sync-{role}.service")
    exposure = re.search(r"Overall exposure level .*: ([\d.]+)", told)
    assert exposure is not None
    print(exposure[0])
    assert float(exposure[1]) <= 2.5
    status = Path(f"/proc/{machine.leader()}/root/proc/{machine.main_pid(f'ike-sa-sync-{role}')}/status").read_text()
    assert "NoNewPrivs:\t1" in status
    assert "Seccomp:\t2" in status
    # CAP_NET_ADMIN and CAP_NET_RAW
    assert "CapBnd:\t0000000000003000" in status


@pytest.fixture
def four(machines: Machines) -> Iterator[list[Machine]]:
    """Four clients with sessions at gw1."""
    more = [Machine(f"client{number}", f"192.168.50.{10 + number}") for number in (1, 2, 3)]
    for machine in more:
        machine.boot()
    for number, machine in enumerate(more, 1):
        machine.wait_up()
        machine.provision("install", PACKAGE)
        machine.provision("client", machines["gw1"].address, machines["gw2"].address, SITE, "/secrets")
        identity = f"local {{ id = client{number}@example.org }}"
        text = f"connections {{\n home {{ {identity} }}\n home-gw2 {{ {identity} }}\n}}\n"
        Path(machine.path("/etc/swanctl/conf.d/identity.conf")).write_text(text)
        machine.run("swanctl", "--load-all")
        machine.run("swanctl", "--initiate", "--child", "net", "--ike", "home")
    wait_until(lambda: len(stubs(machines)) == 4, "the stubs", PATIENCE)
    yield [machines["client"], *more]
    for machine in more:
        machine.power_off()


def answers(client: Machine) -> int:
    """To the ping that runs on a client."""
    return Path(client.path("/run/ping.log")).read_text().count(" bytes from ")


def answered_on(clients: list[Machine], count: int) -> None:
    """Wait until each client's ping has got so many more answers."""
    before = [answers(client) for client in clients]
    for client, had in zip(clients, before, strict=True):
        wait_until(lambda c=client, h=had: answers(c) >= h + count, "traffic", PATIENCE)  # type: ignore[misc]


def test_four_clients_do_not_notice_that_their_gateway_is_rebooted(machines: Machines, four: list[Machine]) -> None:
    gw1, gw2 = machines["gw1"], machines["gw2"]
    for client in four:
        client.run("sh", "-c", f"ping -n -i 0.05 {SITE} >/run/ping.log 2>&1 & echo $! >/run/ping.pid")
    answered_on(four, 20)
    gw1.run("systemctl", "reboot")
    for client in four:
        wait_until(
            lambda c=client: [sa["remote-host"].decode() for sa in c.sas()] == [gw2.address],  # type: ignore[misc]
            f"the session of {client.name} at the other gateway",
            PATIENCE,
        )
    answered_on(four, 20)
    wait_until(lambda: not gw1.leader(), "the end of gw1", PATIENCE)
    gw1.power_on()
    answered_on(four, 20)
    told = []
    for client in four:
        client.run("sh", "-c", "kill -INT $(cat /run/ping.pid)")
        log = Path(client.path("/run/ping.log"))
        wait_until(lambda file=log: "packets transmitted" in file.read_text(), "the end of ping", PATIENCE)  # type: ignore[misc]
        found = re.search(r"(\d+) packets transmitted, (\d+) received", log.read_text())
        assert found is not None
        told.append((client.name, int(found[1]), int(found[1]) - int(found[2])))
    print("packets lost of those sent:", told)
    assert all(lost <= 5 for _, _, lost in told), told


def test_the_package_goes_without_a_trace(machines: Machines) -> None:
    gw2 = machines["gw2"]
    gw2.run("systemctl", "stop", "ike-sa-sync-gateway")
    said = gw2.run("dpkg", "--purge", "ike-sa-sync")
    # charon still sends its keys: the address is held until it does not
    [command] = [line for line in said.splitlines() if line.startswith("    systemctl ")]
    try:
        gw2.run("sh", "-euc", command)
        assert_no_trace(gw2)
    finally:
        gw2.provision("install", PACKAGE)
        gw2.provision("gateway", gw2.address, machines["bank"].address, "10.20.2.0/24", "/secrets")
