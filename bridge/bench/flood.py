"""`bench flood`: a client resumes, again and again, while its target gateway is flooded; and others shake hands."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from bridge.bench.generator import CLIENTS
from bridge.bench.plot import bars
from bridge.bench.usage import cpu_seconds, memory_octets, quantile
from bridge.bench.visitor import handshakes
from bridge.lab.daemon import wait_until
from bridge.lab.host import Host
from bridge.lab.lab import Lab
from bridge.lab.topology import Topology, client_host, standard
from bridge.net.packet import PORT_NAT_T
from bridge.service import control
from bridge.stub import bank_keys

ADDRESS = "192.168.50.30"
VISITOR = "192.168.50.40"
REST = 0.1
"""seconds between two moves: a legitimate client is no flood of its own"""
PATIENCE = 60.0
"""seconds for a stub or an answer on a machine that is flooded"""

Moves = list[dict[str, Any]]


class Flood:
    """The standard lab, with a host that floods, and one whose charon shakes hands and has no sidecar."""

    def __init__(self, topology: Topology, source: Host, visitor: Host) -> None:
        self.topology = topology
        self._source = source
        self.visitor = visitor

    @property
    def target(self) -> Host:
        return self.topology.gw2

    def counters(self) -> dict[str, float]:
        """What the target's sidecar counts."""
        result = self._ask(self.target, self.topology.gateways["gw2"].config["control"], {"command": "status"})
        return dict(result["counters"])

    def _ask(self, host: Host, socket: str, request: dict[str, Any]) -> dict[str, Any]:
        return asyncio.run(control.call(str(host.path(socket)), request))

    def move(self, to: Host) -> dict[str, Any]:
        """Have the client resume at a gateway, once the bank has its stub; the outcome as `resume --json` prints it."""
        topology = self.topology
        [sa] = [sa for sa in topology.client.charon.sas() if sa["state"] == "ESTABLISHED"]
        spi = sa["responder-spi"]
        key = bank_keys.stub_key(sa["remote-host"], bytes.fromhex(spi))
        wait_until(lambda: topology.bank.cli("EXISTS", key) == "1", "the stub", PATIENCE)
        request = {"command": "resume", "connection": None, "to": to.address}
        return self._ask(topology.client, topology.agent.config["control"], request)

    def moves(self, enough: Callable[[Moves], bool]) -> Moves:
        """To the target and back, until `enough`; the moves to the target."""
        there: Moves = []
        while not enough(there):
            time.sleep(REST)
            there.append(self.move(self.target))
            time.sleep(REST)
            self.move(self.topology.gw1)
        return there

    @contextlib.contextmanager
    def going_on(self, rate: int, seconds: float) -> Iterator[Callable[[], dict[str, Any] | None]]:
        """While the flood goes on. Gives a function that returns what was sent once it has ended, None before."""
        words = ("-m", "bridge.bench.spray", self.target.address, str(PORT_NAT_T), str(rate), str(seconds))
        process = subprocess.Popen(
            self._source.enter(sys.executable, *words),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self._source.environment(),
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        result: dict[str, Any] = {}
        try:
            process.stdout.readline()
            process.stdin.write("\n")
            process.stdin.flush()
            yield lambda: result or _end_of(process, result)
        finally:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()


def _end_of(process: subprocess.Popen[str], result: dict[str, Any]) -> dict[str, Any] | None:
    if process.poll() is None:
        return None
    assert process.stdout is not None
    result.update(json.loads(process.stdout.read()))
    return result


@contextlib.contextmanager
def flood_lab() -> Iterator[Flood]:
    """The lab, up, with a session of the client at gw1."""
    with Lab() as lab:
        topology = standard(lab, start=False)
        source = lab.add_host("source", f"{ADDRESS}/24")
        # answers to addresses that no host has
        source.run("ip", "route", "add", "blackhole", CLIENTS)
        visitor = client_host(lab, "visitor", VISITOR, topology.secret)
        for gateway in (topology.gw1, topology.gw2):
            gateway.run("ip", "route", "add", CLIENTS, "via", ADDRESS)
            # a log of every packet that goes on to charon would be part of what is measured
            gateway.charon.settings["charon.filelog.lab.default"] = 0
        topology.start()
        visitor.charon.start()
        topology.connect()
        yield Flood(topology, source, visitor)


def measure(flood: Flood, rate: int, seconds: float, quiet_moves: int) -> dict[str, Any]:
    """Moves without and with a flood of `rate` requests a second for so many seconds, and handshakes meanwhile."""
    quiet = flood.moves(lambda moves: len(moves) >= quiet_moves)
    pid = flood.topology.gateways["gw2"].pid
    before, memory, cpu = flood.counters(), memory_octets(pid), cpu_seconds(pid)
    over = threading.Event()
    shaken: list[float] = []
    visitor = threading.Thread(target=handshakes, args=(flood.visitor, over, shaken))
    with flood.going_on(rate, seconds) as end:
        visitor.start()
        try:
            flooded = flood.moves(lambda _: end() is not None)
        finally:
            over.set()
            visitor.join()
        sent = end()
    peak, used = memory_octets(pid), cpu_seconds(pid) - cpu
    wait_until(lambda: flood.counters()["nfqueue_waiting"] == 0, "an empty queue", PATIENCE)
    after = flood.counters()
    # whatever began while the flood went on counts, but for the last, which it may have outlived
    return {
        "sent": sent,
        "quiet": _summary(quiet),
        "flooded": _summary(flooded[:-1] or flooded),
        "handshakes": {"count": len(shaken), "ms": round(quantile(shaken, 0.5) * 1000, 1)},
        "sidecar": {
            "cpu_s": round(used, 2),
            "rss_mb_before": round(memory / 1e6, 1),
            "rss_mb_after": round(peak / 1e6, 1),
        },
        "counters": {name: value - before.get(name, 0) for name, value in after.items()},
    }


def _summary(moves: Moves) -> dict[str, Any]:
    exchanges = [move["exchange_ms"] for move in moves if move["exchange_ms"] is not None]
    return {
        "moves": len(moves),
        "resumed": sum(move["result"] == "resumed" for move in moves),
        "failed": sum(move["result"] == "failed" for move in moves),
        "exchange_ms": quantile(exchanges, 0.5),
        "total_ms": quantile([move["total_ms"] for move in moves if move["total_ms"] is not None], 0.5),
    }


def section(result: dict[str, Any]) -> tuple[str, str]:
    """Text and plot for docs/performance.md."""
    quiet, flooded, sent, sidecar = result["quiet"], result["flooded"], result["sent"], result["sidecar"]
    rows = [
        ["resumed", *(f"{each['resumed']} of {each['moves']}" for each in (quiet, flooded))],
        ["answer, median", *(f"{each['exchange_ms']:.1f} ms" for each in (quiet, flooded))],
        ["tunnel, median", *(f"{each['total_ms']:.1f} ms" for each in (quiet, flooded))],
        ["the sidecar's memory", f"{sidecar['rss_mb_before']} MB", f"{sidecar['rss_mb_after']} MB"],
    ]
    lines = ["| | quiet | flood |", "|---|---|---|", *("| " + " | ".join(row) + " |" for row in rows)]
    text = (
        "## A flood\n\n"
        f"{sent['sent']:,} well-formed requests with IKE_SA_SYNC from made-up addresses in {sent['seconds']:.1f} s "
        f"({sent['sent'] / sent['seconds']:,.0f} a second); the sidecar saw "
        f"{result['counters']['requests_total']:,.0f} of them, for {sidecar['cpu_s']} s of CPU. Meanwhile a real "
        f"client resumes again and again, and another one shook hands {result['handshakes']['count']} times, in "
        f"{result['handshakes']['ms']} ms (median).\n\n" + "\n".join(lines) + "\n\n![flood](bench/flood.svg)\n"
    )
    plot = bars(
        "A flood: until the tunnel is up",
        "ms",
        [("quiet", [quiet["total_ms"]]), ("flood", [flooded["total_ms"]])],
    )
    return text, plot
