"""What was aimed at, beside what the benchmarks measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bridge.bench.sessions import Children

BANK_STUBS = 100_000
"""the size of the bank that its aims are about"""
BANK_RATES = {"Initiate": 20_000, "GET": 8_000, "Download": 50_000}
"""what is aimed at there, a second"""
BANK_GROWTH = 0.2
"""by which a larger bank may be worse"""

Reports = Mapping[str, Mapping[str, Any]]
"""results by benchmark"""


class Aim(NamedTuple):
    """One of them; `met` says whether `measured` is as `wanted`."""

    what: str
    wanted: str
    measured: str
    met: bool


def aims(results: Reports) -> Iterator[Aim]:
    """Those that these results answer."""
    if "handshake-vs-resume" in results:
        yield from _resumption(results["handshake-vs-resume"])
    if "storm" in results:
        many = results["storm"]["storm"]
        yield Aim("storm: failures", "0", str(many["failures"]), not many["failures"])
        yield Aim("storm: resumptions a second", "2,500", f"{many['rate']:,.0f}", many["rate"] >= 2500)
        last = many["answer_ms"]["p99"] / 1000
        yield Aim("storm: 99 % of the answers", "1 s", f"{last:.2f} s", last <= 1)
    if "growth-long" in results or "growth" in results:
        yield from _growth(results.get("growth-long") or results["growth"])
    if "bank" in results:
        yield from _bank(results["bank"]["rows"])
    if "flood" in results:
        yield from _flood(results["flood"])
    if "outage" in results:
        yield from _outage(results["outage"])
    if "takeover" in results:
        yield from _takeover(results["takeover"])


def _flood(result: Mapping[str, Any]) -> Iterator[Aim]:
    quiet, flooded = result["quiet"], result["flooded"]
    ratio = flooded["exchange_ms"] / quiet["exchange_ms"]
    all_resumed = flooded["resumed"] == flooded["moves"]
    yield Aim("flood: time to an answer, to that without", "2", f"{ratio:.1f}", ratio <= 2 and all_resumed)
    each = result["sidecar"]["cpu_s"] / max(result["counters"]["nfqueue_packets_total"], 1) * 1e6
    yield Aim("flood: the sidecar's CPU for a packet", "12 µs", f"{each:.1f} µs", each <= 12)


def _outage(result: Mapping[str, Any]) -> Iterator[Aim]:
    wanted = {
        "charon and sidecar killed": 1.5,
        "charon killed": 0.5,
        "charon killed and restarted": 0.5,
        "power off": 1.5,
    }
    rows = [(row, wanted[row["kind"]]) for row in result["failures"] if row["kind"] in wanted]
    for row, seconds in [*rows, (result["short"], 0.8)]:
        name = f"outage, {row['kind']}, detect {row['detect']} s"
        median = row["clients"]["silence_ms"]["p50"] / 1000
        yield Aim(f"{name}: silence, median", f"{seconds} s", f"{median:.2f} s", median <= seconds)
        last = row["silence_ms"]["p99"] / 1000
        yield Aim(f"{name}: 99 % of {row['sessions']:,}", "8 s", f"{last:.1f} s", last <= 8)
    every = [*result["failures"], result["short"]]
    failures = sum(row["failures"] + row["clients"]["clients"] - row["clients"]["moved"] for row in every)
    yield Aim("outage: sessions not resumed", "0", str(failures), not failures)
    twice = max(row["sent_twice_percent"] for row in every)
    yield Aim("outage: requests sent twice, at most", "5 %", f"{twice} %", twice < 5)
    slower = max(row["handshakes"]["ms"] / (row["handshakes"]["quiet_ms"] or 1) for row in every)
    yield Aim("outage: a full handshake meanwhile, to a quiet one, at most", "2", f"{slower:.1f}", slower <= 2)
    moved = sum(row["moved"] for row in result["false alarms"])
    yield Aim("outage: sessions that moved on a false alarm", "0", str(moved), not moved)


def _takeover(result: Mapping[str, Any]) -> Iterator[Aim]:
    name, keyed = f"takeover, {result['sessions']:,} sessions", result["keyed_ms"]
    yield Aim(f"{name}: without new keys", "0", str(result["failures"]), not result["failures"])
    yield Aim(f"{name}: first client", "100 ms", f"{keyed['first']} ms", keyed["first"] <= 100)
    yield Aim(f"{name}: last client", "5 s", f"{keyed['last'] / 1000:.1f} s", keyed["last"] <= 5000)
    whole = result["vrrp"]
    name, beyond = f"keepalived, {whole['clients']} clients", whole["beyond_ms"]["max"]
    left = whole["clients"] - whole["continued"]
    yield Aim(f"{name}: did not continue", "0", str(left), not left)
    # the times are those of clients whose traffic came back
    met = beyond <= 300 and not left
    yield Aim(f"{name}: longest silence, beyond VRRP's detection", "300 ms", f"{beyond} ms", met)


def _resumption(result: Mapping[str, Any]) -> Iterator[Aim]:
    clients, together = result["clients"], result["simulated together"]
    for form, name in ((Children.NONE, "IKE_SA alone"), (Children.AT_ONCE, "with its CHILD_SA")):
        for kind, times in (("PSK", 10), ("ECDSA", 12)):
            ratio = clients[kind][0]["cpu_ms"] / together[form]["cpu_ms"]
            what = f"gateway CPU, {kind} handshake to resumption, {name}"
            yield Aim(what, f"{times}", f"{ratio:.1f}", ratio >= times)
    for row in result["one by one"]:
        ratio = clients["PSK"][0]["cpu_ms"] / row["cpu_ms"]
        what = f"gateway CPU, PSK handshake to resumption, one alone with {row['sas']:,} SAs"
        yield Aim(what, "2", f"{ratio:.1f}", ratio >= 2)
    near, far = clients["resumption, children in exchange"][0], clients["resumption, children in exchange"][-1]
    p50 = near["answer_p50_ms"]
    yield Aim("SYN to answer at a client, p50", "3 ms", f"{p50} ms", p50 <= 3)
    ratio = near["tunnel_p50_ms"] / clients["PSK"][0]["tunnel_p50_ms"]
    yield Aim(
        "time until the tunnel is up, one alone, to that of a PSK handshake", "0.75", f"{ratio:.2f}", ratio <= 0.75
    )
    trips = (far["tunnel_p50_ms"] - near["tunnel_p50_ms"]) / (2 * (far["delay_ms"] - near["delay_ms"]))
    yield Aim("round trips until the tunnel is up, children in exchange", "1", f"{trips:.1f}", round(trips) == 1)


def _growth(result: Mapping[str, Any]) -> Iterator[Aim]:
    first, last = result["rows"][0], result["rows"][-1]
    ratio = last["cpu_us_each"] / first["cpu_us_each"]
    what = f"CPU of a resumption with {last['sas']:,} SAs to that with {first['sas']:,}"
    yield Aim(what, "1.3", f"{ratio:.2f}", ratio <= 1.3)
    unprocessed, octets = last["unprocessed_percent"], last["sidecar_octets_per_sa"]
    yield Aim(
        f"what activations cost {last['sas']:,} running SAs of their time", "1 %", f"{unprocessed} %", unprocessed <= 1
    )
    yield Aim(f"the sidecar's memory per SA, with {last['sas']:,}", "2,000 octets", f"{octets:,}", octets <= 2000)


def _bank(rows: Sequence[Mapping[str, Any]]) -> Iterator[Aim]:
    last = rows[-1]
    row = next((row for row in rows if row["stubs"] == BANK_STUBS), last)
    size, octets = f"bank, {row['stubs']:,} stubs", row["octets_per_stub"]
    if row["stubs"] >= BANK_STUBS:
        yield Aim(f"{size}: octets each", "700", f"{octets:.0f}", octets <= 700)
    for step, wanted in BANK_RATES.items():
        rate = row[step]["per_s"]
        yield Aim(f"{size}: {step} a second", f"{wanted:,}", f"{rate:,}", rate >= wanted)
    if last["stubs"] > row["stubs"]:
        size = f"bank, {last['stubs']:,} stubs to {row['stubs']:,}"
        ratio = last["octets_per_stub"] / octets
        yield Aim(f"{size}: octets each", f"{1 + BANK_GROWTH}", f"{ratio:.2f}", ratio <= 1 + BANK_GROWTH)
        for step in BANK_RATES:
            ratio = last[step]["per_s"] / row[step]["per_s"]
            yield Aim(f"{size}: {step} a second", f"{1 - BANK_GROWTH}", f"{ratio:.2f}", ratio >= 1 - BANK_GROWTH)
