"""`bench outage`: how long clients are without traffic when their gateway fails, stops, or only seems to fail."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from bridge.bank.failover_progress import RUNNING, FailoverProgress, decode
from bridge.bench.plot import bars
from bridge.bench.rig import Rig, wait_stored
from bridge.bench.usage import quantile
from bridge.bench.visitor import handshakes
from bridge.lab.daemon import wait_until
from bridge.lab.space import LabError
from bridge.lab.topology import Topology
from bridge.stub import bank_keys

NEVER = "192.168.50.9"
"""a gateway that never was: the generated sessions begin as its stubs"""
WINDOW = 512
"""sessions that begin at a time"""
ROUNDS = 5
"""attempts to begin what a busy machine did not begin in time"""
LIMIT = 90.0
"""seconds in which all sessions have to be back"""
QUIET_SECONDS = 3.0
"""of handshakes before the failure, to compare with"""
WATCHED_SECONDS = 6.0
"""after a false alarm, for what would follow"""
CUT_SECONDS = 6.0
"""that a gateway is cut off from the bank"""
SETTLED_SECONDS = 15.0
"""for announcements that no client answered to end"""
STOPPED_SECONDS = 10.0
STALLED_SECONDS = 2.0
PATIENCE = 120.0
"""seconds for the stubs of all sessions to be in the bank"""
RESTART_SECONDS = 0.1
"""as systemd waits (RestartSec)"""
DETECT: Final = 1.0
SHORT_DETECT: Final = 0.3

NOT_SERVED: Final = ("refusals_total", "nfqueue_bypassed", "nfqueue_drops", "nfqueue_metered", "event_loop_stalls")
"""of the other gateway's counters: requests that were not served, and why"""

Progress = Callable[[str, float], None]


def _killed(topology: Topology) -> None:
    topology.kill_gateway(topology.gw1)


def _charon_killed(topology: Topology) -> None:
    topology.gw1.charon.crash()


def _charon_restarted(topology: Topology) -> None:
    """As systemd does with a charon that crashed."""
    topology.gw1.charon.crash()
    time.sleep(RESTART_SECONDS)
    topology.gw1.charon.start()


def _powered_off(topology: Topology) -> None:
    for interface in topology.gw1.interfaces():
        topology.lab.unplug(topology.gw1, interface)


def _stopped(topology: Topology) -> None:
    topology.gateways["gw1"].command("drain", "--on-stop", timeout=PATIENCE)
    topology.gw1.charon.stop()


STOPPED: Final = "systemctl stop"
FAILURES: Final[Mapping[str, Callable[[Topology], None]]] = {
    "charon and sidecar killed": _killed,
    "charon killed": _charon_killed,
    "charon killed and restarted": _charon_restarted,
    "power off": _powered_off,
    STOPPED: _stopped,
}


def _bank_stopped(topology: Topology, seconds: float) -> None:
    os.kill(topology.bank.pid, signal.SIGSTOP)
    time.sleep(seconds)
    os.kill(topology.bank.pid, signal.SIGCONT)


def _cut_from_the_bank(topology: Topology) -> None:
    rules = (("INPUT", "-s"), ("OUTPUT", "-d"))
    for chain, flag in rules:
        topology.gw1.run("iptables", "-I", chain, flag, topology.bank.host.address, "-j", "DROP")
    time.sleep(CUT_SECONDS)
    for chain, flag in rules:
        topology.gw1.run("iptables", "-D", chain, flag, topology.bank.host.address, "-j", "DROP")


FALSE_ALARMS: Final[Mapping[str, Callable[[Topology], None]]] = {
    f"bank stands still for {STOPPED_SECONDS:.0f} s": lambda topology: _bank_stopped(topology, STOPPED_SECONDS),
    f"gateway cut off from the bank for {CUT_SECONDS:.0f} s": _cut_from_the_bank,
    f"Redis stalls for {STALLED_SECONDS:.0f} s": lambda topology: _bank_stopped(topology, STALLED_SECONDS),
}


ALARMS: Final = "false alarms"
"""all of them, beside the failures"""


def fill(rig: Rig, sessions: int) -> None:
    """Have so many generated sessions at gw1, all of them with their stubs in the bank."""
    gw1 = rig.topology.gw1.address
    missing = sessions
    for _ in range(ROUNDS):
        rig.order("make_at", [NEVER, missing])
        missing -= rig.order("stand_by", [gw1, missing, WINDOW])["confirmed"]
        if not missing:
            break
    else:
        raise LabError(f"{missing} of {sessions} sessions did not begin")
    wait_stored(rig.topology, sessions, PATIENCE)


def failure(rig: Rig, kind: str, sessions: int, told: Progress) -> dict[str, Any]:
    """gw1 fails in one of the ways of FAILURES."""
    told(f"{kind}: sessions begin", 0.0)
    fill(rig, sessions)
    quiet = _handshakes_for(rig, QUIET_SECONDS)
    if rig.clients.at(rig.topology.gw1) < len(rig.clients.sessions()):
        raise LabError("clients have left the gateway before it failed: this machine is too busy for failover.detect")
    shaken: list[float] = []
    before, meter = _counters(rig), rig.meter()
    over = threading.Event()
    visitor = threading.Thread(target=handshakes, args=(rig.visitor, over, shaken))
    with ThreadPoolExecutor(1) as beside:
        generated = beside.submit(rig.order, "outage", LIMIT, lambda share: told(kind, share))
        visitor.start()
        try:
            began, wall = time.monotonic(), time.time()
            FAILURES[kind](rig.topology)
            took = time.monotonic() - began
            outcome = generated.result()
        finally:
            over.set()
            visitor.join()
    told(f"{kind}: clients with traffic again", 1.0)
    clients = rig.clients.after(wall)
    used = meter.read()
    counted = {name: value - before.get(name, 0.0) for name, value in _counters(rig).items()}
    moved = len(outcome["confirmed"])
    since = outcome["asked"] if kind == STOPPED else [began] * moved
    silences = [(there - gone) * 1000 for there, gone in zip(outcome["confirmed"], since, strict=True)]
    requests = max(counted["requests_total"], 1.0)
    return {
        "kind": kind,
        "sessions": sessions,
        "moved": moved,
        "failures": sessions - moved,
        "seconds": round(max(outcome["confirmed"], default=began) - began, 2),
        "took": round(took, 2),
        "announced_ms": _quantiles([(at - began) * 1000 for at in outcome["announced"]]),
        "answer_ms": _quantiles(outcome["answer_ms"]),
        "silence_ms": _quantiles(silences),
        "clients": clients,
        "handshakes": {
            "quiet": len(quiet),
            "quiet_ms": round(quantile(quiet, 0.5) * 1000, 1),
            "count": len(shaken),
            "ms": round(quantile(shaken, 0.5) * 1000, 1),
            "p90_ms": round(quantile(shaken, 0.9) * 1000, 1),
        },
        "sent_twice": outcome["retransmitted"],
        "sent_twice_percent": round(100 * outcome["retransmitted"] / requests, 2),
        "unproven": outcome["unproven"],
        "not_served": {name: value for name, value in counted.items() if value and name.startswith(NOT_SERVED)},
        "failover": _failover(rig),
        "drain": rig.topology.gateways["gw1"].ask("drained") if kind == STOPPED else None,
        "cpu_s": {name: round(each["cpu_s"], 2) for name, each in used.items()}
        | {"load generator": round(outcome["generator_cpu_s"], 2)},
        "rss_mb": {name: round(each["rss_mb"], 1) for name, each in used.items()},
    }


def false_alarms(rig: Rig, sessions: int, told: Progress) -> list[dict[str, Any]]:
    """What looks like a failure of gw1, and is none."""
    told("false alarms: sessions begin", 0.0)
    fill(rig, sessions)
    rows = []
    for number, (what, happens) in enumerate(FALSE_ALARMS.items()):
        told(what, number / len(FALSE_ALARMS))
        seen, before = rig.clients.sessions(), _counters(rig)
        with ThreadPoolExecutor(1) as beside:
            wall = time.time()
            happening = beside.submit(happens, rig.topology)
            # the generator answers as long as anything may come
            outcome = rig.order("outage", max(STOPPED_SECONDS, CUT_SECONDS) + WATCHED_SECONDS)
            happening.result()
        counted = {name: value - before.get(name, 0.0) for name, value in _counters(rig).items()}
        changed = sum(one != other for one, other in zip(seen, rig.clients.sessions(), strict=True))
        rows.append(
            {
                "what": what,
                "moved": len(outcome["asked"]) + changed,
                "announced": len(outcome["announced"]),
                "contradicted": counted.get("announcements_false_alarms_total", 0.0),
                "silence_ms": rig.clients.longest_since(wall),
            }
        )
    return rows


def _handshakes_for(rig: Rig, seconds: float) -> list[float]:
    took: list[float] = []
    over = threading.Event()
    visitor = threading.Thread(target=handshakes, args=(rig.visitor, over, took))
    visitor.start()
    time.sleep(seconds)
    over.set()
    visitor.join()
    return took


def _counters(rig: Rig) -> dict[str, float]:
    return dict(rig.topology.gateways["gw2"].ask("counters")["counters"])


def _failover(rig: Rig) -> dict[str, Any]:
    """What gw2 says of the announcements, once they are over."""
    key = bank_keys.posted_key(bank_keys.FAILOVERS_KIND, rig.topology.gw2.address)

    def posted() -> list[FailoverProgress]:
        return decode(rig.topology.bank.cli("GET", key).encode())

    with contextlib.suppress(LabError):
        wait_until(
            lambda: all(one.state != RUNNING for one in posted()), "the end of the announcements", SETTLED_SECONDS
        )
    told = posted()
    names = ("announced", "resumed", "refused", "silent", "elsewhere", "seconds", "state")
    return {name: getattr(one, name) for one in told for name in names}


def _quantiles(values: list[float]) -> dict[str, float]:
    return {name: round(quantile(values, share), 1) for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))}


def section(result: dict[str, Any]) -> tuple[str, str]:
    """Text and plot for docs/performance.md."""
    rows = [*result["failures"], result["short"]]
    head = (
        "",
        "clients without traffic: median",
        "longest",
        "generated sessions resumed after: median",
        "99 %",
        "last",
        "not resumed",
        "sent twice",
        "handshake meanwhile",
    )
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        shaken = row["handshakes"]
        cells = (
            _named(row),
            f"{row['clients']['silence_ms']['p50'] / 1000:.2f} s",
            f"{row['clients']['silence_ms']['max'] / 1000:.2f} s",
            f"{row['silence_ms']['p50'] / 1000:.2f} s",
            f"{row['silence_ms']['p99'] / 1000:.2f} s",
            f"{row['seconds']:.1f} s",
            str(row["failures"] + row["clients"]["clients"] - row["clients"]["moved"]),
            f"{row['sent_twice_percent']} %",
            f"{shaken['ms']} ms ({shaken['quiet_ms']} ms before)",
        )
        lines.append("| " + " | ".join(cells) + " |")
    alarms = ["| | announced | sessions that moved | longest silence |", "|---|---|---|---|"]
    alarms += [
        f"| {row['what']} | {row['announced']} | {row['moved']} | {row['silence_ms'] / 1000:.2f} s |"
        for row in result["false alarms"]
    ]
    first = result["failures"][0]
    cpu = ", ".join(f"{name} {seconds} s" for name, seconds in first["cpu_s"].items())
    text = (
        "## An outage\n\n"
        f"A gateway with {first['sessions']:,} sessions of the load generator and {first['clients']['clients']} of "
        "real clients fails. The clients have charon's default timers (dpd_delay 30 s), `failover.detect` is 1 s, and "
        "each real client sends a packet through its tunnel every 10 ms. Generated sessions follow an announcement as "
        "a sidecar does. In an orderly stop they are up until they move: their time is that of the resumption.\n\n"
        + "\n".join(lines)
        + f"\n\nCPU of the other gateway until all were back, of the first row: {cpu}.\n\n"
        "What looks like a failure and is none, with as many sessions:\n\n" + "\n".join(alarms) + "\n\n"
        "![outage](bench/outage.svg)\n"
    )
    plot = bars(
        "Outage: real clients without traffic, median",
        "s",
        [(_named(row), [row["clients"]["silence_ms"]["p50"] / 1000]) for row in rows],
    )
    return text, plot


MARKERS: Final = ("<!-- bench outage -->\n", "<!-- end of bench outage -->\n")
"""in docs/failures.md, around what `bench report` writes"""


def in_failures(page: str, result: dict[str, Any], about: str) -> str:
    """docs/failures.md with the figures of a run; `about`: date and machine. Raises ValueError where the page lacks
    MARKERS."""
    first, last = page.index(MARKERS[0]) + len(MARKERS[0]), page.index(MARKERS[1])
    rows = [*result["failures"], result["short"]]
    lines = [
        f"{rows[0]['clients']['clients']} clients with charon's default timers and a packet every 10 ms, beside "
        f"{rows[0]['sessions']:,} sessions of the load generator. {about}",
        "",
        "| failure | clients without traffic: median | longest | 99 % of all sessions resumed after |",
        "|---|---|---|---|",
    ]
    for row in rows:
        silence = row["clients"]["silence_ms"]
        cells = (
            _named(row),
            *(f"{ms / 1000:.2f} s" for ms in (silence["p50"], silence["max"], row["silence_ms"]["p99"])),
        )
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "What looks like a failure and is none:",
        "",
        "| | sessions that moved | longest without traffic |",
        "|---|---|---|",
    ]
    lines += [
        f"| {row['what']} | {row['moved']} | {row['silence_ms'] / 1000:.2f} s |" for row in result["false alarms"]
    ]
    return page[:first] + "\n".join(lines) + "\n" + page[last:]


def line(row: Mapping[str, Any]) -> str:
    """One failure in short, while others are still measured."""
    clients, silence = row["clients"], row["silence_ms"]
    return (
        f"{_named(row)}: {clients['moved']} of {clients['clients']} clients after {clients['silence_ms']['p50']} ms "
        f"(median), {row['moved']} of {row['sessions']} sessions after {silence['p50']:.0f} ms (99 %: "
        f"{silence['p99']:.0f} ms), the last after {row['seconds']} s; {row['sent_twice_percent']} % of requests sent "
        "twice"
    )


def alarm_line(row: Mapping[str, Any]) -> str:
    """One false alarm in short."""
    return f"{row['what']}: {row['moved']} sessions moved, longest silence {row['silence_ms']} ms"


def _named(row: Mapping[str, Any]) -> str:
    return f"{row['kind']}, detect {row['detect']} s" if row["detect"] != DETECT else str(row["kind"])
