"""`ike-sa-sync drain`: clients of this gateway move to another one, and the operator watches."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable
from pathlib import Path

import click
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bridge.cli import event_loop, options, output
from bridge.config import GatewayConfig
from bridge.gateway.drain import ANY, RATE
from bridge.service import control

POLL_SECONDS = 0.2
LAST_SECONDS = 1.0
"""that the sidecar has to say how far a drain was that is given up"""
YIELD_SECONDS = 10.0
"""that it has to give the sessions at one shared address up"""
INTERRUPTED = 130
SETTLE_SECONDS = 3.0
"""before the end of drain.timeout no more clients are asked, so that those that move arrive; half of a short one"""


def _target(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Callback: an IP address, or ANY."""
    return value if value == ANY else options.an_address(context, parameter, value)


@click.command()
@options.gateway_config_option
@click.option(
    "--to",
    metavar="ADDRESS|any",
    callback=_target,
    help="The gateway to move clients to; any: each session to one of the living gateways.",
)
@click.option(
    "--on-stop",
    is_flag=True,
    help="For strongSwan's unit, before it stops: --to any for drain.timeout s at most, then yield of the shared "
    "addresses, with exit code 0.",
)
@click.option(
    "--share",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Part of this gateway's sessions to move, rounded up.",
)
@click.option(
    "--until-even",
    is_flag=True,
    help="Move only until this gateway and the target have as many sessions as the living gateways have on average.",
)
@click.option(
    "--rate",
    type=click.FloatRange(0, min_open=True),
    default=RATE,
    show_default=True,
    help="The most moves begun a second; fewer where the targets are slower.",
)
@options.json_option
@click.pass_context
def drain(
    context: click.Context,
    path: str | None,
    to: str | None,
    on_stop: bool,
    share: float,
    until_even: bool,
    rate: float,
    as_json: bool,
) -> None:
    """Move clients of this living gateway to another one.

    Asks the clients' sidecars, which resume their sessions there. Clients without a sidecar stay. After Ctrl-C it asks
    no more clients, and waits for those that move. It refuses a target that could resume none of the sessions: one that
    is not alive, has another bank key, or lacks the sessions' connections.

    Exit code 0 when as many sessions moved as requested, 1 when fewer did, 130 after Ctrl-C.
    """
    if until_even and (on_stop or to == ANY or context.get_parameter_source("share") is ParameterSource.COMMANDLINE):
        raise click.UsageError("'--until-even' needs the address of one gateway, and takes no share.")
    if on_stop:
        _on_stop(path, rate)
        return
    if to is None:
        raise click.UsageError("Missing option '--to'.")
    socket = options.read_config(path, GatewayConfig).control
    request = {"command": "drain", "to": to, "share": share, "rate": rate, "until_even": until_even}
    code = None
    try:
        try:
            done = event_loop.run(_drain(socket, request, sys.stderr.isatty() and not as_json))
        except KeyboardInterrupt:
            code = INTERRUPTED
            done = event_loop.run(control.call(socket, {"command": "drain-stop"}))
    except control.ControlError as error:
        options.fail(error)
    if as_json:
        output.print_json(done)
    else:
        _print(done)
    if code is None:
        code = 0 if done["moved"] >= done["wanted"] else 1
    sys.exit(code)


def _on_stop(path: str | None, rate: float) -> None:
    """Move what can be moved before strongSwan stops; sessions at addresses that gateways share are given up, without a
    message to their clients. What is in the way of that keeps nothing from stopping."""
    if path is None and not Path(options.GATEWAY_FILE).exists():
        return
    config = options.read_config(path, GatewayConfig)
    if not config.drain.on_stop:
        return
    request = {
        "command": "drain",
        "to": ANY,
        "share": 1.0,
        "rate": rate,
        "shared": False,
        "instead": True,
    }
    try:
        _print(event_loop.run(_bounded(config.control, request, config.drain.timeout)))
    except TimeoutError:
        click.echo("not drained: the sidecar does not answer: is it stopped, or overloaded?", err=True)
        return
    except control.ControlError as error:
        click.echo(f"not drained: {error}", err=True)
    # at last: their traffic goes on until now
    for address in config.takeover.addresses:
        request = {"command": "yield", "address": address, "until_restart": True}
        try:
            done = event_loop.run(_within(YIELD_SECONDS, control.call(config.control, request)))
        except (TimeoutError, control.ControlError) as error:
            click.echo(f"{address} not given up: {error or 'the sidecar does not answer'}", err=True)
        else:
            click.echo(f"{output.count(done['sessions'], 'session')} at {address} left to the gateway that has it next")


async def _bounded(socket: str, request: control.Answer, seconds: float) -> control.Answer:
    """Drain for so many seconds at most. Raises TimeoutError where the sidecar then says nothing either."""
    settle = min(SETTLE_SECONDS, seconds / 2)
    try:
        return await _within(seconds - settle, _drain(socket, request, False))
    except TimeoutError:
        pass
    try:
        return await _within(settle, control.call(socket, {"command": "drain-stop"}))
    except TimeoutError:
        return await _within(LAST_SECONDS, control.call(socket, {"command": "drained"}))


async def _within(seconds: float, work: Awaitable[control.Answer]) -> control.Answer:
    """Raises TimeoutError."""
    async with asyncio.timeout(seconds):
        return await work


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
            under_way = answer["under_way"] + answer["ending"]
            rest = f"{under_way} under way, {answer['left']} left alone, {answer['failed']} failed"
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
    if done["sessions_at"]:
        before = ", ".join(f"{gateway} {count:,}" for gateway, count in done["sessions_at"].items())
        click.echo(f"sessions before: {before}")
    click.echo(
        f"{done['state']}: {done['moved']} of {output.count(done['wanted'], 'session')} wanted moved to {done['to']} "
        f"in {done['seconds']:.1f} s; this gateway had {done['sessions']:,}"
    )
    if done["ending"]:
        click.echo(f"{output.count(done['ending'], 'more session')} moved, and charon has yet to end them here")
