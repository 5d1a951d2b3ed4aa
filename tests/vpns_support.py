"""Two clusters of two gateways each, and a client of both."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bridge.lab import Lab
from bridge.lab.bank import Bank
from bridge.lab.daemon import wait_until
from bridge.lab.host import Host
from bridge.lab.sidecar import Sidecar
from bridge.lab.topology import BANK_KEY, SITE, bank_key, client_host, gateway_config, swanctl
from failover_support import Outcome, established, stub_key

SITES = {"x": SITE, "y": "10.30.0.1"}
IDENTITIES = {"x": "vpn.example.org", "y": "vpn.example.net"}
CONNECTIONS = {"x1": "home", "x2": "home-gw2", "y1": "work", "y2": "work-gw2"}
ADDRESSES = {"x1": "192.168.50.1", "x2": "192.168.50.2", "y1": "192.168.50.3", "y2": "192.168.50.4"}

WORK = """\
connections {
    work : connections.home {
        remote_addrs = 192.168.50.3
        remote { id = vpn.example.net }
        children { net { remote_ts = 10.30.0.0/16 } }
    }
    work-gw2 : connections.work {
        remote_addrs = 192.168.50.4
    }
}
"""

VPNS = {
    name: {"gateways": [{"address": ADDRESSES[f"{name}{n}"], "connection": CONNECTIONS[f"{name}{n}"]} for n in (1, 2)]}
    for name in SITES
}


@dataclass
class Clusters:
    """`gateways` by name: x1, x2, y1, y2."""

    lab: Lab
    bank: Bank
    gateways: dict[str, Host]
    client: Host
    agent: Sidecar
    secret: str

    def start(self) -> None:
        """Everything, the client's sidecar too."""
        self.bank.start()
        hosts = [*self.gateways.values(), self.client]
        for host in hosts:
            for sidecar in host.sidecars:
                sidecar.start(wait=False)
            host.charon.start()
        for host in hosts:
            for sidecar in host.sidecars:
                sidecar.wait_ready()

    def fresh(self) -> None:
        """All up, no SA anywhere, an empty bank."""
        for host in (*self.gateways.values(), self.client):
            for sidecar in host.sidecars:
                if not sidecar.running:
                    sidecar.start(wait=False)
            if not host.charon.running:
                host.charon.start()
            for sidecar in host.sidecars:
                sidecar.wait_ready()
        for host in (self.client, *self.gateways.values()):
            for sa in host.charon.sas():
                host.swanctl("--terminate", "--ike-id", sa["uniqueid"], "--force", "--timeout", "1", check=False)
            wait_until(lambda host=host: not host.charon.sas(), "the end of all SAs")  # type: ignore[misc]
        self.bank.cli("FLUSHALL")
        # emptied with the bank
        for name, address in ADDRESSES.items():
            beat = ("-n", str("xy".index(name[0])), "EXISTS", f"ike:gateway:{address}")
            wait_until(lambda beat=beat: self.bank.cli(*beat) == "1", "a sign of life")  # type: ignore[misc]

    def kill(self, *names: str) -> None:
        """SIGKILL to charon and sidecar of gateways."""
        for name in names:
            self.gateways[name].sidecars[0].kill()
            self.gateways[name].charon.kill()

    def connect(self, name: str, connection: str | None = None) -> None:
        """A session of the client at a gateway, its stub in the bank, with traffic."""
        self.client.charon.initiate("net", connection or CONNECTIONS[name])
        [sa] = [sa for sa in self.sas() if sa["name"] == (connection or CONNECTIONS[name])]
        key, database = stub_key(ADDRESSES[name], sa["responder-spi"]), "xy".index(name[0])
        wait_until(lambda: bool(self.bank.cli("-n", str(database), "HGET", key, "vips")), "the stub of the session")
        assert self.works(name[0])

    def sas(self) -> list[dict[str, Any]]:
        """The client's established IKE_SAs."""
        return established(self.client)

    def at(self) -> dict[str, str]:
        """The client's sessions: connection to gateway. One that is being activated has another address."""
        names = {address: name for name, address in ADDRESSES.items()}
        return {sa["name"]: names[sa["remote-host"]] for sa in self.sas() if sa["remote-host"] in names}

    def works(self, cluster: str) -> bool:
        """Whether traffic of a cluster flows."""
        return self.client.ping(SITES[cluster], count=1) == 1

    def resume(self, *arguments: str) -> Outcome:
        """`ike-sa-sync resume --json` on the client."""
        return dict(json.loads(self.agent.command("resume", "--json", *arguments, check=False).stdout))

    @contextmanager
    def agent_with(self, **options: Any) -> Iterator[None]:
        """The client's sidecar with other options, and as it was afterwards."""
        before = dict(self.agent.config)
        self.agent.stop()
        self.agent.config.update(options)
        self.agent.start()
        try:
            yield
        finally:
            self.agent.stop()
            self.agent.config = before
            self.agent.start()


def clusters(lab: Lab) -> Clusters:
    """The two clusters, each with a bank database and a secret of its own, and the client; nothing is started."""
    bank = Bank(lab.add_host("bank", "192.168.50.20/24"))
    secret = base64.b64encode(os.urandom(32)).decode()
    gateways = {}
    for number, cluster in enumerate(SITES):
        key = bank_key()
        for one in (1, 2):
            name = f"{cluster}{one}"
            host = lab.add_host(name, f"{ADDRESSES[name]}/24", local=(f"{SITES[cluster]}/32",), forward=True)
            swanctl(host, "gateway", f'ike-clients {{ secret = "{secret}" }}')
            site = SITES[cluster].rsplit(".", 2)[0] + ".0.0/16"
            own = f"local {{ id = {IDENTITIES[cluster]} }} children {{ net {{ local_ts = {site} }} }}"
            host.configure(f"connections {{ gw {{ {own} }} }}\n")
            host.configure(f"pools {{ clients {{ addrs = 10.2{number}.{one}.0/24 }} }}\n", "pool.conf")
            host.write(BANK_KEY, key, mode=0o600)
            host.sidecar("gateway", gateway_config(host.address, bank.url[:-1] + str(number)))
            gateways[name] = host
    client = client_host(lab, "client", "192.168.50.10", secret)
    client.configure(WORK, "work.conf")
    client.configure(
        f'secrets {{ ike-work {{ id = {IDENTITIES["y"]}\n secret = "{secret}" }} }}\n', "work-secrets.conf"
    )
    agent = client.sidecar("client", {"vpns": VPNS, "resume": {"answer_timeout": 1.5, "initiate_timeout": 5.0}})
    return Clusters(lab, bank, gateways, client, agent, secret)
