"""Three hosts, each a gateway for its peers and a client of them: one sidecar with both roles beside each charon."""

from __future__ import annotations

import base64
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from bridge.client.session_file import load
from bridge.lab import Lab
from bridge.lab.bank import Bank
from bridge.lab.daemon import wait_until
from bridge.lab.host import Host
from bridge.lab.sidecar import Sidecar, program
from bridge.lab.topology import BANK_KEY, DPD_DELAY, PATIENCE, bank_key, gateway_config
from failover_support import established

pytestmark = pytest.mark.lab

NAMES = ("a", "b", "c")
ADDRESSES = {"a": "192.168.50.1", "b": "192.168.50.2", "c": "192.168.50.3"}
SITES = {"a": "10.10.0.1", "b": "10.30.0.1", "c": "10.40.0.1"}
INITIATES = {("a", "b"), ("b", "c"), ("c", "a")}
"""who brings up the session of each pair"""
LONG = 120

CONNECTION = """\
connections {{
    {name} {{
        local_addrs = {here}
        remote_addrs = {there}
        dpd_delay = {dpd}
        local {{ auth = psk
 id = {host}.example.org }}
        remote {{ auth = psk
 id = {name}.example.org }}
        children {{ net {{ local_ts = {site}/32
 remote_ts = {remote}/32
 esp_proposals = aes128gcm16 }} }}
    }}
}}
"""


class BothRoles(Sidecar):
    """`ike-sa-sync run` with a file for each role."""

    def __init__(self, host: Host, gateway: dict[str, Any], client: dict[str, Any]) -> None:
        super().__init__(host, "gateway", gateway)
        self.client = client
        self.client_file = "/etc/ike-sa-sync/client.yaml"
        host.sidecars.append(self)

    def launch(self) -> None:
        """Write both files and start it, without waiting for anything."""
        self.host.write(self.file, yaml.safe_dump(self.config))
        self.host.write(self.client_file, yaml.safe_dump(self.client))
        self._seen = len(self.text())
        self.spawn(*program(), "run", "-c", self.file, "-c", self.client_file)

    def client_status(self) -> dict[str, Any]:
        """`ike-sa-sync status --json` of its client role."""
        done = self.host.run(*program(), "status", "--json", "-c", self.client_file)
        return dict(json.loads(done.stdout))


@dataclass
class Mesh:
    bank: Bank
    hosts: dict[str, Host]

    def start(self, name: str) -> None:
        host = self.hosts[name]
        host.sidecars[0].start(wait=False)
        host.charon.start()
        host.sidecars[0].wait_ready()

    def sidecar(self, name: str) -> BothRoles:
        [sidecar] = self.hosts[name].sidecars
        assert isinstance(sidecar, BothRoles)
        return sidecar

    def kill(self, name: str) -> None:
        self.hosts[name].sidecars[0].kill()
        self.hosts[name].charon.kill()

    def pairs(self) -> list[tuple[str, str]]:
        """The sessions of all hosts: host and peer, sorted. One that is being activated has another address."""
        names = {address: name for name, address in ADDRESSES.items()}
        return sorted(
            (name, names[sa["remote-host"]])
            for name, host in self.hosts.items()
            if host.charon.running
            for sa in established(host)
            if sa["remote-host"] in names
        )

    def settled(self) -> bool:
        """Whether each pair has one session, the bank its stub, and its client a file in which it is."""
        return (
            self.pairs() == EACH_PAIR
            and len(self.bank.stubs()) == len(INITIATES)
            and all(self._keeps(one, other) for one, other in INITIATES)
        )

    def _keeps(self, client: str, peer: str) -> bool:
        host = self.hosts[client]
        [sa] = [sa for sa in established(host) if sa["remote-host"] == ADDRESSES[peer]]
        spis = bytes.fromhex(sa["initiator-spi"] + sa["responder-spi"])
        sessions = load(host.etc / "ike-sa-sync/sessions")
        return any(session.stub.spi_i + session.stub.spi_r == spis for session in sessions)

    def works(self) -> bool:
        """Whether traffic flows between all sites."""
        return all(
            self.hosts[one].run("ping", "-c1", "-W1", "-I", SITES[one], SITES[other], check=False).returncode == 0
            for one, other in itertools.permutations(NAMES, 2)
        )


EACH_PAIR = sorted(itertools.permutations(NAMES, 2))


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with Lab() as lab:
        bank = Bank(lab.add_host("bank", "192.168.50.20/24"))
        key, secret = bank_key(), base64.b64encode(os.urandom(32)).decode()
        built = Mesh(bank, {})
        for name in NAMES:
            host = lab.add_host(name, f"{ADDRESSES[name]}/24", local=(f"{SITES[name]}/32",), forward=True)
            host.charon.settings.update(PATIENCE)
            host.write(BANK_KEY, key, mode=0o600)
            (host.etc / "swanctl/swanctl.conf").write_text("include conf.d/*.conf\n")
            for other in NAMES:
                if other != name:
                    text = CONNECTION.format(
                        name=other, host=name, here=ADDRESSES[name], there=ADDRESSES[other],
                        dpd=DPD_DELAY, site=SITES[name], remote=SITES[other],
                    )  # fmt: skip
                    host.configure(text, f"{other}.conf")
            host.configure(f'secrets {{ ike {{ secret = "{secret}" }} }}\n', "secrets.conf")
            vpns = {
                other: {"gateways": [{"address": ADDRESSES[other], "connection": other}]}
                for other in NAMES
                if other != name
            }
            client = {
                "vpns": vpns,
                "held": {"file": "/etc/ike-sa-sync/sessions"},
                "resume": {"answer_timeout": 1.0, "initiate_timeout": 3.0},
            }
            BothRoles(host, gateway_config(host.address, bank.url), client)
            built.hosts[name] = host
        bank.start()
        for name in NAMES:
            built.start(name)
        for one, other in INITIATES:
            built.hosts[one].charon.initiate("net", other)
        yield built


def test_each_session_is_the_clients_on_one_host_and_the_gateways_on_the_other(mesh: Mesh) -> None:
    assert mesh.pairs() == EACH_PAIR
    assert mesh.works()
    # one stub for each session: that of the host that did not initiate it
    wait_until(lambda: len(mesh.bank.stubs()) == 3, "the stubs")
    assert sorted(key.split("{")[1].split("/")[0] for key in mesh.bank.stubs()) == sorted(ADDRESSES.values())
    for name in NAMES:
        rows = mesh.sidecar(name).client_status()["sas"]
        own = {row["vpn"] for row in rows if row["vpn"] is not None}
        assert own == {other for one, other in INITIATES if one == name}


@pytest.mark.parametrize("name", NAMES)
def test_each_pair_has_its_session_again_after_a_host_died_and_came_back(mesh: Mesh, name: str) -> None:
    # a host that dies within 0.1 s of its last change has the session of before in its file
    wait_until(mesh.settled, "the mesh")
    said = {other: len(mesh.sidecar(other).text()) for other in NAMES}
    mesh.kill(name)
    left = [pair for pair in EACH_PAIR if name not in pair]
    wait_until(lambda: [pair for pair in mesh.pairs() if name not in pair] == left, "the pair that is left")
    mesh.start(name)
    wait_until(lambda: mesh.pairs() == EACH_PAIR, "one session of each pair", LONG)
    wait_until(mesh.works, "traffic between all sites", LONG)
    assert mesh.pairs() == EACH_PAIR
    # both sessions of the host that died were resumed: one by its peer, one by itself
    told = "".join(mesh.sidecar(other).text()[said[other] :] for other in NAMES)
    assert told.count("event=sa-resumed") == 2
