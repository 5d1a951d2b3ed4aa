"""`bench handshake-vs-resume`: full handshakes and resumptions, in turn, at the same charon.

Of every distance (a delay on the cable) there are three clients, with a charon each and nothing of the benchmark's in
it: one that shakes hands, without a sidecar, and two that move from gw1 to gw2 and back, whose CHILD_SAs come up in the
round trip of the IKE_SA or by CREATE_CHILD_SA. What activation costs a resumption that has it for itself alone these
tell; what it costs where it is shared, many simulated clients in parallel.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bridge.bench.methods import METHODS, configure
from bridge.bench.rig import Rig
from bridge.bench.sessions import Children
from bridge.bench.storm import Progress, one_by_one, resumptions
from bridge.bench.usage import Meter, quantile
from bridge.lab.daemon import wait_until
from bridge.lab.host import Host
from bridge.lab.sidecar import Sidecar
from bridge.lab.space import LabError
from bridge.lab.topology import CHOICES, Topology, client_config, client_host
from bridge.service import control
from bridge.stub import bank_keys

DELAYS_MS = (0, 20, 100)
"""of the cable, each way"""
FIRST = 60
"""last octet of the first client's address"""
SETTLE_SECONDS = 0.15
"""for the stub to reach the bank: that is part of a session's price"""
IDLE_SECONDS = 3.0
PATIENCE = 20.0
TOGETHER = 90
"""simulated clients that resume in parallel: no more than are served without cookies as the sidecar is shipped"""
SIZES = (0, 1_000, 10_000)
"""SAs that charon has when simulated clients come alone"""
ONE_BY_ONE, EVERY_SECONDS = 60, 0.1
"""how many of them, and how far apart"""
FORWARD_SECRECY = "forward-secrecy"
"""an IKE_SA alone, with an exchange in the round trip; beside those of Children"""
RESUMPTIONS = {Children.AT_ONCE: "resumption, children in exchange", Children.CREATE: "resumption, CREATE_CHILD_SA"}


@dataclass
class Sample:
    """What was seen of one kind of session at one distance. Times in ms."""

    cpu: list[float] = field(default_factory=list)
    """charon, sidecar and bank of gw2"""
    answer: list[float] = field(default_factory=list)
    """from SYN to the answer accepted; none of a handshake"""
    tunnel: list[float] = field(default_factory=list)
    """until the CHILD_SA is up"""
    packets: list[int] = field(default_factory=list)
    """in and out at the client"""

    def row(self, delay_ms: int) -> dict[str, Any]:
        """For the report."""
        return {
            "delay_ms": delay_ms,
            "sessions": len(self.tunnel),
            # the distant ones come at the same time
            "cpu_ms": None if delay_ms else round(median(self.cpu), 3),
            "answer_p50_ms": round(quantile(self.answer, 0.5), 2),
            "answer_p99_ms": round(quantile(self.answer, 0.99), 2),
            "tunnel_p50_ms": round(quantile(self.tunnel, 0.5), 2),
            "tunnel_p99_ms": round(quantile(self.tunnel, 0.99), 2),
            "packets": round(median(self.packets)),
        }


class Gauge:
    """CPU of gw2 that sessions cause: what it uses without any is taken off."""

    def __init__(self, meter: Callable[[], Meter]) -> None:
        self._meter = meter
        idle = meter()
        time.sleep(IDLE_SECONDS)
        self.idle = {name: used["cpu_s"] / idle.seconds for name, used in idle.read().items()}
        """by process, in seconds a second"""

    def of(self, work: Callable[[], None]) -> float:
        """What `work` caused, in ms, the stub on its way to the bank included."""
        meter = self._meter()
        work()
        time.sleep(SETTLE_SECONDS)
        used = sum(each["cpu_s"] for each in meter.read().values())
        return (used - sum(self.idle.values()) * meter.seconds) * 1000


class Distance:
    """The clients at one distance."""

    def __init__(self, topology: Topology, delay_ms: int, first: int) -> None:
        self.delay_ms = delay_ms
        self.samples = {name: Sample() for name in (*METHODS, *RESUMPTIONS.values())}
        self._topology = topology
        lab, secret = topology.lab, topology.secret
        self.shaker = client_host(lab, f"shake{delay_ms}", f"192.168.50.{first}", secret)
        self.movers: dict[Children, tuple[Host, Sidecar]] = {}
        for number, form in enumerate(RESUMPTIONS, 1):
            host = client_host(lab, f"move{delay_ms}{form[0]}", f"192.168.50.{first + number}", secret)
            resume = {"children_at_once": form is Children.AT_ONCE}
            config = client_config(CHOICES) | {"resume_on_down": False, "resume": resume}
            self.movers[form] = host, host.sidecar("client", config)

    def start(self) -> None:
        """All up, those that move at gw1."""
        for host, sidecar in self.movers.values():
            sidecar.start(wait=False)
            host.charon.start()
        self.shaker.charon.start()
        for host in (self.shaker, *(host for host, _ in self.movers.values())):
            for gateway in (self._topology.gw1, self._topology.gw2):
                _know_each_other(host, gateway)
        for host, sidecar in self.movers.values():
            sidecar.wait_ready()
            host.charon.initiate("net", "home")
        if self.delay_ms:
            for host in (self.shaker, *(host for host, _ in self.movers.values())):
                self._topology.lab.delay(host, self.delay_ms / 1000)

    def round(self, gauge: Gauge) -> None:
        """One session of each kind."""
        for name, connection in METHODS.items():
            self._shake(name, connection, gauge)
        for form in RESUMPTIONS:
            self._move(form, gauge)

    def _shake(self, name: str, connection: str, gauge: Gauge) -> None:
        sample, vici = self.samples[name], self.shaker.charon.vici()
        before = _packets(self.shaker)

        def work() -> None:
            began = time.monotonic()
            for message in vici.initiate({"ike": connection, "child": "net", "loglevel": "-1"}):
                del message
            sample.tunnel.append((time.monotonic() - began) * 1000)

        sample.cpu.append(gauge.of(work))
        sample.packets.append(_packets(self.shaker) - before)
        for message in vici.terminate({"ike": connection, "force": "yes", "timeout": "2000", "loglevel": "-1"}):
            del message
        time.sleep(SETTLE_SECONDS)

    def _move(self, form: Children, gauge: Gauge) -> None:
        sample, (host, _) = self.samples[RESUMPTIONS[form]], self.movers[form]
        self._stub_is_there(host)
        before = _packets(host)

        def work() -> None:
            outcome = self._resume(form, self._topology.gw2)
            sample.answer.append(outcome["exchange_ms"])
            sample.tunnel.append(outcome["total_ms"])

        sample.cpu.append(gauge.of(work))
        sample.packets.append(_packets(host) - before)
        self._stub_is_there(host)
        self._resume(form, self._topology.gw1)
        time.sleep(SETTLE_SECONDS)

    def _stub_is_there(self, host: Host) -> None:
        [sa] = [sa for sa in host.charon.sas() if sa["state"] == "ESTABLISHED"]
        spi = sa["responder-spi"]
        key = bank_keys.stub_key(sa["remote-host"], bytes.fromhex(spi))
        wait_until(lambda: self._topology.bank.cli("EXISTS", key) == "1", "the stub", PATIENCE)

    def _resume(self, form: Children, to: Host) -> dict[str, Any]:
        host, sidecar = self.movers[form]
        request = {"command": "resume", "connection": None, "to": to.address}
        outcome = asyncio.run(control.call(str(host.path(sidecar.config["control"])), request))
        if outcome["result"] != "resumed" or not outcome["children"]:
            raise LabError(f"{host.name} did not resume at {to.name}: {outcome}")
        return dict(outcome)


def _know_each_other(one: Host, other: Host) -> None:
    """Have neither ask for the other's hardware address: that would be a round trip and two packets now and then."""
    for host, neighbour in ((one, other), (other, one)):
        [link] = json.loads(neighbour.run("ip", "-j", "link", "show", "eth0").stdout)
        words = (
            "neighbour",
            "replace",
            neighbour.address,
            "lladdr",
            link["address"],
            "dev",
            "eth0",
            "nud",
            "permanent",
        )
        host.run("ip", *words)


def _packets(host: Host) -> int:
    """Packets in and out of a host's eth0."""
    for line in Path(f"/proc/{host.pid}/net/dev").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name.strip() == "eth0":
            columns = rest.split()
            return int(columns[1]) + int(columns[9])
    return 0


def _distances(topology: Topology) -> list[Distance]:
    """The clients, all up."""
    distances = [Distance(topology, delay, FIRST + 3 * n) for n, delay in enumerate(DELAYS_MS)]
    configure(topology.gw2, [distance.shaker for distance in distances])
    topology.gw2.charon.load()
    for distance in distances:
        distance.start()
    return distances


def compare(rig: Rig, rounds: int, progress: Progress) -> dict[str, Any]:
    """`rounds` sessions of each kind, in turn. CPU is that of charon, sidecar and bank together, stub included."""
    distances = _distances(rig.topology)
    gauge = Gauge(rig.meter)
    near, far = distances[0], distances[1:]
    alone: list[dict[str, Any]] = []
    many: dict[str, list[dict[str, Any]]] = {form: [] for form in (Children.NONE, *RESUMPTIONS, FORWARD_SECRECY)}
    with ThreadPoolExecutor(len(far)) as beside:
        for number in range(rounds):
            progress(f"round {number + 1} of {rounds}", number / rounds)
            near.round(gauge)
            # their CPU is not of interest, and they wait most of the time
            list(beside.map(lambda distance: distance.round(gauge), far))
            alone.append(resumptions(rig, 12, 1, idle=gauge.idle))
            for form, seen in many.items():
                secret = form == FORWARD_SECRECY
                children = Children.NONE if secret else Children(form)
                seen.append(resumptions(rig, TOGETHER, TOGETHER, children, gauge.idle, forward_secrecy=secret))
                if failures := seen[-1]["failures"]:
                    raise LabError(f"{failures} of {TOGETHER} simulated clients did not resume, {form}: {seen[-1]}")
                rig.order("end", None)
    return {
        "delays_ms": [distance.delay_ms for distance in distances],
        "idle_cpu_ms_per_s": {name: round(share * 1000, 2) for name, share in gauge.idle.items()},
        "clients": {
            name: [distance.samples[name].row(distance.delay_ms) for distance in distances] for name in near.samples
        },
        "simulated alone": _mean(alone),
        "one by one": [
            {"sas": row["sas"], **_mean([row])}
            for row in one_by_one(rig, SIZES, ONE_BY_ONE, EVERY_SECONDS, TOGETHER, gauge.idle, progress)
        ],
        "simulated together": {form: _mean(rows) for form, rows in many.items()},
        "together": TOGETHER,
    }


def _mean(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "sessions": sum(row["sessions"] for row in rows),
        "failures": sum(row["failures"] for row in rows),
        "cpu_ms": round(median(row["cpu_us_each"] for row in rows) / 1000, 3),
        "p50_ms": round(median(row["answer_ms"]["p50"] for row in rows), 2),
        "p99_ms": round(max(row["answer_ms"]["p99"] for row in rows), 2),
        "confirmed_p50_ms": round(median(row["confirmed_ms"]["p50"] for row in rows), 2),
        "confirmed_p99_ms": round(max(row["confirmed_ms"]["p99"] for row in rows), 2),
        "by_process_ms": {
            name: round(median(row["processes"][name]["cpu_us_each"] for row in rows) / 1000, 3)
            for name in rows[0]["processes"]
        },
    }
