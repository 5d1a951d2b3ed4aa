"""docs/deployment.md, command by command, on the machines of `make test-vm`: roll-out, drain, key, update, roll-back.

The tests are one story, from hosts that have strongSwan only to hosts that have strongSwan only."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import deployment_page
from bridge.lab.daemon import wait_until
from vm_support import (
    PACKAGE,
    PATIENCE,
    PROJECT,
    SECRETS,
    SITE,
    Machine,
    Machines,
    assert_no_trace,
    bank_cli,
    expected,
    reachable,
    stubs,
)

pytestmark = pytest.mark.vm

GUIDE = (
    (Path(__file__).parents[1] / deployment_page.PAGE)
    if not PROJECT.exists()
    else PROJECT / "source/docs/deployment.md"
)
TEXT = GUIDE.read_text()
BLOCKS = deployment_page.blocks(TEXT)
ANSWERS = "/etc/apt/apt.conf.d/90yes"
IN_MEMORY = "/etc/swanctl/conf.d/pool.conf"
SERVICE = "ike-sa-sync"


def follow(machine: Machine, block: str) -> str:
    """Run a block of the page on a machine, as root in /root; its output."""
    said = machine.run("sh", "-euc", f"cd /root\n{BLOCKS[block]}")
    print(f"{machine.name}:\n{BLOCKS[block]}{said}")
    return said


def write(machine: Machine, file: str, text: str) -> None:
    """A file that only root reads."""
    path = Path(machine.path(file))
    path.parent.mkdir(exist_ok=True)
    path.touch(0o600)
    path.write_text(text)


def password() -> str:
    return (SECRETS / "bank-password").read_text().strip()


def place_package(machine: Machine, package: str) -> None:
    """Have a package in dist/, as after `make deb`."""
    machine.run(
        "sh", "-euc", f"rm -rf /root/dist; mkdir -p /root/dist; cp {package} /root/dist/ike-sa-sync_0_amd64.deb"
    )


def connect(client: Machine, connection: str = "home") -> None:
    client.run("swanctl", "--initiate", "--child", "net", "--ike", connection)


def session(client: Machine) -> dict[str, object]:
    """Gateway and SPIs of its one session."""
    [sa] = client.sas()
    return {key: sa[key] for key in ("remote-host", "initiator-spi", "responder-spi")}


def at(client: Machine, gateway: Machine) -> bool:
    return [sa["remote-host"].decode() for sa in client.sas()] == [gateway.address]


def remove(machines: Machines) -> None:
    """The page's way to remove everything, with the pool that a gateway without HA pools needs."""
    bank, gw1, gw2, client = machines.values()
    for number, gateway in enumerate((gw1, gw2), 1):
        # addresses that no session has
        write(gateway, IN_MEMORY, f"pools {{ clients {{ addrs = 10.20.{number}.128/25 }} }}\n")
    for machine in (client, gw1, gw2):
        follow(machine, "Rolling back 2")
        assert_no_trace(machine)
    bank.run("env", f"REDISCLI_AUTH={password()}", "sh", "-euc", BLOCKS["Rolling back 3"])
    assert bank_cli(machines, "--scan", "--pattern", "ike:*").strip() == ""


@pytest.fixture(scope="module")
def hosts(provisioned: Machines) -> Iterator[Machines]:
    """Gateways and a client that run strongSwan, and a Redis."""
    for machine in provisioned.values():
        # an operator answers apt's question
        write(machine, ANSWERS, "APT::Get::Assume-Yes yes;\n")
    remove(provisioned)
    yield provisioned
    for machine in provisioned.values():
        machine.run("rm", ANSWERS)


def test_hosts_without_sidecars_connect(hosts: Machines) -> None:
    client = hosts["client"]
    connect(client)
    assert client.ping(SITE)


def test_the_package_touches_nothing_that_runs(hosts: Machines) -> None:
    for machine in (hosts["gw1"], hosts["gw2"], hosts["client"]):
        before = machine.main_pid("strongswan")
        place_package(machine, PACKAGE)
        commands = BLOCKS["Install 1"].splitlines()
        # make test-vm has done that
        assert commands.pop(0) == "make deb"
        machine.run("sh", "-euc", "\n".join(["cd /root", *commands]))
        assert machine.main_pid("strongswan") == before
        assert not machine.is_enabled(SERVICE)
        assert machine.main_pid(SERVICE) == "0"
    assert hosts["client"].ping(SITE)


def test_gateways_and_then_a_client_are_rolled_out(hosts: Machines) -> None:
    _, gw1, gw2, client = hosts.values()
    follow(gw1, "Order of the roll-out 1")
    key = Path(gw1.path("/etc/ike-sa-sync/bank.key"))
    assert key.stat().st_mode & 0o777 == 0o600
    write(gw2, "/etc/ike-sa-sync/bank.key", key.read_text())
    for gateway in (gw1, gw2):
        config = deployment_page.config(TEXT, "gateway").replace("PASSWORD", password())
        write(gateway, "/etc/ike-sa-sync/gateway.yaml", config.replace(f"{gw1.address} ", f"{gateway.address} "))
        # "an HA pool": it is still configured, and charon would ask the other one first
        gateway.run("rm", IN_MEMORY)
        assert " 0 fail" in follow(gateway, "Order of the roll-out 2")
    # a gateway with sidecar, and a client without
    connect(client)
    wait_until(lambda: stubs(hosts) == expected(gw1) != [], "the stub", PATIENCE)
    write(client, "/etc/ike-sa-sync/client.yaml", deployment_page.config(TEXT, "client"))
    assert " 0 fail" in follow(client, "Order of the roll-out 3")


def test_its_session_moves_and_comes_back(hosts: Machines) -> None:
    client = hosts["client"]
    connect(client)
    wait_until(lambda: len(stubs(hosts)) == 1, "the stub", PATIENCE)
    said = follow(client, "Order of the roll-out 4")
    assert [line.split(":")[0] for line in said.splitlines() if line.startswith(("resumed", "fallback"))] == [
        "resumed"
    ] * 2
    assert at(client, hosts["gw1"])
    assert client.ping(SITE)


def test_a_gateway_is_drained_and_gets_its_part_back(hosts: Machines) -> None:
    _, gw1, gw2, client = hosts.values()
    wait_until(lambda: stubs(hosts) == expected(gw1) != [], "the stub", PATIENCE)
    assert "done: 1 of 1 session " in follow(gw1, "Draining a gateway 1")
    wait_until(lambda: at(client, gw2) and client.ping(SITE), "the session, at gw2", PATIENCE)
    # one session cannot be halved
    follow(gw2, "Draining a gateway 4")
    assert client.ping(SITE)


def test_the_banks_key_is_changed(hosts: Machines) -> None:
    _, gw1, gw2, client = hosts.values()
    file = "/etc/ike-sa-sync/bank.key"
    old = Path(gw1.path(file)).read_text()
    follow(gw1, "Changing the bank's key 1")
    both = Path(gw1.path(file)).read_text()
    added = set(keys_of(both)) - set(keys_of(old))
    assert len(added) == 1
    new = "".join(f"{line}\n" for line in added)
    write(gw2, file, both)
    for gateway in (gw1, gw2):
        wait_until(lambda gateway=gateway: sealing(gateway) == (new.split()[0], True), "the new key, in use", PATIENCE)  # type: ignore[misc]
    for gateway in (gw1, gw2):
        write(gateway, file, new)
    for gateway in (gw1, gw2):
        if not at(client, gateway):
            assert client.resume("--to", gateway.address)["result"] == "resumed"


def keys_of(text: str) -> list[str]:
    """The lines of a key file that are no comments."""
    return [line for line in text.splitlines() if line[:1] not in ("", "#")]


def sealing(gateway: Machine) -> tuple[str, bool]:
    """The id of the key that it seals with, and whether all stubs are sealed with it."""
    bank = gateway.status("gateway")["bank"]
    return bank["sealing"], bank["resealed"]


def test_an_update_restarts_the_sidecar_only(hosts: Machines) -> None:
    newer = "/root/newer.deb"
    for machine in (hosts["gw1"], hosts["gw2"], hosts["client"]):
        machine.run(
            *("sh", "-euc"),
            f"dpkg-deb -R {PACKAGE} /root/newer && sed -i 's/^Version: .*/&.1/' /root/newer/DEBIAN/control && "
            f"dpkg-deb -Znone -b /root/newer {newer} && rm -r /root/newer",
        )
        place_package(machine, newer)
        before = machine.main_pid("strongswan"), machine.main_pid(SERVICE), session(hosts["client"])
        follow(machine, "Updating 1")
        assert machine.run("dpkg-query", "-W", "-f", "${Version}", SERVICE).endswith(".1")
        assert machine.main_pid("strongswan") == before[0]
        assert machine.main_pid(SERVICE) not in ("0", before[1])
        wait_until(lambda machine=machine: reachable(machine, role(machine)), "charon, reached", PATIENCE)  # type: ignore[misc]
        assert session(hosts["client"]) == before[2]
        assert hosts["client"].ping(SITE)
    wait_until(lambda: len(hosts["client"].status("client")["sas"]) == 1, "its IKE_SA, known again", PATIENCE)
    other = hosts["gw1"] if at(hosts["client"], hosts["gw2"]) else hosts["gw2"]
    assert hosts["client"].resume("--to", other.address)["result"] == "resumed"


def role(machine: Machine) -> str:
    return "client" if machine.name == "client" else "gateway"


def test_rules_of_an_operator_serve_as_well(hosts: Machines) -> None:
    _, gw1, gw2, client = hosts.values()
    if not at(client, gw2):
        assert client.resume("--to", gw2.address)["result"] == "resumed"
    own = deployment_page.config(TEXT, "gateway").replace("PASSWORD", password())
    write(gw1, "/etc/ike-sa-sync/gateway.yaml", own + "intercept: {rules: external}\nha: {rules: external}\n")
    gw1.run("systemctl", "restart", SERVICE)
    assert "ike-sa-sync" not in re.sub("ike-sa-sync-ha", "", gw1.run("nft", "list", "tables"))
    follow(gw1, "Rules of your own 1")
    wait_until(lambda: reachable(gw1, "gateway"), "charon, reached", PATIENCE)
    assert client.resume("--to", gw1.address)["result"] == "resumed"
    gw1.run("iptables", "-t", "security", "-F")
    write(gw1, "/etc/ike-sa-sync/gateway.yaml", own)
    gw1.run("systemctl", "restart", SERVICE)
    wait_until(lambda: reachable(gw1, "gateway"), "charon, reached", PATIENCE)


def test_a_roll_back_keeps_sessions(hosts: Machines) -> None:
    _, gw1, _, client = hosts.values()
    if not at(client, gw1):
        assert client.resume("--to", gw1.address)["result"] == "resumed"
    before = session(client)
    for machine in (client, gw1):
        follow(machine, "Rolling back 1")
        assert "ike-sa-sync" not in re.sub("ike-sa-sync-ha", "", machine.run("nft", "list", "tables"))
        assert session(client) == before
        assert client.ping(SITE)


def test_the_rules_of_a_killed_sidecar_are_removed(hosts: Machines) -> None:
    gw2 = hosts["gw2"]
    gw2.run("sh", "-euc", f"systemctl kill --signal=KILL {SERVICE}; systemctl stop {SERVICE}")
    follow(gw2, "Rolling back 4")
    assert "ike-sa-sync" not in re.sub("ike-sa-sync-ha", "", gw2.run("nft", "list", "tables"))


def test_everything_is_removed(hosts: Machines) -> None:
    remove(hosts)
    connect(hosts["client"])
    assert hosts["client"].ping(SITE)
