"""A failover as it is seen in the bank: by redis-cli, and by `ike-sa-sync monitor` on the bank's host."""

from __future__ import annotations

import csv
import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bridge.lab import Topology
from bridge.lab.daemon import wait_until
from bridge.lab.host import Host
from bridge.lab.sidecar import program
from failover_support import beats, connect, fresh, resume, stub_key

pytestmark = pytest.mark.lab


@contextmanager
def running(host: Host, file: Path, *command: str) -> Iterator[None]:
    """A command on a host for the time of the body, its output in `file`."""
    with file.open("w") as output:
        process = host.popen(*command, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield
        finally:
            process.kill()
            process.wait()


def test_redis_cli_shows_a_failover_as_it_happens(topology: Topology, tmp_path: Path) -> None:
    fresh(topology)
    output = tmp_path / "events"
    pattern = "__keyspace@0__:ike:*"
    with running(topology.bank.host, output, "redis-cli", "--csv", "psubscribe", pattern):
        wait_until(lambda: "psubscribe" in output.read_text(), "the subscription")

        def events() -> list[tuple[str, str]]:
            rows = [row for row in csv.reader(output.read_text().splitlines()) if row and row[0] == "pmessage"]
            return [(key.partition("__:")[2], event) for _, _, key, event in rows]

        before = connect(topology)
        old = stub_key(topology.gw1.address, before["responder-spi"])
        wait_until(lambda: (old, "hset") in events(), "the stub")
        beats(topology, topology.gw1)
        topology.kill_gateway(topology.gw1)
        outcome = resume(topology)
        new = stub_key(topology.gw2.address, outcome["spi_r"])
        wait_until(lambda: (old, "del") in events() and (new, "hset") in events(), "the stub's move")
        heartbeat = f"ike:gateway:{topology.gw1.address}"
        wait_until(lambda: (heartbeat, "expired") in events(), "the end of the gateway's heartbeat", timeout=60)


def test_the_monitor_shows_a_failover_as_it_happens_with_its_resumption(topology: Topology, tmp_path: Path) -> None:
    fresh(topology)
    host, output = topology.bank.host, tmp_path / "lines"
    host.write("/etc/monitor.yaml", f"bank: {{url: {topology.bank.url}}}\n")
    with running(host, output, *program(), "monitor", "--json", "-c", "/etc/monitor.yaml"):

        def told(**wanted: Any) -> bool:
            lines = [json.loads(line) for line in output.read_text().splitlines() if line.endswith("}")]
            return any(wanted.items() <= line.items() for line in lines)

        wait_until(lambda: told(kind="bank", event="reachable"), "the monitor")
        before = connect(topology)
        beats(topology, topology.gw1)
        topology.kill_gateway(topology.gw1)
        outcome = resume(topology)
        wait_until(lambda: told(kind="stub", event="deleted", spi=before["responder-spi"]), "the old stub's end")
        wait_until(lambda: told(kind="stub", event="stored", spi=outcome["spi_r"]), "the new stub")
        wait_until(lambda: told(event="failed", gateway=topology.gw1.address), "the gateway's failure", timeout=60)

        def resumed() -> bool:
            lines = [json.loads(line) for line in output.read_text().splitlines() if line.endswith("}")]
            rows = [row for line in lines if line["kind"] == "gateways" for row in line["gateways"]]
            return any(row["gateway"] == topology.gw2.address and row["resumed"] >= 1 for row in rows)

        wait_until(resumed, "the resumption in gw2's row")
