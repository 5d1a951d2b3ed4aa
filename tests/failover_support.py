"""What the end-to-end tests do again and again in the standard lab."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from bridge.lab import Topology
from bridge.lab.daemon import wait_until
from bridge.lab.host import Host
from bridge.lab.sidecar import Sidecar
from bridge.lab.topology import CHOICES, SITE, client_config, client_host

Outcome = dict[str, Any]


def established(host: Host) -> list[dict[str, Any]]:
    """The established IKE_SAs of a host, once those that were rebuilt are active."""
    found: list[dict[str, Any]] = []

    def active() -> bool:
        found[:] = host.charon.sas()
        # others that are passive keep addresses from being given out, and stay that
        return all(sa["state"] != "PASSIVE" or sa.get("remote-id", "").startswith("address-in-use") for sa in found)

    wait_until(active, "the activation of rebuilt IKE_SAs")
    return [sa for sa in found if sa["state"] == "ESTABLISHED"]


def the_sa(host: Host) -> dict[str, Any]:
    """The one IKE_SA of a host."""
    [sa] = established(host)
    return sa


def gateways_of(host: Host) -> list[str]:
    """Where the sessions of a client are; while one moves there may be none, or two."""
    return [sa["remote-host"] for sa in established(host)]


def spis(sa: dict[str, Any]) -> tuple[str, str]:
    return sa["initiator-spi"], sa["responder-spi"]


def replaced(host: Host, before: tuple[str, str]) -> bool:
    """Whether a host's one IKE_SA is another one than before; while one is rekeyed, there may be none or two."""
    return len(now := established(host)) == 1 and spis(now[0]) != before


def stub_key(gateway: str, spi: str) -> str:
    """The key of a stub: gateway's address and SPI in hex (docs/bank.md)."""
    return f"ike:stub:{{{gateway}/{spi[:2]}}}:{spi}"


def status(topology: Topology, gateway: str) -> dict[str, Any]:
    """What `ike-sa-sync status --json` shows of a gateway."""
    return topology.gateways[gateway].ask("status")


def last_move(topology: Topology) -> Outcome:
    """The outcome of the client's last attempt; empty before the first."""
    return dict(topology.agent.ask("status")["last"] or {})


def counter(topology: Topology, gateway: str, name: str) -> float:
    """One counter of a gateway; 0 while it has not counted."""
    return float(status(topology, gateway)["counters"].get(name, 0.0))


def fresh(topology: Topology) -> None:
    """All hosts and sidecars up, no SA anywhere, an empty bank."""
    if not topology.bank.running:
        topology.bank.start()
    for host in (topology.gw1, topology.gw2, topology.client):
        sidecar = host.sidecars[0]
        if not sidecar.running:
            sidecar.start(wait=False)
        if not host.charon.running:
            host.charon.start()
        sidecar.wait_ready()
    for host in (topology.client, topology.gw1, topology.gw2):
        end_sas(host)
        wait_until(lambda host=host: not host.charon.sas(), "the end of all SAs")  # type: ignore[misc]
    # a killed gateway leaves its stubs behind
    topology.bank.cli("FLUSHDB")


def end_sas(host: Host) -> None:
    """Have a host end all its IKE_SAs, whether their peers answer or not."""
    for sa in host.charon.sas():
        host.swanctl("--terminate", "--ike-id", sa["uniqueid"], "--force", "--timeout", "1", check=False)


def second_client(built: Topology, release: str | None = None) -> Host:
    """A second client of the lab, `other`, with a sidecar; it moves when it is told to only."""
    other = client_host(built.lab, "other", "192.168.50.11", built.secret, release=release)
    other.sidecar("client", client_config(CHOICES) | {"resume_on_down": False})
    return other


def start_both(built: Topology) -> None:
    """The lab, then its second client."""
    built.start()
    other = built.lab.hosts["other"]
    other.sidecars[0].start(wait=False)
    other.charon.start()
    other.sidecars[0].wait_ready()


def fresh_both(topology: Topology) -> None:
    """`fresh`, with the second client."""
    end_sas(topology.lab.hosts["other"])
    fresh(topology)


def connect(topology: Topology, connection: str = "home") -> dict[str, Any]:
    """A session of the client, its stub in the bank, traffic flowing. Gives the client's IKE_SA."""
    topology.connect(connection)
    sa = the_sa(topology.client)
    key = stub_key(sa["remote-host"], sa["responder-spi"])
    wait_until(lambda: complete(topology, key), "the stub of the session")
    assert topology.client.ping(SITE) == 3
    return sa


def complete(topology: Topology, key: str) -> bool:
    """Whether the stub is in the bank and has its virtual IP, which comes last."""
    return bool(topology.bank.cli("HGET", key, "vips"))


def beats(topology: Topology, gateway: Host) -> None:
    """Wait until a gateway's heartbeat is in the bank."""
    key = f"ike:gateway:{gateway.address}"
    wait_until(lambda: topology.bank.cli("EXISTS", key) == "1", f"the heartbeat of {gateway.name}")


def resume(topology: Topology, *arguments: str) -> Outcome:
    """`ike-sa-sync resume --json` on the client."""
    done = topology.agent.command("resume", "--json", *arguments, check=False)
    outcome: Outcome = json.loads(done.stdout)
    assert done.returncode == (1 if outcome["result"] == "failed" else 0)
    return outcome


def resumed_to(sidecar: Sidecar, gateway: Host) -> Outcome:
    """What `ike-sa-sync resume --json --to` prints on a client."""
    return dict(json.loads(sidecar.command("resume", "--json", "--to", gateway.address, check=False).stdout))


def resume_now(topology: Topology, to: Host | None = None) -> Outcome:
    """The same without a process that has to start first: while it does, a bank that was emptied is filled again, and
    a gateway that stands still lets its requests go."""
    outcome: Outcome = topology.agent.ask("resume", connection=None, vpn=None, to=to and to.address)
    return outcome


def rekeyed(host: Host, first: dict[str, Any]) -> bool:
    """Whether a host's only IKE_SA is another one than `first`; for a moment of a rekeying none is established."""
    now = [spis(sa) for sa in established(host)]
    return len(now) == 1 and now != [spis(first)]


@contextlib.contextmanager
def lost(host: Host, chain: str, *packets: str) -> Iterator[None]:
    """A host drops these packets, told as to iptables."""
    rule = (chain, *packets, "-j", "DROP")
    host.run("iptables", "-I", *rule)
    try:
        yield
    finally:
        host.run("iptables", "-D", *rule)


def rekeys_unanswered(host: Host) -> contextlib.AbstractContextManager[None]:
    """What a host sends of CREATE_CHILD_SA exchanges is lost."""
    # behind IP and UDP header and non-ESP marker, the exchange type is in octet 18
    return lost(host, "OUTPUT", "-p", "udp", "--sport", "4500", "-m", "u32", "--u32", "0>>22&0x3C@28>>8&0xFF=36")


@contextlib.contextmanager
def agent_with(topology: Topology, **options: Any) -> Iterator[None]:
    """The client's sidecar with other options, and as it was afterwards."""
    before = dict(topology.agent.config)
    topology.agent.stop()
    topology.agent.config.update(options)
    topology.agent.start()
    try:
        yield
    finally:
        topology.agent.stop()
        topology.agent.config = before
        topology.agent.start()


def failed_over(topology: Topology) -> tuple[dict[str, Any], Outcome]:
    """A session at gw1, gw1 killed, resumed. Gives the client's old IKE_SA and the outcome."""
    before = connect(topology)
    topology.kill_gateway(topology.gw1)
    return before, resume(topology)
