"""What the measurements say for a gateway of SESSIONS sessions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

SESSIONS = 10_000

Line = tuple[str, str, str]
"""what, how much, which benchmark measures it"""


def lines(results: Mapping[str, Mapping[str, Any]]) -> Iterator[Line]:
    """Those that these results answer."""
    grown = results.get("growth-long") or results.get("growth")
    if grown is not None:
        yield from _memory(grown)
    if "bank" in results:
        octets = results["bank"]["rows"][-1]["octets_per_stub"]
        yield "Redis, memory", f"{octets * SESSIONS / 1e6:.0f} MB on top of 10 MB", "bank"
    if "storm" in results:
        many = results["storm"]["storm"]
        parts = ", ".join(
            f"{name} {used['cpu_us_each'] * SESSIONS / 1e6:.1f}" for name, used in many["processes"].items()
        )
        seconds = SESSIONS / many["rate"]
        yield (
            "all resume together, CPU of the gateway",
            f"{many['cpu_us_each'] * SESSIONS / 1e6:.1f} s ({parts}), in {seconds:.1f} s on the cores above",
            "storm",
        )
    if "handshake-vs-resume" in results:
        for name, rows in results["handshake-vs-resume"]["clients"].items():
            if not rows[0]["answer_p50_ms"]:
                seconds = rows[0]["cpu_ms"] * SESSIONS / 1000
                yield f"all shake hands instead, {name}, CPU of the gateway", f"{seconds:.0f} s", "handshake-vs-resume"


def _memory(grown: Mapping[str, Any]) -> Iterator[Line]:
    first, last = grown["rows"][0], grown["rows"][-1]
    for name, title in (("charon", "charon, memory"), ("sidecar", "the sidecar, memory")):
        low, high = (row["processes"][name]["rss_mb"] for row in (first, last))
        each = (high - low) / (last["sas"] - first["sas"])
        rest = low - each * (first["sas"] + grown["sample"])
        yield title, f"{each * SESSIONS:.0f} MB on top of {rest:.0f} MB", "growth"
