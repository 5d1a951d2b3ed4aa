"""What gateways do for the bank by themselves, in the standard lab: real charons, a real Redis."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

import pytest

from bridge.charon.vici_client import START_SECONDS
from bridge.lab import Topology
from bridge.lab.daemon import wait_until
from bridge.lab.host import Host
from bridge.lab.topology import BANK_KEY, SITE, bank_key
from failover_support import beats, connect, counter, established, fresh, resume, spis, status, stub_key, the_sa
from probe_support import configured

pytestmark = pytest.mark.lab

GW1 = "192.168.50.1"


@pytest.fixture(autouse=True)
def start_afresh(topology: Topology) -> None:
    fresh(topology)


def said(topology: Topology, gateway: str, event: str) -> int:
    """How often a gateway's sidecar logged an event."""
    return topology.gateways[gateway].text().count(event)


def is_seen(topology: Topology) -> None:
    """Wait until gw2 has seen gw1's heartbeat, as it looks for with each of its own: none misses a gateway that it has
    never seen."""
    beats(topology, topology.gw1)
    looked = counter(topology, "gw2", "bank_ping_seconds_count")
    wait_until(lambda: counter(topology, "gw2", "bank_ping_seconds_count") >= looked + 2, "gw2's look for it")


def download(topology: Topology) -> dict[str, Any]:
    done = topology.gateways["gw2"].command("stubs", "download", "--from", GW1, "--json", check=False)
    return dict(json.loads(done.stdout))


def test_a_failed_gateways_stubs_are_fetched_and_serve_a_client_without_the_bank(topology: Topology) -> None:
    connect(topology)
    is_seen(topology)
    before = said(topology, "gw2", "download-completed")
    key = topology.bank.stubs()[0]
    hits = counter(topology, "gw2", "bank_cache_hits_total")
    topology.kill_gateway(topology.gw1)
    wait_until(lambda: said(topology, "gw2", "download-completed") > before, "the download")
    os.kill(topology.bank.pid, signal.SIGSTOP)
    try:
        assert resume(topology)["result"] == "resumed"
        assert topology.client.ping(SITE) == 3
        assert counter(topology, "gw2", "bank_cache_hits_total") == hits + 1
    finally:
        os.kill(topology.bank.pid, signal.SIGCONT)
    wait_until(lambda: topology.bank.stubs() != [] and key not in topology.bank.stubs(), "the move of the stub")


def test_an_operator_has_the_others_fetch_a_gateways_stubs(topology: Topology) -> None:
    connect(topology)
    done = download(topology)
    assert (done["state"], done["stubs"]) == ("done", 1)
    # in a terminal its progress is seen
    shown = topology.gateways["gw2"].in_terminal("stubs", "download", "--from", GW1).stdout
    assert f"stubs of {GW1}" in shown
    assert f"done: 1 stub of {GW1} in " in shown


def test_without_keyspace_events_nothing_is_fetched_into_memory(topology: Topology) -> None:
    sa = connect(topology)
    topology.bank.cli("CONFIG", "SET", "notify-keyspace-events", "")
    try:
        done = topology.gateways["gw2"].command("stubs", "download", "--from", GW1, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert "no keyspace events of the bank arrive here" in done.stderr
        topology.gateways["gw1"].command("stubs", "delete", GW1, sa["responder-spi"])
        hits = counter(topology, "gw2", "bank_cache_hits_total")
        assert resume(topology, "--to", topology.gw2.address)["result"] == "fallback"
        assert counter(topology, "gw2", "bank_cache_hits_total") == hits
    finally:
        topology.bank.cli("CONFIG", "SET", "notify-keyspace-events", "Kg$hzxe")


def test_a_fetched_stub_that_was_deleted_since_is_not_served(topology: Topology) -> None:
    sa = connect(topology)
    download(topology)
    topology.gateways["gw1"].command("stubs", "delete", GW1, sa["responder-spi"])
    topology.kill_gateway(topology.gw1)
    assert resume(topology)["result"] == "fallback"


def test_a_redis_that_lost_everything_is_refilled_from_charon(topology: Topology) -> None:
    connect(topology)
    topology.bank.kill()
    for file in topology.bank.storage.rglob("*"):
        if file.is_file():
            file.unlink()
    topology.bank.start()
    wait_until(lambda: len(topology.bank.stubs()) == 1, "the stub again")
    topology.kill_gateway(topology.gw1)
    assert resume(topology)["result"] == "resumed"


def known_start(topology: Topology) -> None:
    """charon reports its start in whole seconds: an SA of its first seconds could be of the charon before."""

    def age() -> float:
        return float(topology.gw1.run("ps", "-o", "etimes=", "-p", str(topology.gw1.charon.pid)).stdout)

    # this age and the time of an SA are cut to whole seconds too
    wait_until(lambda: age() > START_SECONDS + 2, "an SA that is younger than charon", 30.0)


def test_the_stub_of_a_session_that_ended_without_a_sidecar_is_deleted_at_its_start(topology: Topology) -> None:
    known_start(topology)
    connect(topology)
    topology.gateways["gw1"].kill()
    topology.client.swanctl("--terminate", "--ike", "home")
    assert len(topology.bank.stubs()) == 1
    topology.gateways["gw1"].start()
    wait_until(lambda: not topology.bank.stubs(), "the end of its stub")


def test_the_stub_of_a_session_that_was_ending_while_the_sidecar_started_is_deleted(topology: Topology) -> None:
    known_start(topology)
    connect(topology)
    sidecar, charon = topology.gateways["gw1"], topology.client.charon
    sidecar.stop()
    # charon waits for an answer to its DELETE, and lists the SA meanwhile
    os.kill(charon.pid, signal.SIGSTOP)
    try:
        topology.gw1.swanctl("--terminate", "--ike", "gw", "--timeout", "1", check=False)
        sidecar.start()
        wait_until(lambda: topology.bank.stubs() == [], "the end of the stub", 60.0)
        assert [sa["state"] for sa in topology.gw1.charon.sas()] == ["DELETING"]
    finally:
        os.kill(charon.pid, signal.SIGCONT)


def test_the_stub_of_a_charon_that_died_stays_at_the_start_of_the_next(topology: Topology) -> None:
    connect(topology)
    topology.kill_gateway(topology.gw1)
    topology.gateways["gw1"].start(wait=False)
    topology.gw1.charon.start()
    topology.gateways["gw1"].wait_ready()
    time.sleep(1)
    assert len(topology.bank.stubs()) == 1
    assert resume(topology)["result"] == "resumed"


def dropped(host: Host) -> int:
    """Datagrams that the kernel dropped for want of room in the sidecar's end of the HA channel."""
    rows = [line.split() for line in host.run("cat", "/proc/net/udp").stdout.splitlines()]
    [drops] = [row[-1] for row in rows if row[1] == "0200007F:119E"]
    return int(drops)


def rekey(topology: Topology) -> None:
    before = spis(the_sa(topology.client))
    topology.client.swanctl("--rekey", "--ike", "home")
    wait_until(lambda: [spis(sa) for sa in established(topology.client)] not in ([], [before]), "the rekeyed IKE_SA")


def test_what_the_ha_channel_dropped_is_asked_for_again(topology: Topology) -> None:
    sidecar = topology.gateways["gw1"]
    with configured(sidecar, "ha", receive_buffer=65536):
        connect(topology)
        os.kill(sidecar.pid, signal.SIGSTOP)
        try:
            for _ in range(100):
                rekey(topology)
                if dropped(topology.gw1):
                    break
            # nothing of this one gets through
            rekey(topology)
        finally:
            os.kill(sidecar.pid, signal.SIGCONT)
        wait_until(lambda: said(topology, "gw1", "event=ha-datagrams-dropped") > 0, "the drops noticed", timeout=60)
        key = stub_key(GW1, the_sa(topology.client)["responder-spi"])
        wait_until(lambda: topology.bank.stubs() == [key], "the stub of the IKE_SA as it is now", timeout=60)
        assert said(topology, "gw1", "event=resync") > 0
        topology.kill_gateway(topology.gw1)
        assert resume(topology)["result"] == "resumed"
        assert topology.client.ping(SITE) == 3


LAND = """
import asyncio
from bridge.charon.ha_channel import HaChannel
from bridge.charon.ha_message import IkeId
from bridge.charon.releases import version_for
from bridge.charon.ha_commands import address_message
from bridge.charon.install import Install
from bridge.charon.installer import Installer
from bridge.charon.ha_segments import SegmentChooser
from bridge.ike.transforms import Encr, Group, Prf, Suite
from bridge.stub.types import Endpoint, Identity
import sys

async def land():
    channel = HaChannel("127.0.0.2", "127.0.0.1", lambda message, genuine: None, lambda ike_id, reason: None)
    channel.expect(version_for(sys.argv[1]))
    channel.open()
    await Installer(channel, SegmentChooser()).land([Install(
        id=IkeId.of(b"initiate", b"responds", False),
        suite=Suite(Encr.AES_GCM_16, 256, 0, Prf.HMAC_SHA2_384, Group.CURVE_25519),
        sk_d_old=bytes(48), nonce_i=bytes(32), nonce_r=bytes(32),
        local_id=Identity(2, b"vpn.example.org"), remote_id=Identity(3, b"client@example.org"), eap_id=None,
        local=Endpoint("192.168.50.2", 4500), remote=Endpoint("192.168.50.10", 4500), connection="gw",
        conditions=(), extensions=(), local_vips=(), remote_vips=())])
    if sys.argv[2] == "its client's":
        ike_id, client = IkeId.of(b"initiate", b"responds", False), Endpoint("192.168.50.10", 4500)
        await channel.send([address_message(channel.version, ike_id, client)])
    await channel.drained()
    channel.close()

asyncio.run(land())
"""


@pytest.mark.parametrize("address", ["that of the landing", "its client's"])
def test_what_was_installed_in_charon_and_was_never_activated_is_removed(topology: Topology, address: str) -> None:
    """A sidecar that is killed leaves charon with it: PASSIVE for ever, or active with an address that nobody has."""
    sidecar = topology.gateways["gw2"]
    sidecar.kill()
    release = topology.gw2.charon.vici().version()["version"].decode()
    topology.gw2.run(sys.executable, "-c", LAND, release, address)
    [left] = topology.gw2.charon.sas()
    assert left["state"] == "PASSIVE"
    assert left["remote-host"].startswith("192.168.50.10" if address == "its client's" else "198.18.")
    before = said(topology, "gw2", "event=leftover-sas-removed")
    sidecar.start()
    wait_until(lambda: not topology.gw2.charon.sas(), "its end")
    assert said(topology, "gw2", "event=leftover-sas-removed") == before + 1
    assert said(topology, "gw2", "event=resync") == 0


def sealed_with(topology: Topology, key: str) -> str:
    """The id, in hex, of the key that a stub is sealed with."""
    script = (
        "return (redis.call('HGET', KEYS[1], 'sealed'):sub(1, 4):gsub('.', "
        "function(octet) return ('%02x'):format(octet:byte()) end))"
    )
    return topology.bank.cli("EVAL", script, "1", key)


def test_a_new_key_seals_when_every_gateway_has_it(topology: Topology) -> None:
    sa = connect(topology)
    key = stub_key(GW1, sa["responder-spi"])
    old, new = (topology.gw1.etc / BANK_KEY.removeprefix("/etc/")).read_text(), bank_key()
    topology.gw1.write(BANK_KEY, new + old, mode=0o600)
    wait_until(lambda: new[:8] in status(topology, "gw1")["bank"]["keys"], "the new key at gw1")
    assert sealed_with(topology, key) == old[:8]
    topology.gw2.write(BANK_KEY, new + old, mode=0o600)
    wait_until(lambda: sealed_with(topology, key) == new[:8], "the stub sealed anew", timeout=60)
    for gateway in ("gw1", "gw2"):
        wait_until(
            lambda gateway=gateway: status(topology, gateway)["bank"]["sealing"] == new[:8],  # type: ignore[misc]
            f"the new key in use at {gateway}",
            timeout=60,
        )
    for host in (topology.gw1, topology.gw2):
        host.write(BANK_KEY, new, mode=0o600)
        wait_until(lambda host=host: status(topology, host.name)["bank"]["keys"] == [new[:8]], "the end of the old key")  # type: ignore[misc]
    topology.kill_gateway(topology.gw1)
    assert resume(topology)["result"] == "resumed"


def test_sessions_resume_from_a_full_bank_and_no_gateway_counts_as_dead(topology: Topology) -> None:
    """Readable and writable are two facts."""
    sa = connect(topology)
    old = stub_key(GW1, sa["responder-spi"])
    wait_until(lambda: old in topology.bank.stubs(), "the stub")
    failed = said(topology, "gw2", "gateway-failed")
    topology.bank.cli("CONFIG", "SET", "maxmemory", "1")
    try:
        wait_until(lambda: not status(topology, "gw2")["bank"]["writable"], "word that the bank takes no writes")
        assert status(topology, "gw2")["bank"]["reachable"]
        # the heartbeats of all gateways expire
        wait_until(lambda: topology.bank.cli("EXISTS", f"ike:gateway:{GW1}") == "0", "the end of gw1's heartbeat", 60)
        assert said(topology, "gw2", "gateway-failed") == failed
        topology.kill_gateway(topology.gw1)
        assert resume(topology)["result"] == "resumed"
        assert topology.client.ping(SITE) == 3
        # the end of the old session needs no memory; the new one's stub waits for some
        wait_until(lambda: topology.bank.stubs() == [], "the end of the old stub")
        assert said(topology, "gw2", "gateway-failed") == failed
    finally:
        topology.bank.cli("CONFIG", "SET", "maxmemory", "0")
    wait_until(lambda: len(topology.bank.stubs()) == 1, "the new stub")


def test_an_ike_sa_that_charon_waits_to_see_deleted_has_no_stub(topology: Topology) -> None:
    """A client that does not answer the DELETE is locked out, though charon has its IKE_SA for minutes."""
    connect(topology)
    charon = topology.client.charon
    os.kill(charon.pid, signal.SIGSTOP)
    try:
        topology.gw1.swanctl("--terminate", "--ike", "gw", "--timeout", "1", check=False)
        wait_until(lambda: topology.bank.stubs() == [], "the end of the stub", 20.0)
        assert [sa["state"] for sa in topology.gw1.charon.sas()] == ["DELETING"]
    finally:
        os.kill(charon.pid, signal.SIGCONT)
    wait_until(lambda: not topology.gw1.charon.sas(), "the end of the IKE_SA", 60.0)
    assert topology.bank.stubs() == []
