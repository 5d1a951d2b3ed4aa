"""docs/performance.md and its plots, from the JSON of the benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bridge.bench import bank
from bridge.bench.plot import bars

INTRODUCTION = """\
# Performance

Written by `make bench` from the JSON beside the plots in [bench/](bench/); do not edit. Repeat any of it, longer, with
`ike-sa-sync bench handshake-vs-resume|storm|growth|bank`.

{machine}

Everything (client, generator, both ends of the network, gateway, bank) shares these cores, and whatever else the
machine does shares them too. CPU is what the kernel accounts to the processes charon, sidecar and Redis of the
gateway under test, measured in nanoseconds from their schedstat, including what they still do for a session after
it is up (its stub on the way to the bank); work on packets in interrupts belongs to no process and is not in it. Two
runs differ by 20 % and more. Compare the ratios before the figures.

A load generator plays the clients. It speaks the real protocol from addresses of its own, its sessions' stubs are
sealed with the bank's key after the model of a real session whose gateway then got SIGKILL. It believes an answer
only if its PROOF is right, and counts a session only when charon itself has answered its first protected message.
"""

PRICE = """\
## What running SAs pay

Installed SAs become active through one toggle of a segment of charon's HA plugin, during which the SAs of that
segment leave IKE messages unanswered (ESP is untouched; the peer retransmits) and after which each gets one more
liveness check. The sidecar measures each toggle, lands in a segment without SAs as long as there is one, and leaves a
segment that was disturbed for t seconds in peace for 100 t: at most 1 % of anybody's time. The rest is never longer
than 16 s, so with toggles of more than 160 ms it can be more than 1 %. Resumptions that come meanwhile wait,
and share the next toggle: with all 16 segments occupied this, not CPU, is what the latency of a storm consists of.
charon walks its whole IKE_SA table at each toggle: with `ikesa_table_size = 65536` an empty one took 4 ms of CPU for
one resumption, with 4096 a third of that.
"""


def machine_text(machine: dict[str, Any], date: str) -> str:
    """One line on where and when."""
    return (
        f"Taken {date} on {machine['cores']} cores ({machine['cpu']}), kernel {machine['kernel']}, "
        + (f"strongSwan {machine['strongswan']} (ESP by {machine['esp']}), " if "strongswan" in machine else "")
        + f"Redis {machine['redis']}, Python {machine['python']}."
    )


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def comparison(result: dict[str, Any]) -> tuple[str, str]:
    """Text and plot of handshake-vs-resume."""
    shakes, alone, many = result["handshakes"], result["resumption alone"], result["resumption among 200"]
    ratios = [
        [name, *(f"{shakes[kind]['cpu_ms'] / row['cpu_ms']:.1f}" for kind in shakes)]
        for name, row in (("resumption, 200 at once", many), ("resumption, one alone", alone))
    ]
    packets = {"psk": 2, "ecdsa": 2, "eap-mschapv2": 6}
    rows = [
        [
            f"IKE_SA_INIT + IKE_AUTH, {kind}",
            row["cpu_ms"],
            row["p50_ms"],
            row["p99_ms"],
            row["packets"],
            packets[kind],
        ]
        for kind, row in shakes.items()
    ] + [
        [name, row["cpu_ms"], row["p50_ms"], row["p99_ms"], 2, 1]
        for name, row in (("resumption, one alone", alone), ("resumption, 200 at once", many))
    ]
    text = (
        "## A handshake and a resumption\n\n"
        "How many times the gateway's CPU for a resumption (IKE_SA and its confirming exchange) an ordinary handshake "
        "(with its CHILD_SA) costs:\n\n"
        + table(["", *(f"handshake, {kind}" for kind in shakes)], ratios)
        + "\n"
        + table(["", "gateway CPU, ms", "latency p50, ms", "p99, ms", "packets", "round trips"], rows)
        + "\n`one alone` pays an activation and a round through the event loops for itself alone; among 200 they are "
        "shared.\nOf the resumption among 200, in ms: "
        + ", ".join(f"{name} {cost}" for name, cost in many["by_process_ms"].items())
        + ".\n\n![CPU](bench/handshake-vs-resume.svg)\n"
    )
    plot = bars(
        "Gateway CPU per session",
        "ms",
        [(f"handshake, {kind}", [row["cpu_ms"]]) for kind, row in shakes.items()]
        + [
            ("resumption, one alone", list(alone["by_process_ms"].values())),
            ("resumption, 200 at once", list(many["by_process_ms"].values())),
        ],
        list(many["by_process_ms"]),
    )
    return text, plot


def storm(result: dict[str, Any]) -> tuple[str, str]:
    """Text and plot of a storm."""
    alone, many = result["alone"], result["storm"]
    rows = [
        [
            name,
            row["sessions"],
            row["window"],
            row["failures"],
            row["seconds"],
            row["rate"],
            row["answer_ms"]["p50"],
            row["answer_ms"]["p99"],
            row["cpu_us_each"],
        ]
        for name, row in (("one after the other", alone), ("storm", many))
    ]
    text = (
        "## A storm\n\nA gateway dies, and its clients resume at another one.\n\n"
        + table(
            [
                "",
                "sessions",
                "at a time",
                "failures",
                "seconds",
                "per second",
                "answer p50, ms",
                "p99, ms",
                "CPU each, µs",
            ],
            rows,
        )
        + "\n"
        + table(
            ["process", "CPU each, µs", "memory at the end, MB"],
            [[name, used["cpu_us_each"], used["rss_mb"]] for name, used in many["processes"].items()]
            + [["load generator", many["generator_cpu_us_each"], ""]],
        )
        + f"\n{many['retransmitted']} messages were sent again by clients whose timer of 0.5 s ran out; answers that "
        f"proved nothing, and were ignored: {sum(many['unproven'].values())}.\n\n"
        + _real_clients(result["clients"])
        + "![storm](bench/storm.svg)\n"
    )
    plot = bars(
        "Storm: CPU per resumption",
        "µs",
        [(name, [used["cpu_us_each"]]) for name, used in many["processes"].items()],
    )
    return text, plot


def _real_clients(clients: dict[str, Any]) -> str:
    """A paragraph on the real clients that were in the storm."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in clients["reasons"].items())
    answer, tunnel = clients["answer_ms"], clients["tunnel_ms"]
    return (
        f"Among them were {clients['clients']} real clients with charon, sidecar and traffic: "
        f"{clients['resumed']} resumed{f' ({reasons})' if reasons else ''}, answer after {answer['p50']} ms (p50) and "
        f"{answer['max']} ms (the last), tunnel after {tunnel['p50']} and {tunnel['max']} ms. Of {clients['sent']} "
        f"packets, one every 50 ms and client, {clients['lost']} were lost; the longest silence was "
        f"{clients['silence_ms']} ms.\n\n"
    )


def growth(result: dict[str, Any]) -> tuple[str, str]:
    """Text and plot of a growing gateway."""
    rows = result["rows"]
    first = rows[0]["cpu_us_each"]
    text = (
        "## A gateway that fills\n\n"
        f"The price of {result['sample']} more resumptions, {result['window']} at a time, with so many SAs in charon "
        "and their stubs in the bank:\n\n"
        + table(
            [
                "SAs before",
                "CPU each, µs",
                "to the first",
                "charon",
                "sidecar",
                "bank",
                "per second",
                "toggle, ms",
                "sidecar's memory per SA, octets",
            ],
            [
                [
                    row["sas"],
                    row["cpu_us_each"],
                    f"{row['cpu_us_each'] / first:.2f}",
                    *(row["processes"][name]["cpu_us_each"] for name in ("charon", "sidecar", "bank")),
                    row["rate"],
                    row["toggle_ms"],
                    row["sidecar_octets_per_sa"],
                ]
                for row in rows
            ],
        )
        + "\n![growth](bench/growth.svg)\n"
    )
    plot = bars(
        "Growth: CPU per resumption",
        "µs",
        [
            (
                f"{row['sas']} SAs before",
                [row["processes"][name]["cpu_us_each"] for name in ("charon", "sidecar", "bank")],
            )
            for row in rows
        ],
        ["charon", "sidecar", "bank"],
    )
    return text, plot


SECTIONS = {"handshake-vs-resume": comparison, "storm": storm, "growth": growth, "bank": bank.section}


def document(reports: dict[str, dict[str, Any]]) -> str:
    """docs/performance.md from the reports by name, as far as there are any."""
    newest = next(iter(reports.values()))
    parts = [INTRODUCTION.format(machine=machine_text(newest["machine"], newest["date"]))]
    parts += [section(reports[name]["result"])[0] for name, section in SECTIONS.items() if name in reports]
    return "\n".join([*parts, PRICE])
