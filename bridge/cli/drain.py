"""`ike-sa-sync drain`: clients of this gateway move to another one, and the operator watches."""

from __future__ import annotations

import asyncio
import sys

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bridge.cli import options, output
from bridge.config import GatewayConfig
from bridge.gateway.drain import RATE
from bridge.service import control

POLL_SECONDS = 0.2
INTERRUPTED = 130


@click.command()
@options.gateway_config_option
@click.option(
    "--to", required=True, metavar="ADDRESS", callback=options.an_address, help="The gateway to move clients to."
)
@click.option(
    "--share",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="How many of this gateway's sessions to move, rounded up.",
)
@click.option(
    "--rate",
    type=click.FloatRange(0, min_open=True),
    default=RATE,
    show_default=True,
    help="Moves begun a second, at most.",
)
@options.json_option
def drain(path: str | None, to: str, share: float, rate: float, as_json: bool) -> None:
    """Move clients of this gateway to another one, while it lives.

    Asks the clients' sidecars, which resume their sessions there. Clients without a sidecar are left alone. Ctrl-C asks
    no more clients, and waits for those that move. A target that could resume none of the sessions is refused: one that
    does not live, has another bank key, or lacks the sessions' connections.

    Exit code 0 when as many moved as wanted, 1 when fewer did, 130 after Ctrl-C.
    """
    socket = options.read_config(path, GatewayConfig).control
    request = {"command": "drain", "to": to, "share": share, "rate": rate}
    code = None
    try:
        try:
            done = asyncio.run(_drain(socket, request, sys.stderr.isatty() and not as_json))
        except KeyboardInterrupt:
            code = INTERRUPTED
            done = asyncio.run(control.call(socket, {"command": "drain-stop"}))
    except control.ControlError as error:
        options.fail(error)
    if as_json:
        output.print_json(done)
    else:
        _print(done)
    if code is None:
        code = 0 if done["moved"] >= done["wanted"] else 1
    sys.exit(code)


async def _drain(socket: str, request: control.Answer, show: bool) -> control.Answer:
    answer = await control.call(socket, request)
    for row in answer["outcomes"]:
        click.echo(f"{output.count(row['sessions'], 'session')} will not be asked: {row['reason']}", err=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rest]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=not show,
        transient=True,
    ) as progress:
        task = progress.add_task(f"moved to {request['to']}", total=answer["wanted"], rest="")
        while answer["state"] == "running":
            await asyncio.sleep(POLL_SECONDS)
            answer = await control.call(socket, {"command": "drained"})
            rest = f"{answer['under_way']} under way, {answer['left']} left alone, {answer['failed']} failed"
            progress.update(task, completed=answer["moved"], rest=rest)
    return answer


def _print(done: control.Answer) -> None:
    table = output.table("sessions", "", "reason")
    for row in done["outcomes"]:
        table.add_row(f"{row['sessions']:,}", row["result"], row["reason"])
    if table.row_count:
        output.show(table)
    if done["failures"]:
        failures = output.table("failed", "address", "reason")
        for row in done["failures"]:
            failures.add_row(row["identity"], row["address"], row["reason"])
        output.show(failures)
    click.echo(
        f"{done['state']}: {done['moved']} of {output.count(done['wanted'], 'session')} wanted moved to {done['to']} "
        f"in {done['seconds']:.1f} s; this gateway had {done['sessions']:,}"
    )
