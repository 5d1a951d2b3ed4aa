"""docs/performance.md and its plots, from the JSON of the benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bridge.bench import bank, compiled, flood, outage, sizing, takeover
from bridge.bench.aims import aims
from bridge.bench.plot import bars

INTRODUCTION = """\
# Performance

`make bench` measures a short version of each benchmark in less than five minutes, and writes this page from the JSON
beside the plots in [bench/](bench/); do not edit it. At length, one after the other, on a machine that does nothing
else:

    sudo ike-sa-sync bench handshake-vs-resume --json >docs/bench/handshake-vs-resume.json
    sudo ike-sa-sync bench storm --json >docs/bench/storm.json
    sudo ike-sa-sync bench growth --json >docs/bench/growth-long.json
    sudo ike-sa-sync bench bank --stubs 20000 --stubs 100000 --stubs 1000000 --json >docs/bench/bank.json
    sudo ike-sa-sync bench flood --json >docs/bench/flood.json
    sudo ike-sa-sync bench outage --json >docs/bench/outage.json
    sudo ike-sa-sync bench takeover --json >docs/bench/takeover.json
    ike-sa-sync bench report

`--help` of each says how to have more sessions, rounds, sizes or seconds. `growth` goes up to 100,000 SAs, which takes
minutes, and 2 GB of memory. Without `--json` each prints tables instead; `--plot FILE` draws the plot.

Measured on {machine}.

Everything (client, generator, both ends of the network, gateway, bank) shares these cores, and whatever else the
machine does shares them too. CPU is what the kernel accounts to the processes charon, sidecar and Redis of the
gateway under test, measured in nanoseconds from their schedstat, including what they still do for a session after
it is up (its stub on the way to the bank); work on packets in interrupts belongs to no process and is not included. Two
runs differ by 20 % and more. Compare the ratios before the figures.

A load generator plays the clients of storms. It speaks the real protocol from addresses of its own; its sessions'
stubs, with a virtual IP and a CHILD_SA each, are sealed with the bank's key after the model of a real session. It
accepts an answer only if its PROOF is right, and counts a session only when charon itself has answered its first
protected message.
"""

PRICE = """\
## What running SAs pay

charon activates installed SAs by a deactivation and an activation of one of its HA segments. Meanwhile it does not
process IKE messages of the SAs in that segment (peers retransmit, ESP is not affected), and afterwards it probes each
of them once more. The sidecar measures each activation, and uses a segment without SAs as long as there is one.
Otherwise an activation that took t seconds is followed by the next one 6.25 t later, in another of the 16 segments: 1 %
of the time of each SA on average, with two in a row after a pause. The interval is never longer than 2 s, so if
activations take more than 320 ms it can be more than 1 %. SAs that are rebuilt within a window share an activation: 100
times what the last one took, 0.5 s at least and 2 s at most. Their clients are answered before it, so it is part of the
CPU of a resumption, and not of its latency, but for clients that begin with CREATE_CHILD_SA, for the first one of a
connection, and while 256 clients wait for an answer: then charon confirms, which is less work for the sidecar. charon
walks its whole IKE_SA table at each activation: with `ikesa_table_size = 65536` an empty one took 4 ms of CPU for one
resumption, with 4096 a third of that.
"""


def machine_text(machine: dict[str, Any]) -> str:
    """One line on where."""
    return (
        f"{machine['cores']} cores ({machine['cpu']}), kernel {machine['kernel']}, "
        + (f"strongSwan {machine['strongswan']} (ESP by {machine['esp']}), " if "strongswan" in machine else "")
        + f"Redis {machine['redis']}, Python {machine['python']}"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


SIMULATED = {
    "none": "IKE_SA alone",
    "at-once": "children in exchange",
    "create": "CREATE_CHILD_SA",
    "forward-secrecy": "IKE_SA alone, forward secrecy",
}


def _one_by_one(result: dict[str, Any]) -> str:
    """The answers of clients that come one by one; nothing in results of before they were measured."""
    rows = result.get("one by one", ())
    if not rows:
        return ""
    answers = "; ".join(f"with {row['sas']:,} SAs {row['p50_ms']} / {row['p99_ms']}" for row in rows)
    return f"Such clients one by one, ten a second, p50 / p99 in ms: {answers}."


def _forward_secrecy(together: dict[str, Any], count: int) -> str:
    """What it adds to a resumption; nothing in results of before it was measured."""
    if "forward-secrecy" not in together:
        return ""
    plain, secret = together["none"]["cpu_ms"], together["forward-secrecy"]["cpu_ms"]
    return (
        f"Forward secrecy (`resume.forward_secrecy`) costs the gateway {max(secret - plain, 0.0):.2f} ms of CPU more a "
        f"resumption ({secret:.2f} ms against {plain:.2f}, {count} in parallel): its half of a key exchange.\n\n"
    )


def comparison(result: dict[str, Any]) -> tuple[str, str]:
    """Text and plot of handshake-vs-resume."""
    clients, together, count = result["clients"], result["simulated together"], result["together"]
    near = {name: rows[0] for name, rows in clients.items()}
    shakes = [name for name, row in near.items() if not row["answer_p50_ms"]]
    moves = [name for name in near if name not in shakes]
    costs = [
        *((f"{count} in parallel, {SIMULATED[form]}", row["cpu_ms"]) for form, row in together.items()),
        *((f"one alone, ten a second, with {row['sas']:,} SAs", row["cpu_ms"]) for row in result.get("one by one", ())),
        *((f"{name}, one alone", near[name]["cpu_ms"]) for name in moves),
    ]
    ratios = [[name, *(f"{near[kind]['cpu_ms'] / cost:.1f}" for kind in shakes), cost] for name, cost in costs]
    ratios += [[f"handshake, {kind}", *[""] * len(shakes), near[kind]["cpu_ms"]] for kind in shakes]
    delays = result["delays_ms"]
    paces = [
        [
            f"handshake, {name}" if name in shakes else name,
            _round_trips(rows),
            rows[0]["packets"],
            *(f"{row['tunnel_p50_ms']:.1f} / {row['tunnel_p99_ms']:.1f}" for row in rows),
        ]
        for name, rows in clients.items()
    ]
    answers = ", ".join(
        f"{name} {near[name]['answer_p50_ms']} ms (p50) and {near[name]['answer_p99_ms']} ms (p99)" for name in moves
    )
    alone, idle = result["simulated alone"], sum(result["idle_cpu_ms_per_s"].values())
    text = (
        "## A handshake and a resumption\n\n"
        "How many times the gateway's CPU of a resumption a full handshake costs. A handshake is IKE_SA_INIT + "
        "IKE_AUTH with one CHILD_SA, PSK with X25519.\n\n"
        + table(["resumption", *(f"handshake, {kind}" for kind in shakes), "gateway CPU, ms"], ratios)
        + "\nOne alone pays a round through all event loops for itself, and shares an activation only with those that "
        "come within 0.5 to 2 s; of many each pays a part. Of "
        f"{count} in parallel, in ms: "
        + "; ".join(
            f"{SIMULATED[form]}: " + ", ".join(f"{name} {cost}" for name, cost in row["by_process_ms"].items())
            for form, row in together.items()
        )
        + f". What these processes use without any session ({idle:.1f} ms a second) is subtracted everywhere. With "
        "CHILD_SAs of kernel-libipsec, charon encrypts in userspace, sets up routes and a policy for each, "
        "which is included here and in the handshakes.\n\n"
        + _forward_secrecy(together, count)
        + "Until the tunnel is up, at a real client without other load, p50 / p99 in ms, by the delay of the cable "
        "each way. The delay of the cable counts once for each round trip; packets are those that the client sent "
        "and received.\n\n"
        + table(["", "round trips", "packets", *(f"{delay} ms" for delay in delays)], paces)
        + f"\nFrom SYN to the answer accepted, without delay: {answers}; a client of the load generator, without a "
        f"charon to ask first: {alone['p50_ms']} and {alone['p99_ms']} ms. {_one_by_one(result)}\n\n"
        "![CPU](bench/handshake-vs-resume.svg)\n"
    )
    plot = bars(
        "Gateway CPU per session",
        "ms",
        [(f"handshake, {kind}", [near[kind]["cpu_ms"]]) for kind in shakes]
        + [(f"{name}, alone", [near[name]["cpu_ms"]]) for name in moves]
        + [
            (f"{count} in parallel, {SIMULATED[form]}", list(row["by_process_ms"].values()))
            for form, row in together.items()
        ],
        list(together["none"]["by_process_ms"]),
    )
    return text, plot


def _round_trips(rows: Sequence[dict[str, Any]]) -> int:
    """How often the delay of the cable, there and back, is in the time."""
    near, far = rows[0], rows[-1]
    trips: float = (far["tunnel_p50_ms"] - near["tunnel_p50_ms"]) / (2 * (far["delay_ms"] - near["delay_ms"]))
    return round(trips)


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
        f"packets, one every 50 ms and client, {clients['lost']} were lost; the longest time without an answer was "
        f"{clients['silence_ms']} ms.\n\n"
    )


def growth(result: dict[str, Any]) -> tuple[str, str]:
    """Text and plot of a growing gateway."""
    return _growth(result, "A gateway that fills", "growth")


def growth_long(result: dict[str, Any]) -> tuple[str, str]:
    """The same from a longer run."""
    return _growth(result, f"A gateway that fills, up to {result['rows'][-1]['sas']:,} SAs", "growth-long")


def _growth(result: dict[str, Any], title: str, name: str) -> tuple[str, str]:
    rows = result["rows"]
    first = rows[0]["cpu_us_each"]
    text = (
        f"## {title}\n\nThe price of {result['sample']} more resumptions, {result['window']} at a time, with so many "
        "SAs in charon and their stubs in the bank:\n\n"
        + table(
            ["SAs before", "CPU each, µs", "to the first", "charon", "sidecar", "bank", "per second"],
            [
                [
                    f"{row['sas']:,}",
                    row["cpu_us_each"],
                    f"{row['cpu_us_each'] / first:.2f}",
                    *(row["processes"][name]["cpu_us_each"] for name in ("charon", "sidecar", "bank")),
                    row["rate"],
                ]
                for row in rows
            ],
        )
        + "\n"
        + table(
            [
                "SAs before",
                "answer p50, ms",
                "p99, ms",
                "activations",
                "each, ms",
                "IKE not processed, %",
                "sidecar, octets per SA",
            ],
            [
                [
                    f"{row['sas']:,}",
                    row["answer_ms"]["p50"],
                    row["answer_ms"]["p99"],
                    round(row["activations"]),
                    row["activation_ms"],
                    row["unprocessed_percent"],
                    f"{row['sidecar_octets_per_sa']:,}",
                ]
                for row in rows
            ],
        )
        + "\nIKE not processed: the average share of time in which charon processed no IKE messages of an SA because "
        "of activations, from the row before until the sample was resumed, one storm after the other. The sidecar's "
        "memory is the increase since the end of a first storm whose clients left again.\n\n"
        f"![growth](bench/{name}.svg)\n"
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


SECTIONS = {
    "handshake-vs-resume": comparison,
    "storm": storm,
    "growth": growth,
    "growth-long": growth_long,
    "bank": bank.section,
    "flood": flood.section,
    "outage": outage.section,
    "takeover": takeover.section,
}
"""by the name of their file; each gives text and plot"""


class Outdated(Exception):
    """Results that lack what a section needs; the text is the section's name."""


def render(reports: dict[str, dict[str, Any]]) -> tuple[str, dict[str, str]]:
    """docs/performance.md and its plots from the reports by name, as far as there are any. Raises Outdated."""
    head = max(reports.values(), key=lambda report: ("strongswan" in report["machine"], report["date"]))
    about = machine_text(head["machine"])
    texts, plots = [], {}
    for name, section in SECTIONS.items():
        if name not in reports:
            continue
        report = reports[name]
        try:
            text, plots[name] = section(report["result"])
            elsewhere = f" on {machine_text(report['machine'])}"
        except (KeyError, TypeError, IndexError):
            raise Outdated(name) from None
        # under the heading
        title, _, rest = text.partition("\n")
        # the bank's has no lab, and does not name strongSwan
        here = compiled.machine_alone(report).items() <= head["machine"].items()
        texts.append(f"{title}\n\nTaken {report['date']}{'' if here else elsewhere}.\n{rest}")
    goals = "## What was aimed at\n\n" + aimed_at(reports)
    found = sizing.lines({name: report["result"] for name, report in reports.items()})
    size = f"## For sizing\n\nFor {sizing.SESSIONS:,} sessions of a gateway:\n\n" + table(
        ["", "", "from `bench`"], list(found)
    )
    sections = [INTRODUCTION.format(machine=about), goals, *texts, PRICE, compiled.section(reports), size]
    return "\n".join(sections), plots


def aimed_at(reports: dict[str, dict[str, Any]]) -> str:
    """The aims and what became of them, as a table."""
    found = aims({name: report["result"] for name, report in reports.items()})
    rows = [[aim.what, aim.wanted, aim.measured, "met" if aim.met else "**missed**"] for aim in found]
    return table(["", "aim", "measured", ""], rows)
