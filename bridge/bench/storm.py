"""`bench storm` and `bench growth`: many sessions resume at one gateway, and a gateway that fills."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any

from bridge.bench.rig import Rig
from bridge.bench.sessions import Children
from bridge.bench.usage import Meter, quantile

SETTLE_SECONDS = 0.4
"""after the last session, for stubs still on their way to the bank: they are part of the price"""
FILL_BUNDLE = 2000
THICK_SECONDS = 0.5
"""from the first simulated client of a storm to the real ones"""
SEGMENTS = 16
"""of charon's SAs, in the lab"""
Counters = Mapping[str, float]
NOTHING: Counters = MappingProxyType({})
Progress = Callable[[str, float], None]
"""what is done, and how much of it, 0 to 1"""


def resumptions(
    rig: Rig,
    count: int,
    window: int,
    children: Children = Children.NONE,
    idle: Counters = NOTHING,
    *,
    forward_secrecy: bool = False,
    every: float = 0.0,
) -> dict[str, Any]:
    """Resume `count` new sessions, at most `window` at a time, one `every` so many seconds; what it took. `idle` is the
    CPU to take off that each process uses anyhow, in seconds a second."""
    rig.order("make", count)
    # so that the bank is done with the new stubs
    rig.order("idle", SETTLE_SECONDS)
    meter = rig.meter()
    order = {
        "window": window,
        "count": count,
        "children": children,
        "forward_secrecy": forward_secrecy,
        "every": every,
    }
    outcome = rig.order("storm", order)
    rig.order("idle", SETTLE_SECONDS)
    return _summary(outcome, meter, idle)


def _summary(outcome: dict[str, Any], meter: Meter, idle: Counters) -> dict[str, Any]:
    confirmed = outcome["confirmed"]
    each = max(confirmed, 1)
    seen = {
        name: used | {"cpu_s": max(used["cpu_s"] - idle.get(name, 0.0) * meter.seconds, 0.0)}
        for name, used in meter.read().items()
    }
    processes = {
        name: {
            "cpu_s": round(used["cpu_s"], 3),
            "cpu_us_each": round(used["cpu_s"] * 1e6 / each, 1),
            "rss_mb": round(used["rss_mb"], 1),
        }
        for name, used in seen.items()
    }
    return {
        "sessions": outcome["sessions"],
        "window": outcome["window"],
        "failures": outcome["sessions"] - confirmed,
        "unproven": outcome["unproven"],
        "retransmitted": outcome["retransmitted"],
        "seconds": round(outcome["seconds"], 3),
        "rate": round(confirmed / outcome["seconds"], 1) if outcome["seconds"] else 0.0,
        "answer_ms": _quantiles(outcome["answered_ms"]),
        "confirmed_ms": _quantiles(outcome["confirmed_ms"]),
        "cpu_us_each": round(sum(process["cpu_us_each"] for process in processes.values()), 1),
        "processes": processes,
        "generator_cpu_us_each": round(outcome["generator_cpu_s"] * 1e6 / each, 1),
    }


def _quantiles(values: list[float]) -> dict[str, float]:
    return {
        "p50": round(quantile(values, 0.5), 3),
        "p90": round(quantile(values, 0.9), 3),
        "p99": round(quantile(values, 0.99), 3),
        "max": round(max(values, default=0.0), 3),
    }


def storm(rig: Rig, sessions: int, window: int, progress: Progress) -> dict[str, Any]:
    """A gateway with `sessions` sessions dies, and all its clients come."""
    rig.kill_first_gateway()
    progress("one at a time", 0.0)
    alone = resumptions(rig, 12, 1)
    progress("the storm", 0.1)
    with ThreadPoolExecutor(1) as beside:
        resumed = beside.submit(_in_the_thick_of_it, rig)
        many = resumptions(rig, sessions, window)
        outcomes = resumed.result()
    return {"alone": alone, "storm": many, "clients": _clients(rig, outcomes)}


def _in_the_thick_of_it(rig: Rig) -> list[dict[str, Any]]:
    time.sleep(THICK_SECONDS)
    return rig.clients.resume()


def _clients(rig: Rig, outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """What became of the real clients that were in the storm."""
    resumed = [outcome for outcome in outcomes if outcome["result"] == "resumed"]
    return {
        "clients": len(outcomes),
        "resumed": len(resumed),
        "failures": sum(outcome["result"] == "failed" for outcome in outcomes),
        "reasons": dict(Counter(outcome["reason"] for outcome in outcomes if outcome["reason"])),
        "answer_ms": _quantiles([outcome["exchange_ms"] for outcome in resumed]),
        "tunnel_ms": _quantiles([outcome["total_ms"] for outcome in resumed]),
        **rig.clients.traffic(),
    }


def growth(rig: Rig, sizes: list[int], sample: int, window: int, progress: Progress) -> dict[str, Any]:
    """The price of `sample` resumptions with `sizes` SAs in charon already, each with its stub in the bank, all of
    them come there by resumption."""
    rig.kill_first_gateway()
    present = 0
    rows = []
    progress("warming up", 0.0)
    # what so many requests together need is not for the SAs that they leave behind
    resumptions(rig, window, window)
    rig.order("end", None)
    before = rig.meter().read()["sidecar"]["rss_mb"]
    for size in sizes:
        counted, began = rig.counters(), time.monotonic()
        fill(rig, present, size, window, lambda there: progress(f"{there} SAs", there / sizes[-1]))
        present = max(present, size)
        result = resumptions(rig, sample, window)
        activations = _activations(counted, rig.counters(), time.monotonic() - began)
        octets = (result["processes"]["sidecar"]["rss_mb"] - before) * 1e6 / (size + sample)
        rows.append({"sas": size, **activations, **result, "sidecar_octets_per_sa": round(octets)})
        present += sample
    return {"rows": rows, "sample": sample, "window": window}


def fill(rig: Rig, present: int, size: int, window: int, progress: Callable[[int], None]) -> None:
    """Have charon, which has `present` SAs, have `size`. Raises RuntimeError."""
    while present < size:
        bundle = min(FILL_BUNDLE, size - present)
        rig.order("make", bundle)
        outcome = rig.order("storm", {"window": window, "count": bundle, "children": Children.NONE})
        if outcome["confirmed"] != bundle:
            counted = {name: value for name, value in rig.counters().items() if value}
            raise RuntimeError(
                f"{bundle - outcome['confirmed']} of {bundle} resumptions failed with {present} SAs there: "
                f"{outcome['states']}, answers ignored {outcome['unproven']}; the gateway counts {counted}"
            )
        present += bundle
        progress(present)
    # what the last ones left to do is not of what follows
    rig.order("idle", 3.0)


def one_by_one(
    rig: Rig, sizes: Sequence[int], count: int, every: float, window: int, idle: Counters, progress: Progress
) -> list[dict[str, Any]]:
    """The price of `count` sessions that come one `every` so many seconds, to a charon with `sizes` SAs. `window`: how
    many of those come at a time."""
    rows, present = [], 0
    for size in sizes:
        fill(rig, present, size, window, lambda there: progress(f"{there} SAs", there / sizes[-1]))
        rows.append({"sas": size, **resumptions(rig, count, count, idle=idle, every=every)})
        present = max(present, size) + count
    rig.order("end", None)
    return rows


def _activations(before: Counters, after: Counters, seconds: float) -> dict[str, float]:
    """What activations cost running SAs within `seconds`: those of one segment of SEGMENTS do not answer while its
    activation lasts."""
    count = after["activation_seconds_count"] - before["activation_seconds_count"]
    took = after["activation_seconds_sum"] - before["activation_seconds_sum"]
    return {
        "activations": count,
        "activation_ms": round(took / max(count, 1) * 1000, 2),
        "unprocessed_percent": round(took / SEGMENTS / seconds * 100, 2) if seconds else 0.0,
    }
