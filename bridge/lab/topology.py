"""The standard lab: a bank, two gateways in front of one inner network with a server, and a client.

    client 192.168.50.10 ---+--- gw1 192.168.50.1, 10.10.1.1 ---+--- server 10.10.1.10   clients 10.20.1.0/24
                            +--- gw2 192.168.50.2, 10.10.1.2 ---'                        clients 10.20.2.0/24
                            +--- bank 192.168.50.20 (Redis)

The server learns from the gateways, by BIRD, which of them has the session of a client. Beside it both gateways have
the address 10.10.0.1, SITE, on which the one answers that the client is at.
"""

import base64
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bridge.lab.bank import Bank
from bridge.lab.charon import render
from bridge.lab.daemon import SLOWNESS
from bridge.lab.host import Host
from bridge.lab.lab import Lab
from bridge.lab.router import Bird, Frr, gateway_bird, router_bird
from bridge.lab.sidecar import Sidecar
from bridge.service import shipped_files

SITE = "10.10.0.1"
SERVER = "10.10.1.10"
SERVER6 = "fd10:10:1::10"
INSIDE = "inside"  # the network behind the gateways
BANK_KEY = "/etc/ike-sa-sync/bank.key"

# A dead gateway is given up after 2 s without an answer to the probe that follows 2 s without a message; later on a
# slow machine, where one that lives may take as long to answer.
PATIENCE = {"charon.retransmit_timeout": 0.5 * SLOWNESS, "charon.retransmit_base": 1.0, "charon.retransmit_tries": 3}
DPD_DELAY = f"{2 * SLOWNESS:.0f}s"

# The clients' gateways and the connections to them, best first.
CHOICES = {"192.168.50.1": "home", "192.168.50.2": "home-gw2"}


@dataclass
class Topology:
    """The hosts of the standard lab, and the sidecars on them."""

    lab: Lab
    bank: Bank
    gw1: Host
    gw2: Host
    client: Host
    gateways: dict[str, Sidecar]  # by the host's name
    agent: Sidecar  # the client's
    secret: str  # the preshared key of all clients
    server: Host  # behind the gateways
    routers: list[Bird | Frr]  # of the gateways and the server

    def start(self, sidecars: bool = True) -> None:
        """Start every host: its sidecar first, for the keys of charon's first SA, then charon."""
        self.bank.start()
        for router in self.routers:
            router.start()
        running = [*self.gateways.values(), self.agent] if sidecars else []
        for sidecar in running:
            sidecar.launch()
        for sidecar in running:
            sidecar.wait_held()
        for host in (self.gw1, self.gw2, self.client):
            host.charon.start()
        for sidecar in running:
            sidecar.wait_ready()

    def connect(self, connection: str = "home") -> None:
        """Bring the client's session up, by a full handshake."""
        self.client.charon.initiate("net", connection)

    def kill_gateway(self, host: Host) -> None:
        """SIGKILL to charon and sidecar of a gateway."""
        self.gateways[host.name].kill()
        host.charon.kill()


def gateway_config(address: str, bank: str) -> dict[str, Any]:
    """The sidecar's configuration of a gateway at `address`, with its bank's URL."""
    return {
        "address": address,
        "vici": "/run/charon.vici",
        "ha": {"listen": "127.0.0.2", "charon": "127.0.0.1", "segments": 16},
        "bank": {"url": bank, "key_file": BANK_KEY, "get_timeout": 1.0 * SLOWNESS},
        "sync": {"proof": "required", "confirm_timeout": 10, "cookie_threshold": 100},
        # tests decide themselves when a client moves; those of announcements turn it on
        "failover": {"announce": False, "detect": 1.0 * SLOWNESS},
        "state": "/run/ike-sa-sync/state",
        "control": "/run/ike-sa-sync/gateway.sock",
        "metrics": "127.0.0.1:9470",
    }


def client_config(gateways: Mapping[str, str]) -> dict[str, Any]:
    """The sidecar's configuration of a client, with its gateways: address to connection, best first."""
    return {
        "vici": "/run/charon.vici",
        "ha": {"listen": "127.0.0.2", "charon": "127.0.0.1"},
        "control": "/run/ike-sa-sync/client.sock",
        "gateways": [{"address": key, "connection": value} for key, value in gateways.items()],
        "resume_on_down": True,
        "resume": {"answer_timeout": 4.0 * SLOWNESS},
    }


def bank_key() -> str:
    """A new key file for the bank, as `ike-sa-sync keygen` writes it."""
    return f"{os.urandom(4).hex()} {base64.b64encode(os.urandom(32)).decode()}\n"


def standard(
    lab: Lab,
    *,
    start: bool = True,
    sidecars: bool = True,
    ha_pools: bool = False,
    releases: Mapping[str, str] | None = None,
) -> Topology:
    """Build the standard lab, and start it by default. `releases`: hosts that run another Debian release's
    strongSwan, by name. `ha_pools`: the addresses come from pools of charon's ha plugin, which needs the sidecars, and
    not from those in charon's memory.

    The swanctl.conf of every host is the shipped example; addresses of its own, secrets and shorter times are
    in `/etc/swanctl/conf.d`. Tests change settings through `Host.configure` and `Charon.settings`.
    """
    bank = Bank(lab.add_host("bank", "192.168.50.20/24", "fd00:50::20/64"))
    secret = base64.b64encode(os.urandom(32)).decode()
    key = bank_key()
    gateways = {}
    releases = releases or {}
    lab.add_network(INSIDE)
    server = lab.add_host("server", f"{SERVER}/24", f"{SERVER6}/64", network=INSIDE, forward=True)
    routers: list[Bird | Frr] = [router_bird(server)]
    for number in (1, 2):
        host = lab.add_host(
            f"gw{number}",
            f"192.168.50.{number}/24",
            f"fd00:50::{number}/64",
            local=(f"{SITE}/32",),
            forward=True,
            release=releases.get(f"gw{number}"),
        )
        lab.attach(host, f"10.10.1.{number}/24", f"fd10:10:1::{number}/64", network=INSIDE)
        routers.append(gateway_bird(host, f"10.10.1.{number}"))
        swanctl(host, "gateway", f'ike-clients {{ secret = "{secret}" }}')
        if ha_pools:
            host.charon.settings["charon.plugins.ha.pools.clients"] = f"10.20.{number}.0/24"
        else:
            host.configure(f"pools {{ clients {{ addrs = 10.20.{number}.0/24 }} }}\n", "pool.conf")
        host.write(BANK_KEY, key, mode=0o600)
        gateways[host.name] = host.sidecar("gateway", gateway_config(host.address, bank.url))
    client = client_host(lab, "client", "192.168.50.10", secret, "fd00:50::10/64", release=releases.get("client"))
    agent = client.sidecar("client", client_config(CHOICES))
    gw1, gw2 = lab.hosts["gw1"], lab.hosts["gw2"]
    topology = Topology(lab, bank, gw1, gw2, client, gateways, agent, secret, server, routers)
    if start:
        topology.start(sidecars)
    return topology


def client_host(
    lab: Lab, name: str, address: str, secret: str, *more: str, network: str = "lan", release: str | None = None
) -> Host:
    """A client's host; its identity is `<name>@example.org`. Neither charon nor sidecar is started."""
    host = lab.add_host(name, f"{address}/24", *more, network=network, release=release)
    host.charon.settings.update(PATIENCE)
    swanctl(host, "client", f'ike-vpn {{ id = vpn.example.org\n secret = "{secret}" }}')
    # home-gw2 inherits both
    own = {"dpd_delay": DPD_DELAY, "local.id": f"{name}@example.org"}
    host.configure(render({f"connections.home.{key}": value for key, value in own.items()}) + "\n")
    return host


def swanctl(host: Host, role: str, secret: str) -> None:
    """Give a host the shipped example of its role, and a section of its own in `secrets`."""
    shutil.copy(shipped_files.path(f"strongswan-conf/{role}/swanctl.conf"), host.etc / "swanctl/swanctl.conf")
    host.configure(f"secrets {{ {secret} }}\n", "secrets.conf")
