"""`bench takeover`: a gateway gets the address of one that failed, with thousands of ordinary clients' sessions. The
whole way with keepalived is in bridge.bench.vrrp."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from bridge.bench import vrrp
from bridge.bench.plot import bars
from bridge.bench.rig import Rig
from bridge.bench.storm import Progress, resumptions
from bridge.bench.usage import quantile
from bridge.lab.space import LabError
from bridge.service import control

SHARED: Final = vrrp.SHARED
LIMIT: Final = 600.0
"""seconds in which all sessions have to have new keys"""
ACTIVE: Final = 100
"""clients that send ESP meanwhile"""
POLL_SECONDS: Final = 0.5
WINDOW: Final = 256


def takeover(rig: Rig, sessions: int, told: Progress) -> dict[str, Any]:
    """gw1 dies, its address goes to gw2: from the command to the new keys of the last client. Then as many
    resumptions, up to a thousand, at the same gateway, to compare."""
    topology = rig.topology
    told("sessions are made up", 0.0)
    rig.order("own", [topology.gw1.address, sessions])
    rig.kill_first_gateway()
    topology.gw2.run("ip", "address", "add", f"{SHARED}/24", "dev", "eth0")
    for host in (rig.load, topology.gw2):
        host.run("ip", "neigh", "flush", "all")
    topology.gw2.run("arping", "-q", "-c", "1", "-U", "-I", "eth0", SHARED, check=False)
    meter = rig.meter()
    with ThreadPoolExecutor(1) as beside:
        answering = beside.submit(
            rig.order, "takeover", [SHARED, LIMIT, min(ACTIVE, sessions // 10)], lambda share: told("takeover", share)
        )
        began = time.monotonic()
        row = asyncio.run(_command(str(topology.gw2.path(topology.gateways["gw2"].config["control"]))))
        outcome = answering.result()
    used = meter.read()
    told("resumptions", 0.99)
    compared = min(sessions, 1000)
    resumed = resumptions(rig, compared, WINDOW)
    keyed = [(at - began) * 1000 for at in outcome["keyed"]]
    active = [(at - began) * 1000 for at in outcome["active"]]
    return {
        "sessions": sessions,
        "taken": row["taken"],
        "failures": sessions - len(keyed),
        "not_taken": row["not_taken"],
        "installed_s": row["seconds"],
        "seconds": round(max(keyed, default=0.0) / 1000, 2),
        "keyed_ms": _quantiles(keyed),
        "active_ms": _quantiles(active),
        "cpu_s": {name: round(each["cpu_s"], 2) for name, each in used.items()}
        | {"load generator": round(outcome["generator_cpu_s"], 2)},
        "cpu_us_each": round(sum(each["cpu_s"] for each in used.values()) * 1e6 / max(len(keyed), 1), 1),
        "rss_mb": {name: round(each["rss_mb"], 1) for name, each in used.items()},
        "resumptions": {"sessions": compared, "cpu_us_each": resumed["cpu_us_each"], "failures": resumed["failures"]},
    }


async def _command(socket: str) -> dict[str, Any]:
    """What `ike-sa-sync takeover` does, looking less often."""
    answer = await control.call(socket, {"command": "takeover", "address": SHARED})
    deadline = time.monotonic() + LIMIT
    while answer["state"] == "running":
        if time.monotonic() > deadline:
            raise LabError(f"the takeover did not end within {LIMIT:.0f} s: {answer}")
        await asyncio.sleep(POLL_SECONDS)
        answer = await control.call(socket, {"command": "takeover-progress", "address": SHARED})
    return answer


def _quantiles(values: list[float]) -> dict[str, float]:
    return {
        "first": round(min(values, default=0.0), 1),
        "p50": round(quantile(values, 0.5), 1),
        "p99": round(quantile(values, 0.99), 1),
        "last": round(max(values, default=0.0), 1),
    }


def section(result: dict[str, Any]) -> tuple[str, str]:
    """Text and plot for docs/performance.md."""
    rows = [("all clients", result["keyed_ms"]), ("clients that send ESP meanwhile", result["active_ms"])]
    lines = [
        "## A gateway gets the address of one that failed: takeover of ordinary clients",
        "",
        f"{result['sessions']:,} sessions, no sidecar at the clients; {result['failures']} without new keys. From the "
        "command to new keys of a client's CHILD_SA, in ms:",
        "",
        "| | first | median | 99 % | last |",
        "|---|---|---|---|---|",
        *(f"| {name} | {q['first']:,} | {q['p50']:,} | {q['p99']:,} | {q['last']:,} |" for name, q in rows),
        "",
        f"All IKE_SAs were installed after {result['installed_s']} s. CPU of the gateway for each session: "
        f"{result['cpu_us_each']:,} us ({_cpu(result)}); of a resumption at the same gateway afterwards: "
        f"{result['resumptions']['cpu_us_each']:,} us.",
        "",
        *vrrp.lines(result["vrrp"]),
        "",
        "![takeover](bench/takeover.svg)",
    ]
    plot = bars(
        f"Takeover: from the command to new keys, {result['sessions']:,} sessions, and keepalived",
        "s",
        [
            (f"{name}, {what}", [q[key] / 1000])
            for name, q in rows
            for what, key in (("median", "p50"), ("last", "last"))
        ]
        + [
            (f"keepalived: clients without traffic, {what}", [result["vrrp"]["silence_ms"][key] / 1000])
            for what, key in (("median", "p50"), ("longest", "max"))
        ],
    )
    return "\n".join(lines) + "\n", plot


def _cpu(result: dict[str, Any]) -> str:
    return ", ".join(f"{name} {seconds} s" for name, seconds in result["cpu_s"].items())
