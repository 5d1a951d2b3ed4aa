"""Commands of docs/deployment.md that need no machine of their own: on hosts of the lab, by the page's words.

Those that change packages or units run on the machines of `make test-vm` (tests/test_vm_deployment.py)."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import deployment_page
from bridge.lab import Lab
from bridge.lab.daemon import wait_until
from bridge.lab.host import Host
from bridge.lab.sidecar import program
from bridge.lab.topology import SITE
from bridge.net import firewall, queue_rules
from drain_support import Clients, four
from net_support import Wire, inside, run, wire

pytestmark = pytest.mark.lab

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / deployment_page.PAGE).read_text()
BLOCKS = deployment_page.blocks(TEXT)
GET = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1]).read().decode())"
SHARED = "/usr/share/ike-sa-sync/"


def follow(host: Host, block: str, code: int = 0) -> str:
    """Run a block of the page on a host, with the program of this tree; its output."""
    told = host.run("sh", "-euc", f"PATH={Path(program()[0]).parent}:$PATH\n{BLOCKS[block]}", check=False, timeout=180)
    assert told.returncode == code, told.stdout + told.stderr
    return told.stdout


@pytest.fixture(scope="module")
def clients() -> Iterator[Clients]:
    with Lab() as lab:
        made = four(lab)
        made.connect()
        yield made


def test_a_part_of_the_sessions_and_then_all_of_them_are_drained(clients: Clients) -> None:
    gw1, gw2 = clients.topology.gw1, clients.topology.gw2
    everybody = {host.name for host in clients.all}
    told = follow(gw1, "Draining a gateway 2")
    assert f"done: 2 of 2 sessions wanted moved to {gw2.address}" in told
    assert "this gateway had 4" in told
    assert len(clients.at(gw2)) == 2
    assert clients.at(gw1) == everybody - clients.at(gw2)
    # one has no sidecar
    assert "done: 1 of 2 sessions wanted moved to any" in follow(gw1, "Draining a gateway 3", code=1)
    assert clients.at(gw2) == everybody - {"plain"}
    assert all(host.ping(SITE) == 3 for host in clients.all)


def test_a_prometheus_has_the_example_the_alerts_and_a_gateway(clients: Clients, tmp_path: Path) -> None:
    gw1 = clients.topology.gw1
    files, shared = tmp_path / "etc", tmp_path / "share"
    for folder in (files, shared):
        folder.mkdir()
    (shared / "monitoring").symlink_to(ROOT / "monitoring")
    # its own, as the files of another host have the machine's
    gw1.run("mount", "--bind", str(files), "/etc/prometheus")
    default = "global: {}"
    (files / "prometheus.yml").write_text(default)
    with (tmp_path / "log").open("w") as log:
        prometheus = gw1.popen(
            "prometheus",
            "--config.file=/etc/prometheus/prometheus.yml",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            "--web.listen-address=127.0.0.1:9090",
            stdout=log,
            stderr=log,
        )
    # the package has its configuration, and its unit does this to reload
    standing_in(
        tmp_path / "bin",
        {
            "apt-get install prometheus": f"echo '{default}' >/etc/prometheus/prometheus.yml",
            "systemctl reload prometheus": f"kill -HUP {prometheus.pid}",
        },
    )
    try:
        ready = ("promtool", "query", "instant", "http://127.0.0.1:9090", "vector(1)")
        wait_until(lambda: gw1.run(*ready, check=False).returncode == 0, "a Prometheus, as apt starts it", 120)
        command = BLOCKS["Order of the roll-out 5"].replace(SHARED, f"{shared}/")
        assert "SUCCESS" in gw1.run("sh", "-euc", f"PATH={tmp_path / 'bin'}:$PATH\n{command}").stdout
        query = ("promtool", "query", "instant", "http://127.0.0.1:9090", 'up{role="gateway"} == 1')
        wait_until(lambda: "127.0.0.1:9470" in gw1.run(*query, check=False).stdout, "the gateway, scraped", 120)
        answer = gw1.run(sys.executable, "-c", GET, "http://127.0.0.1:9090/api/v1/rules").stdout
    finally:
        prometheus.terminate()
        prometheus.wait()
    loaded = {rule["name"] for group in json.loads(answer)["data"]["groups"] for rule in group["rules"]}
    written = yaml.safe_load((ROOT / "monitoring/ike-sa-sync.rules.yml").read_text())
    alerts = {rule["alert"] for group in written["groups"] for rule in group["rules"] if "alert" in rule}
    assert alerts <= loaded
    assert len(alerts) > 10


def standing_in(folder: Path, commands: dict[str, str]) -> None:
    """Programs for a PATH that take one command line each, and do something else in its place."""
    folder.mkdir()
    for command, does in commands.items():
        name, _, arguments = command.partition(" ")
        (folder / name).write_text(f'#!/bin/sh -eu\n[ "$*" = "{arguments}" ]\n{does}\n')
        (folder / name).chmod(0o755)


@pytest.fixture(scope="module")
def cable() -> Iterator[Wire]:
    with wire() as made:
        yield made


def test_the_chains_of_a_killed_sidecar_are_removed_by_hand(cable: Wire) -> None:
    rules = queue_rules.rules(4510, tag=b"\x7f\xa5")
    with inside(cable.host.namespace):
        for tool in ("iptables", "ip6tables"):
            # of an operator
            run(tool, "-t", "security", "-A", "INPUT", "-p", "udp", "--dport", "7", "-j", "DROP")
        before = saved()
        firewall.install(rules, backend="iptables")
        assert all(saved().count(f":{chain} ") == 2 for chain in rules.chains)
        run("sh", "-euc", BLOCKS["Rolling back 5"])
        assert saved() == before


def saved() -> str:
    """The rules of the table, of both families."""
    lists = "".join(run(tool, "-t", "security") for tool in ("iptables-save", "ip6tables-save"))
    return "".join(line.split(" [")[0] + "\n" for line in lists.splitlines() if not line.startswith("#"))


def test_what_the_page_takes_from_the_package_is_in_it() -> None:
    installed = dict(line.split() for line in (ROOT / "debian/ike-sa-sync.install").read_text().splitlines())
    named = {word for block in BLOCKS.values() for word in block.split() if word.startswith(SHARED)}
    assert len(named) == 3
    for file in named:
        folder, _, rest = file.removeprefix(SHARED).partition("/")
        assert f"/{installed[folder]}/" == SHARED
        assert (ROOT / folder / rest).is_file()
