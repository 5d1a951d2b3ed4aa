"""`ike-sa-sync takeover` and `yield`: sessions at an address that gateways share, for VRRP's scripts and for people."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable

import click

from bridge.cli import event_loop, options, output
from bridge.config import GatewayConfig
from bridge.service import control

POLL_SECONDS, POLL_SECONDS_MAX = 0.02, 0.5
TIMEOUT = 120.0
"""seconds: VRRP's script ends, also where the bank does not answer"""


def _address_option(text: str) -> Callable[[options.Function], options.Function]:
    return click.option("--address", metavar="S", required=True, callback=options.an_address, help=text)


@click.command()
@options.gateway_config_option
@_address_option("The shared address, which this host has now.")
@click.option(
    "--from", "owner", metavar="GATEWAY", callback=options.an_address, help="Take the sessions of this gateway only."
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=TIMEOUT,
    show_default=True,
    help="Seconds to wait. The sidecar goes on afterwards.",
)
@options.json_option
def takeover(path: str | None, address: str, owner: str | None, timeout: float, as_json: bool) -> None:
    """Take over the sessions at an address that gateways share (experimental).

    The running sidecar gives charon the sessions of the gateway that had the address, as they are. Their clients need
    no sidecar and notice nothing. The address has to be at this host already.

    Exit code 0 when every session that the bank has at the address is here and has new keys, 1 otherwise.
    """
    socket = options.read_config(path, GatewayConfig).control
    request = {"command": "takeover", "address": address, "from": owner}
    try:
        done = event_loop.run(_take(socket, request, timeout))
    except control.ControlError as error:
        options.fail(error)
    except KeyboardInterrupt:
        sys.exit(130)
    if as_json:
        output.print_json(done)
    else:
        for row in done["not_taken"]:
            click.echo(f"{output.count(row['sessions'], 'session')} not taken over: {row['reason']}")
        click.echo(
            f"{output.count(done['taken'], 'session')} of {done['found']:,} at {address} taken over "
            f"in {done['seconds']:.1f} s, {done['left']:,} left to their clients"
        )
    sys.exit(0 if done["taken"] == done["found"] else 1)


async def _take(socket: str, request: control.Answer, timeout: float) -> control.Answer:
    answer = await control.call(socket, request)
    deadline, pause = time.monotonic() + timeout, POLL_SECONDS
    while answer["state"] == "running" and time.monotonic() < deadline:
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, POLL_SECONDS_MAX)
        answer = await control.call(socket, {"command": "takeover-progress", "address": request["address"]})
    return answer


@click.command("yield")
@options.gateway_config_option
@_address_option("The shared address, which another gateway has or gets.")
@click.option("--unless-here", is_flag=True, help="Do nothing if this host has the address: for VRRP's scripts.")
@options.json_option
def yield_(path: str | None, address: str, unless_here: bool, as_json: bool) -> None:
    """Drop the sessions at an address that gateways share, in silence (experimental).

    Clients receive no message: the gateway that gets the address takes their sessions over. From now on nothing of the
    address leaves this host.

    Exit code 0 when the bank has their last changes and the packet filter the rules of the fence, 1 otherwise.
    """
    socket = options.read_config(path, GatewayConfig).control
    try:
        done = event_loop.run(
            control.call(socket, {"command": "yield", "address": address, "unless_here": unless_here})
        )
    except control.ControlError as error:
        options.fail(error)
    except KeyboardInterrupt:
        sys.exit(130)
    if as_json:
        output.print_json(done)
    else:
        click.echo(f"{output.count(done['sessions'], 'session')} at {address} dropped in silence")
        if not done["stored"]:
            click.echo("the bank did not take their last changes: it does not answer", err=True)
        if not done["fenced"]:
            click.echo("the packet filter did not take the rules of the fence: see the log", err=True)
    sys.exit(0 if done["stored"] and done["fenced"] else 1)
