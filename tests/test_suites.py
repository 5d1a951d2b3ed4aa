"""Every prf, cipher, integrity algorithm and key exchange group that charon offers, on an IKE_SA that was resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle

import pytest

from bridge.ike.key_exchange import fresh_public_value
from bridge.lab import Lab, Topology, standard
from bridge.lab.daemon import wait_until
from bridge.lab.topology import SITE
from failover_support import connect, counter, fresh, resume, stub_key, the_sa

pytestmark = pytest.mark.lab

PRFS = ("prfsha256", "prfsha1", "prfsha384", "prfsha512", "prfaesxcbc", "prfaescmac")
AEADS = (
    *("aes128gcm16", "aes256gcm16", "aes192gcm12", "aes128gcm8", "chacha20poly1305"),
    *("aes128ccm16", "aes256ccm12", "aes192ccm8", "camellia128ccm16"),
)
CIPHERS = ("aes128", "aes192", "aes256", "aes128ctr", "aes256ctr", "3des", "camellia128", "camellia256ctr")
INTEGRITIES = ("sha256", "sha1", "sha384", "sha512", "aesxcbc", "aescmac")
GROUPS = (
    *("x25519", "x448", "ecp256", "ecp384", "ecp521", "ecp224", "ecp192"),
    *("ecp224bp", "ecp256bp", "ecp384bp", "ecp512bp"),
    *("modp2048", "modp3072", "modp4096", "modp6144", "modp8192", "modp1536", "modp1024", "modp768"),
    *("modp1024s160", "modp2048s224", "modp2048s256"),
)


def suites() -> list[str]:
    """Proposals in which each algorithm of a kind meets others of the next, without the full product."""
    ciphers = [*AEADS, *(f"{cipher}-{integrity}" for cipher, integrity in zip(CIPHERS, cycle(INTEGRITIES)))]
    prfs, groups = cycle(PRFS), cycle(GROUPS)
    count = max(len(ciphers), len(GROUPS))
    turning = cycle(ciphers)
    return [f"{next(turning)}-{next(prfs)}-{next(groups)}" for _ in range(count)]


SUITES = suites()


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    """The standard lab, whose gateways take any of the suites."""
    with Lab() as lab:
        built = standard(lab, start=False)
        built.agent.config["resume_on_down"] = False
        for host in (built.gw1, built.gw2):
            host.configure(f"connections {{ gw {{ proposals = {','.join(SUITES)} }} }}\n", "suites.conf")
        built.start()
        yield built


def propose(topology: Topology, suite: str) -> None:
    """Have the client's next IKE_SA made with one suite; home-gw2 inherits it."""
    topology.client.configure(f"connections {{ home {{ proposals = {suite} }} }}\n", "suites.conf")
    topology.client.charon.load()


def algorithms(sa: dict[str, str]) -> tuple[str | None, ...]:
    return tuple(sa.get(key) for key in ("encr-alg", "encr-keysize", "integ-alg", "prf-alg", "dh-group"))


def without_needless_prf(suite: str) -> str:
    """The same suite with the prf left out where it is that of the integrity algorithm."""
    words = suite.split("-")
    return "-".join(word for word in words if word.removeprefix("prf") not in words or not word.startswith("prf"))


@pytest.mark.parametrize("suite", SUITES)
def test_an_ike_sa_of_this_suite_is_resumed_with_the_same_algorithms(
    topology: Topology, suite: str, tell: Callable[..., None]
) -> None:
    fresh(topology)
    propose(topology, suite)
    before = connect(topology)
    key = stub_key(before["remote-host"], before["responder-spi"])
    assert topology.bank.cli("HGET", key, "proposal") == without_needless_prf(suite)
    outcome = resume(topology, "--to", topology.gw2.address)
    tell("suite", suite, outcome)
    assert outcome["result"] == "resumed"
    assert algorithms(the_sa(topology.client)) == algorithms(before)
    assert topology.client.ping(SITE) == 3
    # and charon has the same keys: it protects what the sides say from here on
    child = list(the_sa(topology.client)["child-sas"])
    topology.client.swanctl("--rekey", "--child", "net")
    wait_until(lambda: list(the_sa(topology.client)["child-sas"]) not in ([], child), "the rekeyed CHILD_SA")
    wait_until(lambda: topology.client.ping(SITE, count=1) == 1, "traffic through it")


def test_every_algorithm_has_its_turn() -> None:
    parts = {part for suite in SUITES for part in suite.split("-")}
    assert parts == {*PRFS, *AEADS, *CIPHERS, *INTEGRITIES, *GROUPS}


def test_a_suite_that_cannot_be_resumed_is_refused_by_name_when_it_is_set_up(topology: Topology) -> None:
    suite = "aes128-sha256-prfmd5-x25519"
    for host in (topology.gw1, topology.gw2):
        host.configure(f"connections {{ gw {{ proposals = {suite},{','.join(SUITES)} }} }}\n", "suites.conf")
        host.charon.load()
    fresh(topology)
    propose(topology, suite)
    refused = counter(topology, "gw1", "ike_sas_unresumable_total")
    topology.connect()
    assert topology.client.ping(SITE) == 3
    sidecar = topology.gateways["gw1"]
    assert "the prf HMAC_MD5 is not implemented" in sidecar.text()
    assert counter(topology, "gw1", "ike_sas_unresumable_total") == refused + 1
    assert topology.bank.stubs() == []
    outcome = resume(topology, "--to", topology.gw2.address)
    assert (outcome["result"], outcome["reason"]) == ("fallback", "not-resumable")
    assert topology.client.ping(SITE) == 3


def test_a_group_that_is_unknown_here_still_gets_a_public_value() -> None:
    assert len(fresh_public_value(1023)) == 32
