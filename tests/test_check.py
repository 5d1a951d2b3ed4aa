"""`ike-sa-sync check` finds what makes resumption fail in silence: each fault made for real, named with its fix."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from bridge.check.foreign_rules import _holds_up
from bridge.ike.address import Pool
from bridge.lab import Lab, Topology, standard
from bridge.lab.charon import render
from bridge.lab.daemon import wait_until
from bridge.lab.host import Host
from bridge.lab.sidecar import Sidecar, program
from bridge.service.process import code

Finding = dict[str, Any]


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    with Lab() as lab:
        yield standard(lab, ha_pools=True)


def sidecar_of(host: Host) -> Sidecar:
    return host.sidecars[0]


def check(host: Host, *prefix: str) -> list[Finding]:
    """What the command says on a host."""
    argv = [*prefix, *program(), "check", "-c", sidecar_of(host).file, "--json"]
    done = host.run(*argv, check=False)
    findings: list[Finding] = json.loads(done.stdout)
    assert done.returncode == (1 if any(finding["grade"] == "fail" for finding in findings) else 0)
    assert all(finding["fix"] for finding in findings if finding["grade"] != "ok")
    return findings


def the(findings: list[Finding], name: str, grade: str = "fail") -> Finding:
    """The one finding of a name that is not ok."""
    named = [finding for finding in findings if finding["check"] == name and finding["grade"] != "ok"]
    assert [finding["grade"] for finding in named] == [grade], findings
    return named[0]


@contextlib.contextmanager
def charon_set(host: Host, settings: dict[str, Any]) -> Iterator[None]:
    """charon of a host, restarted with other settings for a while."""
    host.charon.settings.update(settings)
    host.charon.stop()
    host.charon.start()
    try:
        yield
    finally:
        for name in settings:
            del host.charon.settings[name]
        host.charon.stop()
        host.charon.start()


@contextlib.contextmanager
def configured(host: Host, settings: dict[str, Any]) -> Iterator[None]:
    """charon of a host with more in swanctl.conf for a while."""
    host.configure(render(settings) + "\n", "zz-test.conf")
    host.charon.load()
    try:
        yield
    finally:
        (host.etc / "swanctl/conf.d/zz-test.conf").unlink()
        host.charon.load()


@contextlib.contextmanager
def stopped(sidecar: Sidecar) -> Iterator[None]:
    sidecar.stop()
    try:
        yield
    finally:
        sidecar.start()


@contextlib.contextmanager
def running(host: Host, code: str) -> Iterator[int]:
    """A Python program on a host that has said `up`; its process id."""
    log = host.directory / "program.log"
    with log.open("w") as output:
        process = host.popen(sys.executable, "-c", code, stdout=output, stderr=output)
    try:
        wait_until(lambda: "up" in log.read_text(), "the program")
        yield process.pid
    finally:
        process.kill()
        process.wait()


@pytest.mark.lab
def test_nothing_is_found_where_all_is_well(topology: Topology) -> None:
    wait_until(lambda: len(topology.bank.cli("--scan", "--pattern", "ike:facts:*").split()) == 2, "the gateways' facts")
    for host in (topology.gw1, topology.gw2, topology.client):
        findings = check(host)
        assert {finding["grade"] for finding in findings} == {"ok"}, findings
    fits = next(finding for finding in check(topology.gw1) if finding["check"] == "other gateways")
    assert topology.gw2.address in fits["finding"]


@pytest.mark.lab
def test_the_report_for_people_names_each_fix_and_counts(topology: Topology) -> None:
    with configured(topology.client, {"connections.home.dpd_delay": "0s"}):
        done = topology.agent.command("check", check=False)
    assert done.returncode == 1
    assert "\x1b" not in done.stdout
    assert "FAIL  dpd_delay" in done.stdout
    assert "fix: set dpd_delay" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("2 fail, 0 warn")


@pytest.mark.lab
def test_a_missing_charon(topology: Topology) -> None:
    topology.gw1.charon.stop()
    try:
        assert "start strongSwan" in the(check(topology.gw1), "charon")["fix"]
        told = topology.gateways["gw1"].command("status").stdout
        assert told.startswith("charon      NOT REACHABLE\ncode        " + code() + "\n")
        assert topology.gateways["gw1"].ask("status")["code"] == topology.agent.ask("status")["code"] == code()
    finally:
        topology.gw1.charon.start()


@pytest.mark.lab
def test_the_ha_plugin_not_loaded(topology: Topology) -> None:
    with charon_set(topology.gw1, {"charon.plugins.ha.load": "no"}):
        assert "charon.plugins.ha.load is no" in the(check(topology.gw1), "ha plugin")["finding"]


@pytest.mark.lab
def test_options_that_differ_from_the_drop_in(topology: Topology) -> None:
    settings = {
        "charon.plugins.ha.monitor": "yes",
        "charon.plugins.ha.resync": "yes",
        "charon.plugins.ha.segment_count": 8,
        "charon.plugins.ha.fifo_interface": "yes",
        "charon.ikesa_table_size": 1,
    }
    with charon_set(topology.gw1, settings):
        findings = check(topology.gw1)
    assert "takes and drops segments by itself" in the(findings, "plugins.ha.monitor")["finding"]
    assert "set it to no" in the(findings, "plugins.ha.monitor")["fix"]
    assert "set it to no" in the(findings, "plugins.ha.resync")["fix"]
    assert "set it to 16" in the(findings, "plugins.ha.segment_count")["fix"]
    the(findings, "plugins.ha.fifo_interface", "warn")
    assert "charon.ikesa_table_size is 1" in the(findings, "ikesa_table_size", "warn")["finding"]


@pytest.mark.lab
def test_charons_keys_sent_elsewhere(topology: Topology) -> None:
    with charon_set(topology.gw1, {"charon.plugins.ha.remote": "127.0.0.9"}):
        findings = check(topology.gw1)
    assert "does not speak to 127.0.0.2:4510" in the(findings, "ha remote")["finding"]
    assert "set it to 127.0.0.2" in the(findings, "plugins.ha.remote")["fix"]


@pytest.mark.lab
@pytest.mark.parametrize(("host", "grade"), [("client", "fail"), ("gw1", "warn")])
def test_an_ike_sa_of_its_own_for_each_child(topology: Topology, host: str, grade: str) -> None:
    with charon_set(getattr(topology, host), {"charon.reuse_ikesa": "no"}):
        assert "remove that line" in the(check(getattr(topology, host)), "reuse_ikesa", grade)["fix"]


@pytest.mark.lab
def test_a_file_that_was_changed_after_charon_read_it(topology: Topology) -> None:
    changed = topology.gw1.etc / "strongswan.d/ike-sa-sync.conf"
    before = changed.stat()
    os.utime(changed, (time.time() + 60, time.time() + 60))
    try:
        assert "/etc/strongswan.d/ike-sa-sync.conf" in the(check(topology.gw1), "restart", "warn")["finding"]
    finally:
        os.utime(changed, (before.st_atime, before.st_mtime))


@pytest.mark.lab
def test_children_with_a_key_exchange_of_their_own(topology: Topology) -> None:
    with configured(topology.gw1, {"connections.gw.children.net.esp_proposals": "aes128gcm16-x25519,aes128-sha256"}):
        assert "gw.net (x25519)" in the(check(topology.gw1), "PFS", "warn")["finding"]
    with configured(topology.client, {"connections.home.children.net.esp_proposals": "aes128-sha256-modp2048"}):
        # home-gw2 takes it from home
        assert "home-gw2.net (modp2048)" in the(check(topology.client), "PFS", "warn")["finding"]


@pytest.mark.lab
def test_pools_that_overlap_between_gateways(topology: Topology) -> None:
    with configured(topology.gw1, {"pools.other.addrs": "10.20.2.128/25"}):
        finding = the(check(topology.gw1), "pools")
    assert "pool other (10.20.2.128-" in finding["finding"]
    assert f"of {topology.gw2.address}" in finding["finding"]


@pytest.mark.lab
def test_a_pool_in_charons_memory_which_forgets_at_a_restart(topology: Topology) -> None:
    with configured(topology.gw1, {"pools.other.addrs": "10.20.9.0/24"}):
        finding = the(check(topology.gw1), "pools in memory", "warn")
    assert "pool other (10.20.9.0-" in finding["finding"]
    assert "charon.plugins.ha.pools.other" in finding["fix"]
    # charon asks its memory first
    with configured(topology.gw1, {"pools.clients.addrs": "10.20.9.0/24"}):
        assert "take pools.clients out" in the(check(topology.gw1), "pools in memory")["fix"]


@pytest.mark.lab
def test_a_pool_without_a_way_back(topology: Topology) -> None:
    [bird] = [router for router in topology.routers if router.host is topology.gw1]
    bird.stop()
    try:
        finding = the(check(topology.gw1), "return path", "warn")
        assert "clients (10.20.1.1-" in finding["finding"]
        sidecar = sidecar_of(topology.gw1)
        acknowledged = sidecar.config | {"network": {"return_path": "external"}}
        topology.gw1.write("/etc/ike-sa-sync/acknowledged.yaml", json.dumps(acknowledged))
        command = [*program(), "check", "-c", "/etc/ike-sa-sync/acknowledged.yaml", "--json"]
        found = json.loads(topology.gw1.run(*command, check=False).stdout)
        assert [row["grade"] for row in found if row["check"] == "return path"] == ["ok"]
    finally:
        bird.start()


@pytest.mark.lab
def test_connections_and_children_that_another_gateway_has(topology: Topology) -> None:
    more = {
        "connections.roaming.remote_addrs": "%any",
        "connections.roaming.remote.auth": "psk",
        "connections.roaming.children.net.local_ts": "10.10.0.0/16",
        "connections.gw.children.voice.local_ts": "10.12.0.0/16",
    }
    with configured(topology.gw2, more):
        wait_until(lambda: "voice" in topology.bank.cli("GET", f"ike:facts:{topology.gw2.address}"), "gw2's facts", 90)
        findings = check(topology.gw1)
    assert "has connection 'roaming', this gateway has not" in the(findings, "connection")["finding"]
    assert "connection gw of 192.168.50.2 has voice" in the(findings, "children")["finding"]
    wait_until(lambda: "voice" not in topology.bank.cli("GET", f"ike:facts:{topology.gw2.address}"), "facts", 90)


@pytest.mark.lab
def test_connections_that_a_client_lacks_or_that_lead_elsewhere(topology: Topology) -> None:
    config = topology.agent.config
    entries = config["gateways"]
    with stopped(topology.agent):
        config["gateways"] = [
            {"address": "192.168.50.1", "connection": "home-gw2"},
            {"address": "192.168.50.2", "connection": "nowhere"},
        ]
    try:
        findings = check(topology.client)
    finally:
        config["gateways"] = entries
        topology.agent.stop()
        topology.agent.start()
    grades = {finding["grade"]: finding["finding"] for finding in findings if finding["check"] == "connection"}
    assert "charon has no connection 'nowhere'" in grades["fail"]
    assert "home-gw2 leads to 192.168.50.2, not to 192.168.50.1" in grades["warn"]


@pytest.mark.lab
def test_a_connection_with_several_gateways_of_which_a_handshake_reaches_one(topology: Topology) -> None:
    config = topology.agent.config
    entries = config["gateways"]
    with stopped(topology.agent):
        config["gateways"] = [{"address": f"192.168.50.{number}", "connection": "home"} for number in (1, 2)]
    try:
        with configured(topology.client, {"connections.home.remote_addrs": "192.168.50.1, 192.168.50.2"}):
            findings = [finding for finding in check(topology.client) if finding["check"] == "connection"]
    finally:
        config["gateways"] = entries
        topology.agent.stop()
        topology.agent.start()
    assert [finding["grade"] for finding in findings] == ["ok", "warn"]
    assert "home to 192.168.50.2" in findings[1]["finding"]
    assert "first address of the connection only, 192.168.50.1" in findings[1]["finding"]


@pytest.mark.lab
def test_what_charon_does_beside_the_sidecar_when_a_gateway_is_dead(topology: Topology) -> None:
    actions = {"children.net.dpd_action": "restart", "children.net.close_action": "start", "keyingtries": 0}
    more = {
        f"connections.home.{name}": value for name, value in (actions | {"children.net.start_action": "start"}).items()
    }
    with configured(topology.client, more):
        findings = check(topology.client)
    for name in ("dpd_action", "close_action", "start_action"):
        # home-gw2 takes it from home
        found = {finding["finding"].split(":")[0]: finding["fix"] for finding in findings if finding["check"] == name}
        assert list(found) == ["home.net", "home-gw2.net"]
        assert all("swanctl --load-conns" in fix for fix in found.values())


@pytest.mark.lab
def test_connections_that_were_loaded_from_elsewhere(topology: Topology) -> None:
    elsewhere = topology.client.write(
        "/etc/ike-sa-sync/other.conf", "connections { other { remote_addrs = 192.0.2.1 } }\n"
    )
    topology.agent.config["swanctl"] = "/etc/ike-sa-sync/other.conf"
    try:
        topology.client.write(topology.agent.file, yaml.safe_dump(topology.agent.config))
        finding = the(check(topology.client), "PFS", "warn")
    finally:
        del topology.agent.config["swanctl"]
        topology.client.write(topology.agent.file, yaml.safe_dump(topology.agent.config))
        elsewhere.unlink()
    assert "PFS cannot be seen: home, home-gw2" in finding["finding"]
    assert "set `swanctl`" in finding["fix"]


@pytest.mark.lab
def test_a_gateways_ports_that_are_not_intercepted(topology: Topology) -> None:
    with charon_set(topology.gw1, {"charon.port_nat_t": 0}):
        assert "charon.port_nat_t is 0" in the(check(topology.gw1), "ports")["finding"]


@pytest.mark.lab
def test_children_that_a_client_has_towards_one_gateway_only(topology: Topology) -> None:
    with configured(topology.client, {"connections.home-gw2.children.voice.remote_ts": "10.12.0.0/16"}):
        assert "connection home lacks the CHILD_SA voice" in the(check(topology.client), "children", "warn")["finding"]


@pytest.mark.lab
def test_a_client_that_notices_a_dead_gateway_late_or_never(topology: Topology) -> None:
    with configured(topology.client, {"connections.home-gw2.dpd_delay": "0s"}):
        assert "does not notice" in the(check(topology.client), "dpd_delay")["finding"]
    patient = {"charon.retransmit_timeout": 4.0, "charon.retransmit_base": 1.8, "charon.retransmit_tries": 5}
    (topology.client.etc / "strongswan.d/zz.conf").write_text(render(patient))
    try:
        findings = [finding for finding in check(topology.client) if finding["check"] == "dpd_delay"]
    finally:
        (topology.client.etc / "strongswan.d/zz.conf").unlink()
    # charon's own retransmission takes 165 s
    assert [finding["grade"] for finding in findings] == ["warn", "warn"]
    assert "after 167 s" in findings[0]["finding"]


@pytest.mark.lab
@pytest.mark.parametrize(("shift", "grade"), [("-30s", "warn"), ("+120s", "fail")])
def test_a_clock_that_differs_from_the_banks(topology: Topology, shift: str, grade: str) -> None:
    finding = the(check(topology.gw1, "faketime", "-f", shift), "clock", grade)
    assert ("behind" if shift.startswith("-") else "ahead of") in finding["finding"]
    assert "NTP" in finding["fix"]


@pytest.mark.lab
def test_a_bank_that_does_not_answer(topology: Topology) -> None:
    topology.bank.stop()
    try:
        assert "is bank.url right" in the(check(topology.gw1), "bank")["fix"]
        sidecar = topology.gateways["gw1"]
        done = sidecar.command("stubs", "download", "--from", topology.gw2.address, check=False)
    finally:
        topology.bank.start()
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("ike-sa-sync: Redis: ")
    assert done.stderr.endswith("; see `ike-sa-sync check`\n")


@pytest.mark.lab
def test_a_bank_that_sends_no_events(topology: Topology) -> None:
    events = topology.bank.cli("CONFIG", "GET", "notify-keyspace-events").split()[-1]
    topology.bank.cli("CONFIG", "SET", "notify-keyspace-events", "")
    try:
        assert "redis/redis.conf" in the(check(topology.gw1), "keyspace events", "warn")["fix"]
    finally:
        topology.bank.cli("CONFIG", "SET", "notify-keyspace-events", events)


@pytest.mark.lab
def test_a_rule_to_the_queue_without_bypass(topology: Topology) -> None:
    rule = ("INPUT", "-p", "udp", "--dport", "500", "-j", "NFQUEUE", "--queue-num", "4510")
    topology.gw1.run("iptables", "-A", *rule)
    try:
        finding = the(check(topology.gw1), "bypass")
    finally:
        topology.gw1.run("iptables", "-D", *rule)
    assert "udp dport 500" in finding["finding"]
    assert "4510" in finding["finding"]
    assert "--queue-bypass" in finding["fix"]


@pytest.mark.lab
def test_other_software_on_the_queue(topology: Topology) -> None:
    code = """
from netfilterqueue import NetfilterQueue
queue = NetfilterQueue()
queue.bind(4510, lambda packet: packet.accept())
print("up", flush=True)
queue.run()
"""
    with stopped(topology.gateways["gw1"]), running(topology.gw1, code) as pid:
        findings = check(topology.gw1)
        assert f"netlink port {pid} (" in the(findings, "queue")["finding"]
        the(findings, "rules", "warn")


@pytest.mark.lab
def test_no_sidecar_and_another_process_in_its_place(topology: Topology) -> None:
    code = """
import socket, time
place = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
place.bind(("127.0.0.2", 4510))
print("up", flush=True)
time.sleep(600)
"""
    with stopped(topology.gateways["gw1"]):
        assert "before charon" in the(check(topology.gw1), "sidecar")["fix"]
        with running(topology.gw1, code) as pid:
            assert f"held by process {pid}" in the(check(topology.gw1), "sidecar", "warn")["finding"]


@pytest.mark.lab
def test_a_key_file_that_others_may_read_or_that_is_not_there(topology: Topology) -> None:
    key = topology.gw1.etc / "ike-sa-sync/bank.key"
    key.chmod(0o644)
    try:
        assert the(check(topology.gw1), "key file")["fix"] == "chmod 600 /etc/ike-sa-sync/bank.key"
    finally:
        key.chmod(0o600)
    aside = key.rename(key.with_suffix(".aside"))
    try:
        assert "ike-sa-sync keygen" in the(check(topology.gw1), "key file")["fix"]
    finally:
        aside.rename(key)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("udp dport 500 queue num 4510", True),
        ("udp dport 500 queue num 4510 bypass", False),
        ("udp dport 500 queue to 4510", True),
        ("udp dport 500 queue flags bypass to 4510", False),
        ("udp dport 500 queue flags fanout to 4500-4520", True),
        ("udp dport 500 queue num 45100", False),
        ("-A INPUT -p udp -j NFQUEUE --queue-num 4510", True),
        ("-A INPUT -p udp -j NFQUEUE --queue-num 4510 --queue-bypass", False),
        ("-A INPUT -p udp -j NFQUEUE --queue-balance 4508:4511", True),
        ("-A INPUT -p udp -j NFQUEUE", False),
        ("# -A INPUT -j NFQUEUE --queue-num 4510", False),
    ],
)
def test_rules_without_bypass_are_distinguished_from_others(line: str, found: bool) -> None:
    assert _holds_up(line, 4510) is found


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [
        (Pool("a", "10.0.0.0", 254), Pool("b", "10.0.1.0", 254), False),
        (Pool("a", "10.0.0.0", 254), Pool("b", "10.0.0.128", 126), True),
        (Pool("a", "10.0.0.10", 1), Pool("b", "10.0.0.10", 1), True),
        (Pool("a", "10.0.0.10", 1), Pool("b", "10.0.0.11", 1), False),
        (Pool("a", "fd00::", 2**16), Pool("b", "10.0.0.0", 254), False),
        (Pool("a", "fd00::", 2**16), Pool("b", "fd00::ff", 8), True),
    ],
)
def test_pools_overlap_where_they_share_an_address(one: Pool, other: Pool, overlap: bool) -> None:
    assert one.overlaps(other) is other.overlaps(one) is overlap


def test_the_facts_of_a_gateway_are_not_believed_to_be_well_formed(tmp_path: Path) -> None:
    from bridge.bank.gateway_facts import Facts, decode, encode

    facts = Facts({"gw": ["net"]}, [Pool("clients", "10.0.0.0", 254)])
    assert decode(encode(facts)) == facts
    for wrong in ("", "{", "[]", '{"connections": 1}', '{"connections": {}, "pools": [{"name": "a"}]}'):
        assert decode(wrong) is None
    assert decode('{"connections": {}, "pools": [{"name": "a", "base": "nowhere", "size": 1}]}') is None


def planned(host: Host, *arguments: str) -> dict[str, Any]:
    """`ike-sa-sync check --plan --json`, without a configuration."""
    done = host.run(*program(), "check", "--plan", "--json", *arguments, check=False)
    return dict(json.loads(done.stdout))


@pytest.mark.lab
def test_a_plan_says_what_would_be_resumable_and_proposes_a_configuration(topology: Topology) -> None:
    topology.connect()
    try:
        client, gateway = planned(topology.client), planned(topology.gw1)
        more = {
            "connections.old.version": 1,
            "connections.old.remote_addrs": "192.0.2.1",
            "connections.old.remote.auth": "psk",
        }
        with configured(topology.client, more):
            [old] = [row for row in planned(topology.client)["connections"] if row["connection"] == "old"]
    finally:
        topology.client.swanctl("--terminate", "--ike", "home")
    assert client["connections"] == [
        {"connection": "home", "role": "client", "resumable": True, "sessions": 1, "why": "in one round trip"},
        {"connection": "home-gw2", "role": "client", "resumable": True, "sessions": 0, "why": "in one round trip"},
    ]
    assert yaml.safe_load(client["files"]["client"]) == {
        "gateways": [
            {"address": "192.168.50.1", "connection": "home"},
            {"address": "192.168.50.2", "connection": "home-gw2"},
        ]
    }
    assert client["findings"] == []
    assert [(row["connection"], row["role"], row["sessions"]) for row in gateway["connections"]] == [
        ("gw", "gateway", 1)
    ]
    assert yaml.safe_load(gateway["files"]["gateway"])["address"] == topology.gw1.address
    assert (old["resumable"], old["why"]) == (False, "IKEv1: set version = 2")


@pytest.mark.lab
def test_a_plan_is_written_where_there_is_no_file_and_the_sidecar_runs_with_it(topology: Topology) -> None:
    with stopped(topology.agent):
        path = topology.client.etc / "ike-sa-sync/client.yaml"
        before = path.read_text()
        planned(topology.client, "--write")
        assert path.read_text() == before
        path.unlink()
        try:
            planned(topology.client, "--write")
            assert {finding["grade"] for finding in check(topology.client) if finding["check"] == "connection"} == {
                "ok"
            }
        finally:
            path.write_text(before)


@pytest.mark.lab
def test_a_plan_without_the_ha_plugin_says_how_to_get_it(topology: Topology) -> None:
    with charon_set(topology.client, {"charon.plugins.ha.load": "no"}):
        told = planned(topology.client)
    assert "set it to yes" in the(told["findings"], "ha plugin")["fix"]
    assert [row["resumable"] for row in told["connections"]] == [True, True]


def test_a_plan_without_a_charon_is_one_line_and_a_status(tmp_path: Path) -> None:
    file = tmp_path / "client.yaml"
    file.write_text(f"vici: {tmp_path}/none\n")
    done = subprocess.run([*program(), "check", "--plan", "-c", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "start strongSwan" in done.stdout
    assert subprocess.run([*program(), "check", "--write"], capture_output=True, check=False).returncode == 2
