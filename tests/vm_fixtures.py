"""The provisioned machines of the test machine, for all files of one run: a plugin of pytest (vagrant/vm/inside)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vm_support import BRIDGE, PACKAGE, PROVISION, SECRETS, SITE, STATE, Machine, Machines, run


def provision(machines: Machines) -> None:
    """What vagrant/Vagrantfile does."""
    bank, gw1, gw2, client = machines.values()
    bank.provision("bank", bank.address, "/secrets")
    for number, gateway in enumerate((gw1, gw2), 1):
        gateway.provision("install", PACKAGE)
        gateway.provision("gateway", gateway.address, bank.address, f"10.20.{number}.0/24", "/secrets")
    client.provision("install", PACKAGE)
    client.provision("client", gw1.address, gw2.address, SITE, "/secrets")


@pytest.fixture(scope="session")
def machines() -> Iterator[Machines]:
    STATE.mkdir(exist_ok=True)
    run("mount", "-t", "tmpfs", "tmpfs", str(STATE))
    run(str(PROVISION / "secrets"), str(SECRETS))
    run("ip", "link", "add", BRIDGE, "type", "bridge")
    run("ip", "link", "set", BRIDGE, "up")
    found = {
        # a Redis that apt has started, with Debian's configuration
        name: Machine(name, address, name in ("gw1", "gw2"), ("redis-server.service",) if name == "bank" else ())
        for name, address in {
            "bank": "192.168.50.20",
            "gw1": "192.168.50.1",
            "gw2": "192.168.50.2",
            "client": "192.168.50.10",
        }.items()
    }
    for machine in found.values():
        machine.boot()
    for machine in found.values():
        machine.wait_up()
    yield found
    for machine in found.values():
        machine.power_off()


@pytest.fixture(scope="module")
def provisioned(machines: Machines) -> Machines:
    """All of them on and provisioned, whatever an earlier file has left."""
    for machine in machines.values():
        if not machine.leader():
            machine.power_on()
    _, *others = machines.values()
    if not all(machine.is_enabled("ike-sa-sync") for machine in others):
        provision(machines)
    return machines
