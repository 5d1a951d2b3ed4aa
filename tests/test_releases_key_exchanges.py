"""IKE_SAs of several key exchanges (RFC 9370, RFC 9242), which strongSwan has from 6.0 on: extracted and resumed.

Which groups there are is asked of charon: ML-KEM is not in every build of every release.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bridge.lab import Lab, Topology, standard
from bridge.lab.charon import render
from bridge.lab.daemon import wait_until
from bridge.lab.host import Host
from bridge.lab.topology import BANK_KEY, SITE
from bridge.stub import codec
from bridge.stub.keyring import Keyring
from bridge.stub.stub import Stub
from failover_support import connect, established, fresh, resume, spis, stub_key, the_sa
from vectors.record import logged

pytestmark = [pytest.mark.lab, pytest.mark.releases]

CONNECTIONS = {"gw1": ("gw",), "gw2": ("gw",), "client": ("home", "home-gw2")}
HEX_OF_SEALED = (
    "return (redis.call('HGET', KEYS[1], 'sealed'):gsub('.', function(c) return ('%02x'):format(c:byte()) end))"
)


def offers(host: Host, method: str) -> bool:
    """Whether a host's charon has a key exchange method."""
    return f" {method}[" in host.swanctl("--list-algs")


@pytest.fixture(
    scope="module",
    params=["trixie-trixie-trixie", "forky-forky-forky", "trixie-forky-forky", "forky-trixie-forky"],
)
def topology(request: pytest.FixtureRequest) -> Iterator[Topology]:
    """The standard lab with releases that know several key exchanges, their keys logged."""
    releases = dict(zip(CONNECTIONS, request.param.split("-"), strict=True))
    with Lab() as lab:
        topology = standard(lab, releases=releases, start=False)
        hosts = [lab.hosts[name] for name in CONNECTIONS]
        for host in hosts:
            host.charon.settings["charon.filelog.lab.ike"] = 4
        topology.start()
        further = "mlkem768" if all(offers(host, "ML_KEM_768") for host in hosts) else "ecp384-ke2_modp3072"
        proposal = f"aes256gcm16-prfsha384-x25519-ke1_{further}"
        for host in hosts:
            proposals = {f"connections.{name}.proposals": proposal for name in CONNECTIONS[host.name]}
            host.configure(render(proposals) + "\n", "proposal.conf")
            host.charon.load()
        yield topology


@pytest.fixture(autouse=True)
def _fresh(topology: Topology) -> None:
    fresh(topology)


def stub_of(topology: Topology, gateway: Host) -> Stub:
    """The stub of a gateway's one session, opened."""
    sa = the_sa(gateway)
    own = sa["initiator-spi"] if sa.get("initiator") == "yes" else sa["responder-spi"]
    key = stub_key(gateway.address, own)
    wait_until(lambda: topology.bank.stubs() == [key], "the session's stub")
    sealed = bytes.fromhex(topology.bank.cli("EVAL", HEX_OF_SEALED, "1", key))
    keyring = Keyring.load(gateway.etc / BANK_KEY.removeprefix("/etc/"))
    return codec.decode(keyring.open(sealed, key.encode()))


def sk_d(host: Host) -> str:
    """SK_d of the keys that a host's charon derived last, as it logged it."""
    return logged(host.charon.text(), "Sk_d secret")[-1]


def rekey(host: Host) -> None:
    """Rekey a host's one IKE_SA, and wait until the old one is gone."""
    old = the_sa(host)
    host.swanctl("--rekey", "--ike", old["name"])
    wait_until(lambda: [spis(sa) for sa in established(host)] not in ([], [spis(old)]), "the rekeyed IKE_SA")
    wait_until(lambda: len(host.charon.sas()) == 1, "the end of the old IKE_SA")


def test_the_stubs_sk_d_is_the_one_that_charon_logged_before_and_after_a_rekey(topology: Topology) -> None:
    connect(topology)
    first = stub_of(topology, topology.gw1)
    assert first.suite.additional
    assert first.sk_d.hex() == sk_d(topology.gw1) == sk_d(topology.client)
    for host in (topology.client, topology.gw1):
        rekey(host)
        stub = stub_of(topology, topology.gw1)
        assert stub.suite == first.suite
        assert stub.sk_d.hex() == sk_d(topology.gw1) == sk_d(topology.client) != first.sk_d.hex()


@pytest.mark.parametrize("before", [[], ["client"], ["gw1", "client"]], ids=["first", "rekeyed", "rekeyed twice"])
def test_a_session_is_resumed_and_rekeyed_and_resumed_again(topology: Topology, before: list[str]) -> None:
    connect(topology)
    for name in before:
        rekey(topology.lab.hosts[name])
    stub_of(topology, topology.gw1)
    topology.kill_gateway(topology.gw1)
    assert resume(topology)["result"] == "resumed"
    assert sk_d(topology.gw2) == sk_d(topology.client)
    assert topology.client.ping(SITE) == 3
    rekey(topology.client)
    assert stub_of(topology, topology.gw2).sk_d.hex() == sk_d(topology.gw2) == sk_d(topology.client)
    topology.gateways["gw1"].start(wait=False)
    topology.gw1.charon.start()
    topology.gateways["gw1"].wait_ready()
    topology.kill_gateway(topology.gw2)
    assert resume(topology)["result"] == "resumed"
    assert topology.client.ping(SITE) == 3


def test_a_sidecar_that_starts_late_learns_the_keys_of_all_exchanges(topology: Topology) -> None:
    before = connect(topology)
    topology.gateways["gw1"].kill()
    topology.bank.cli("FLUSHDB")
    topology.gateways["gw1"].start()
    key = stub_key(topology.gw1.address, before["responder-spi"])
    wait_until(lambda: topology.bank.stubs() == [key], "the stub, found again")
    assert stub_of(topology, topology.gw1).sk_d.hex() == sk_d(topology.gw1)
