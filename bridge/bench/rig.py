"""What every benchmark stands on: the standard lab, a host full of simulated clients, and a model session."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

from bridge.bench.clients import Clients
from bridge.bench.generator import CLIENTS
from bridge.bench.usage import Meter
from bridge.lab.daemon import wait_until
from bridge.lab.host import Host
from bridge.lab.lab import Lab
from bridge.lab.space import LabError
from bridge.lab.topology import BANK_KEY, Topology, client_host, standard
from bridge.net.packet import PORT_NAT_T
from bridge.stub.stub import Index

ADDRESS = "192.168.50.30"
VISITOR = "192.168.50.40"
MARK = "0x220"
BUSY = {
    "charon.filelog.lab.default": 0,
    "charon.plugins.kernel-netlink.fwmark": f"!{MARK}",
    "charon.plugins.socket-default.fwmark": MARK,
}
"""strongswan.conf of a busy gateway (strongswan-conf/ike-sa-sync.conf)"""
QUIET = "connections { gw { dpd_delay = 0s } }\n"
"""liveness checks of tens of thousands of clients would be part of every figure"""


class Rig:
    """A lab with a load generator."""

    def __init__(self, topology: Topology, load: Host, clients: Clients, visitor: Host) -> None:
        self.topology = topology
        self.load = load
        self.clients = clients
        self.visitor = visitor
        """a client without a sidecar, for full handshakes"""
        self._process: subprocess.Popen[str] | None = None

    @property
    def target(self) -> Host:
        """The gateway that all clients resume at."""
        return self.topology.gw2

    def meter(self) -> Meter:
        """Of the gateway's processes and of the bank's."""
        return Meter(
            {
                "charon": self.target.charon.pid,
                "sidecar": self.topology.gateways["gw2"].pid,
                "bank": self.topology.bank.pid,
            }
        )

    def counters(self) -> dict[str, float]:
        """What the gateway's sidecar counts."""
        answer = self.topology.gateways["gw2"].command("status", "--json", timeout=120).stdout
        return dict(json.loads(answer)["counters"])

    def take_model(self) -> None:
        """Leave the generator the stub of a real session as its model. The session itself does not move from now on."""
        topology = self.topology
        topology.connect()
        [session] = topology.client.charon.sas()
        index = Index(session["remote-host"], bytes.fromhex(session["responder-spi"]))
        wait_until(lambda: bool(topology.bank.cli("HGET", index.key, "vips")), "the model's stub")
        topology.agent.stop()
        self.start_generator()
        self.order("template", [index.gateway, index.spi.hex()])

    def kill_first_gateway(self) -> None:
        """Have the gateway of all simulated clients die."""
        self.topology.kill_gateway(self.topology.gw1)

    def start_generator(self) -> None:
        """Start it on its host."""
        log = (self.load.directory / "generator.log").open("w")
        self._process = subprocess.Popen(
            self.load.enter(
                sys.executable,
                "-m",
                "bridge.bench.generator",
                self.target.address,
                str(PORT_NAT_T),
                self.topology.bank.url,
                BANK_KEY,
            ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=self.load.environment(),
            start_new_session=True,
        )
        self._answer()

    def order(self, name: str, given: Any, progress: Callable[[float], None] = lambda _: None) -> dict[str, Any]:
        """Have the generator do something, and wait for what it says; `progress` is called with the share done."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({name: given}) + "\n")
        self._process.stdin.flush()
        while "progress" in (answer := self._answer()):
            progress(answer["progress"])
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            said = (self.load.directory / "generator.log").read_text().strip()
            raise LabError(f"the load generator ended: {said}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stop(self) -> None:
        """End the generator."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()


def share(topology: Topology, address: str, trigger: str) -> None:
    """Have the gateways share an address, before they start; `trigger`: what has them take over the sessions at it."""
    for gateway in (topology.gw1, topology.gw2):
        gateway.configure("connections { gw { mobike = no } }\n", "shared.conf")
        topology.gateways[gateway.name].config["takeover"] = {"addresses": [address], "trigger": trigger}


def connect_to(client: Host, address: str) -> None:
    """Have a client's gateway be at an address that gateways share."""
    client.configure(f"connections {{ home {{ remote_addrs = {address}\n mobike = no }} }}\n", "shared.conf")


def wait_stored(topology: Topology, sessions: int, patience: float) -> None:
    """Until the stubs of so many sessions at gw1 are in the bank."""

    def stored() -> bool:
        counters = topology.gateways["gw1"].ask("counters")["counters"]
        return bool(counters["stubs"] >= sessions and not counters["bank_pending"])

    wait_until(stored, "the stubs of the sessions", patience)


@contextlib.contextmanager
def rig(clients: int = 0, detect: float | None = None, shared: str | None = None) -> Iterator[Rig]:
    """The standard lab with a host of simulated clients and so many real ones more, all of it up. With `detect` the
    gateways announce failures, and the real clients have charon's own timers. With `shared` the gateways share that
    address, gw1 has it, and the model's session is there."""
    with Lab() as lab:
        topology = standard(lab, start=False)
        load = lab.add_host("load", f"{ADDRESS}/24")
        load.run("ip", "route", "add", "local", CLIENTS, "dev", "lo")
        load.write(BANK_KEY, topology.gw1.etc.joinpath("ike-sa-sync/bank.key").read_text(), mode=0o600)
        for gateway in (topology.gw1, topology.gw2):
            gateway.run("ip", "route", "add", CLIENTS, "via", ADDRESS)
            gateway.configure(QUIET, "quiet.conf")
            gateway.charon.settings |= BUSY
        for sidecar in topology.gateways.values():
            sidecar.config["sync"]["max_unconfirmed"] = 100_000
            if detect is not None:
                sidecar.config["failover"] = {"announce": True, "detect": detect}
        if shared is not None:
            share(topology, shared, "command")
            connect_to(topology.client, shared)
            # simulated clients are behind a NAT: their IKE is on port 4500, their ESP in UDP
            topology.client.configure("connections { home { encap = yes } }\n", "encap.conf")
            topology.gw1.run("ip", "address", "add", f"{shared}/24", "dev", "eth0")
        more = Clients(topology, clients, unprepared=detect is not None)
        visitor = client_host(lab, "visitor", VISITOR, topology.secret)
        topology.start()
        visitor.charon.start()
        more.start()
        built = Rig(topology, load, more, visitor)
        try:
            yield built
        finally:
            built.stop()
