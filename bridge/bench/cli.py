"""`ike-sa-sync bench`: the benchmarks on the command line."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bridge.bench import bank as bank_bench
from bridge.bench import outage, report, takeover, vrrp
from bridge.bench.flood import flood_lab
from bridge.bench.flood import measure as measure_flood
from bridge.bench.handshake import compare
from bridge.bench.rig import Rig, rig
from bridge.bench.storm import Progress as Report
from bridge.bench.storm import growth as fill
from bridge.bench.storm import storm as break_loose
from bridge.bench.usage import lab_machine, machine
from bridge.lab.space import LabError

WINDOW = 2048
"""sessions at a time: what a gateway's queue holds without letting any by"""
CLIENTS = 20
Work = Callable[[Rig, Report], dict[str, Any]]


@click.group()
def bench() -> None:
    """Benchmarks: resumptions beside handshakes, storms, growth, as root in a lab of their own; and the bank."""


def _lines() -> Report:
    """Progress where no terminal shows a bar: a line for each step, and for each tenth of it."""
    began, shown = time.monotonic(), ("", -1)

    def report(what: str, share: float) -> None:
        nonlocal shown
        tenth = int(share * 10)
        if (what, tenth) != shown:
            shown = what, tenth
            done = f" {10 * tenth} %" if tenth else ""
            click.echo(f"{time.monotonic() - began:6.1f} s  {what}{done}", err=True)

    return report


@contextmanager
def _progress() -> Iterator[Report]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines()
        return
    with Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task("the lab starts", total=1.0)
        yield lambda what, share: shown.update(task, description=what, completed=share)


def _measure(name: str, work: Work, clients: int = 0, shared: str | None = None) -> dict[str, Any]:
    """One benchmark in a lab of its own, with all that is to be known about its circumstances."""
    try:
        with _progress() as progress, rig(clients, shared=shared) as built:
            built.take_model()
            about = lab_machine(built.target)
            result = work(built, progress)
    except LabError as error:
        raise click.ClickException(str(error)) from None
    return _published(name, about, result)


def _published(name: str, about: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return {"benchmark": name, "date": date, "machine": about, "result": result}


def _measure_bank(counts: Sequence[int], gateways: int | None = None) -> dict[str, Any]:
    with _progress() as progress:
        return _published("bank", machine(), bank_bench.fill(counts, gateways, progress))


def _measure_flood(rate: int, seconds: float, moves: int) -> dict[str, Any]:
    try:
        with _progress() as progress, flood_lab() as built:
            progress("a flood", 0.5)
            return _published("flood", lab_machine(built.target), measure_flood(built, rate, seconds, moves))
    except LabError as error:
        raise click.ClickException(str(error)) from None


def _publish(measured: dict[str, Any], plot: str | None, as_json: bool) -> None:
    text, drawing = report.SECTIONS[measured["benchmark"]](measured["result"])
    if plot:
        Path(plot).write_text(drawing)
    if as_json:
        click.echo(json.dumps(measured))
        return
    Console().print(Markdown(text.partition("\n![")[0]))
    click.echo(f"Taken {measured['date']} on {report.machine_text(measured['machine'])}.")


_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")


def _writable(_: click.Context, __: click.Parameter, file: str | None) -> str | None:
    """Said before the work, not after it."""
    if file is not None and not os.access(Path(file).parent, os.W_OK):
        raise click.BadParameter(f"{str(Path(file).parent)!r} is not a folder that can be written to")
    return file


_plot = click.option(
    "--plot",
    type=click.Path(dir_okay=False, writable=True),
    callback=_writable,
    metavar="FILE",
    help="Write a plot there (SVG).",
)
_window = click.option("--window", default=WINDOW, show_default=True, help="Sessions that resume at a time.")


@bench.command("handshake-vs-resume")
@click.option("--rounds", default=20, show_default=True, help="Sessions of each kind.")
@_plot
@_json
def handshake_vs_resume(rounds: int, plot: str | None, as_json: bool) -> None:
    """Handshakes and resumptions in turn, at the same charon."""
    _publish(_measure("handshake-vs-resume", lambda r, progress: compare(r, rounds, progress)), plot, as_json)


@bench.command()
@click.option("--sessions", default=10_000, show_default=True, help="Sessions of the gateway that dies.")
@click.option("--clients", default=CLIENTS, show_default=True, help="Real clients among them, each with traffic.")
@_window
@_plot
@_json
def storm(sessions: int, clients: int, window: int, plot: str | None, as_json: bool) -> None:
    """A gateway dies, all its clients resume at another one."""
    measured = _measure("storm", lambda r, progress: break_loose(r, sessions, window, progress), clients)
    _publish(measured, plot, as_json)
    result = measured["result"]
    if failures := result["storm"]["failures"] + result["clients"]["failures"]:
        raise click.ClickException(f"{failures} of {sessions + clients} sessions were not resumed")


@bench.command()
@click.option("--size", "sizes", multiple=True, type=int, default=[1000, 10_000, 100_000], show_default=True)
@click.option("--sample", default=2000, show_default=True, help="Resumptions that are measured at each size.")
@_window
@_plot
@_json
def growth(sizes: tuple[int, ...], sample: int, window: int, plot: str | None, as_json: bool) -> None:
    """The price of a resumption at a gateway that holds more and more SAs."""
    measured = _measure("growth", lambda r, progress: fill(r, sorted(sizes), sample, window, progress))
    _publish(measured, plot, as_json)


@bench.command("bank")
@click.option(
    "--stubs",
    "counts",
    multiple=True,
    type=click.IntRange(1),
    default=(100_000,),
    show_default=True,
    help="So many stubs; may be given several times, to compare sizes.",
)
@click.option(
    "--gateways",
    type=click.IntRange(1, bank_bench.GATEWAYS_MAX),
    help=f"Gateways that the stubs are of. [default: one for each {bank_bench.GATEWAY_STUBS:,} stubs]",
)
@_plot
@_json
def bank(counts: tuple[int, ...], gateways: int | None, plot: str | None, as_json: bool) -> None:
    """The bank: octets a stub; Initiate, GET and Download a second, in one process.

    Starts a Redis of its own with the shipped redis.conf, and needs no lab.
    """
    _publish(_measure_bank(counts, gateways), plot, as_json)


@bench.command()
@click.option("--rate", default=20_000, show_default=True, help="Requests a second.")
@click.option("--seconds", default=10.0, show_default=True, help="How long.")
@click.option("--moves", default=20, show_default=True, help="Resumptions before the flood, to compare with.")
@_plot
@_json
def flood(rate: int, seconds: float, moves: int, plot: str | None, as_json: bool) -> None:
    """A client resumes, and others shake hands, while made-up addresses flood its gateway with requests."""
    _publish(_measure_flood(rate, seconds, moves), plot, as_json)


KINDS = {kind: (kind, outage.DETECT) for kind in outage.FAILURES} | {
    f"detect {outage.SHORT_DETECT} s": (next(iter(outage.FAILURES)), outage.SHORT_DETECT)
}
"""what `bench outage` measures beside false alarms: a failure and `failover.detect`"""


def _measure_outage(
    sessions: int, clients: int, only: Sequence[str] = ()
) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """Each failure in a lab of its own: the machine, failures and false alarms. `only`: of these kinds."""
    failures: list[dict[str, Any]] = []
    alarms: list[dict[str, Any]] = []
    about: dict[str, Any] = {}
    try:
        with _progress() as told:
            for name in only or (*KINDS, outage.ALARMS):
                told(f"{name}: the lab starts", 0.0)
                kind, detect = KINDS.get(name, ("", outage.DETECT))
                with rig(clients, detect) as built:
                    built.take_model()
                    about = about or lab_machine(built.target)
                    if kind:
                        failures.append(outage.failure(built, kind, sessions, told) | {"detect": detect})
                        click.echo(outage.line(failures[-1]), err=True)
                    else:
                        alarms = outage.false_alarms(built, sessions, told)
                        click.echo("\n".join(map(outage.alarm_line, alarms)), err=True)
    except LabError as error:
        raise click.ClickException(str(error)) from None
    return about, failures, alarms


def _whole_outage(sessions: int, clients: int) -> dict[str, Any]:
    about, failures, alarms = _measure_outage(sessions, clients)
    return _published("outage", about, {"failures": failures[:-1], "short": failures[-1], "false alarms": alarms})


@bench.command("outage")
@click.option("--sessions", default=10_000, show_default=True, help="Sessions of the load generator at the gateway.")
@click.option("--clients", default=CLIENTS, show_default=True, help="Real clients beside them, each with traffic.")
@click.option(
    "--only",
    multiple=True,
    type=click.Choice([*KINDS, outage.ALARMS]),
    metavar="KIND",
    help=f"Measure this alone, for no report; may be given several times: {', '.join([*KINDS, outage.ALARMS])}.",
)
@_plot
@_json
def measure_outage(sessions: int, clients: int, only: tuple[str, ...], plot: str | None, as_json: bool) -> None:
    """How long clients are without traffic: their gateway is killed, cut off, stopped, or only seems to fail."""
    if only and plot:
        raise click.UsageError("'--plot' shows all kinds, and '--only' measures some.")
    if only:
        _, failures, alarms = _measure_outage(sessions, clients, only)
        if as_json:
            click.echo(json.dumps({"failures": failures, "false alarms": alarms}))
    else:
        measured = _whole_outage(sessions, clients)
        _publish(measured, plot, as_json)
        result = measured["result"]
        failures, alarms = [*result["failures"], result["short"]], result["false alarms"]
    left = sum(row["failures"] for row in failures)
    moved = sum(row["moved"] for row in alarms)
    if left or moved:
        raise click.ClickException(f"{left} sessions were not resumed, {moved} moved on a false alarm")


def _measure_takeover(sessions: int, clients: int, only: Sequence[str] = ()) -> dict[str, Any]:
    """`only`: of these parts."""
    result: dict[str, Any] = {}
    about: dict[str, Any] = {}
    try:
        with _progress() as told:
            if SESSIONS in (only or PARTS):
                told("the lab starts", 0.0)
                with rig(shared=takeover.SHARED) as built:
                    built.take_model()
                    about = lab_machine(built.target)
                    result |= takeover.takeover(built, sessions, told)
            if VRRP in (only or PARTS):
                told(f"{VRRP}: the lab starts", 0.0)
                with vrrp.vrrp_lab(clients) as whole:
                    about = about or lab_machine(whole.topology.gw2)
                    result[VRRP] = vrrp.measure(whole, told)
    except LabError as error:
        raise click.ClickException(str(error)) from None
    return _published("takeover", about, result)


SESSIONS: Final = "sessions"
VRRP: Final = "vrrp"
PARTS: Final = (SESSIONS, VRRP)
"""of `bench takeover`"""


@bench.command("takeover")
@click.option("--sessions", default=10_000, show_default=True, help="Sessions of ordinary clients at the address.")
@click.option(
    "--clients", default=CLIENTS, show_default=True, help="Real clients of the gateway that keepalived replaces."
)
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(PARTS),
    metavar="PART",
    help=f"Measure this alone, for no report: {', '.join(PARTS)}.",
)
@_plot
@_json
def measure_takeover(sessions: int, clients: int, only: tuple[str, ...], plot: str | None, as_json: bool) -> None:
    """A gateway gets the address of one that failed, and takes over the sessions of clients without a sidecar."""
    if only and plot:
        raise click.UsageError("'--plot' shows all parts, and '--only' measures some.")
    measured = _measure_takeover(sessions, clients, only)
    result = measured["result"]
    if only:
        click.echo(json.dumps(result, indent=None if as_json else 1))
    else:
        _publish(measured, plot, as_json)
    if failures := result.get("failures"):
        raise click.ClickException(f"{failures} of {sessions} sessions have no new keys")
    if VRRP in result and (left := clients - result[VRRP]["continued"]):
        raise click.ClickException(f"{left} of {clients} clients did not continue")


SHORT: dict[str, Callable[[], dict[str, Any]]] = {
    "handshake-vs-resume": lambda: _measure("handshake-vs-resume", lambda r, progress: compare(r, 5, progress)),
    "storm": lambda: _measure("storm", lambda r, progress: break_loose(r, 10_000, WINDOW, progress), CLIENTS),
    "growth": lambda: _measure("growth", lambda r, progress: fill(r, [1000, 10_000], 1000, WINDOW, progress)),
    "bank": lambda: _measure_bank([20_000]),
    "flood": lambda: _measure_flood(20_000, 8.0, 8),
    "outage": lambda: _whole_outage(1000, 8),
    "takeover": lambda: _measure_takeover(1000, CLIENTS),
}
"""what `make bench` does"""
ORDERS = {"growth-long": "growth"}
"""benchmarks whose file has another name"""


@bench.command("report")
@click.option("--docs", default="docs", show_default=True, type=click.Path(file_okay=False))
@click.option("--short", is_flag=True, help="First measure: a short version of each benchmark.")
def make_report(docs: str, short: bool) -> None:
    """Write performance.md, its plots and the figures of failures.md from bench/*.json of a folder."""
    folder = Path(docs) / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    for name, work in SHORT.items() if short else ():
        began = time.monotonic()
        measured = work()
        (folder / f"{name}.json").write_text(json.dumps(measured, indent=1) + "\n")
        click.echo(f"{name}: measured in {time.monotonic() - began:.0f} s", err=True)
    files = {name: folder / f"{name}.json" for name in report.SECTIONS}
    reports = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    if not reports:
        raise click.ClickException(f"{folder} holds no results: measure with --short, or with --json into files there")
    try:
        text, plots = report.render(reports)
    except report.Outdated as error:
        name = str(error)
        order = f"ike-sa-sync bench {ORDERS.get(name, name)} --json >{files[name]}"
        raise click.ClickException(
            f"{files[name]} is from an older version, which measured less; again: {order}"
        ) from None
    for name, drawing in plots.items():
        (folder / f"{name}.svg").write_text(drawing)
    (Path(docs) / "performance.md").write_text(text)
    failures = Path(docs) / "failures.md"
    if "outage" in reports and failures.exists():
        measured = reports["outage"]
        about = f"Taken {measured['date']} on {report.machine_text(measured['machine'])}."
        failures.write_text(outage.in_failures(failures.read_text(), measured["result"], about))
    click.echo(f"{docs}/performance.md: {', '.join(reports)}")
    if short:
        Console().print(Markdown(report.aimed_at(reports)))
