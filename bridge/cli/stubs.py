"""`ike-sa-sync stubs`: the content of the bank, without secrets."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Coroutine
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bridge.bank import open_bank
from bridge.bank.interface import BankUnavailable, Ending, StubBank
from bridge.cli import event_loop, options, output
from bridge.config import GatewayConfig
from bridge.service import control
from bridge.service import log as logging
from bridge.stub.keyring import Keyring, SealError
from bridge.stub.readable import Readable
from bridge.stub.revocation import canonical
from bridge.stub.stub import Index, Stub

Result = TypeVar("Result")

SPI_OCTETS = 8
TIMES = ("established", "rekey_at", "reauth_at", "expires")
"""what `describe` gives in Unix seconds, 0 for never"""


@click.group()
def stubs() -> None:
    """List, show, delete or download the stubs in the bank."""


def with_bank(path: str | None, work: Callable[[StubBank, Keyring], Coroutine[Any, Any, Result]]) -> Result:
    """What `work` gives with the bank of a gateway's configuration and its keys; or one line, and exit 1."""
    config = options.read_config(path, GatewayConfig)
    # on stderr: what is printed may be JSON
    logging.configure("warning")

    async def main() -> Result:
        keyring = Keyring.load(config.bank.key_file)
        bank = await open_bank(config.bank, keyring)
        try:
            return await work(bank, keyring)
        finally:
            await bank.close()

    try:
        return event_loop.run(main())
    except BankUnavailable as error:
        own = "without bank.url this is the sidecar's own Redis: does the sidecar run?"
        options.fail(f"{error}; {'is bank.url right, and the server up?' if config.bank.url else own}")
    except (SealError, OSError) as error:
        options.fail(error)


@stubs.command("list")
@options.gateway_config_option
@click.option("--gateway", metavar="ADDRESS", callback=options.an_address, help="Only this gateway's stubs.")
@click.option("--identity", metavar="PATTERN", help="Only stubs with an IKE or EAP identity like this: *@example.org.")
@options.json_option
def list_(path: str | None, gateway: str | None, identity: str | None, as_json: bool) -> None:
    """List the stubs, by their cleartext fields.

    A user with write access to the bank can forge these fields; gateways do not trust them.
    """

    async def work(bank: StubBank, _: Keyring) -> list[Readable]:
        return [row async for rows in bank.list(gateway) for row in rows if identity is None or _like(row, identity)]

    rows = with_bank(path, work)
    if as_json:
        output.print_json([row.as_dict() for row in rows])
        return
    table = output.table(
        "gateway", "SPI", "initiator", "responder", "EAP identity", "connection", "virtual IPs", "expires in"
    )
    for row in rows:
        table.add_row(
            row.index.gateway,
            row.index.spi.hex(),
            row.id_i,
            row.id_r,
            row.eap_id,
            row.connection,
            " ".join(row.vips),
            output.duration(row.expires - time.time()),
        )
    if rows:
        output.show(table)
    click.echo(output.count(len(rows), "stub"))


def _like(row: Readable, pattern: str) -> bool:
    return any(
        fnmatchcase(canonical(identity), canonical(pattern))
        for identity in (row.id_i, row.id_r, row.eap_id)
        if identity
    )


def _a_spi(_: click.Context, __: click.Parameter, value: str) -> bytes:
    try:
        octets = bytes.fromhex(value)
    except ValueError:
        octets = b""
    if len(octets) != SPI_OCTETS:
        raise click.BadParameter(f"{value!r} is not an IKE SPI: 16 hex digits")
    return octets


@stubs.command()
@options.gateway_config_option
@click.argument("gateway", callback=options.an_address)
@click.argument("spi", callback=_a_spi)
@options.json_option
def show(path: str | None, gateway: str, spi: bytes, as_json: bool) -> None:
    """Show one stub, opened with the key file, without its keys.

    GATEWAY and SPI (16 hex digits) are those that `list` prints.
    """
    index = Index(gateway, spi)

    async def work(bank: StubBank, _: Keyring) -> tuple[Stub | None, int]:
        return (await bank.get([index]))[0], bank.unreadable

    stub, unreadable = with_bank(path, work)
    if stub is None:
        options.fail(f"{index.key} does not open: see above" if unreadable else f"no stub {index.key}")
    facts = describe(stub)
    if as_json:
        output.print_json(facts)
        return
    for name, value in facts.items():
        if name != "children":
            click.echo(f"{name:<14} {_text(name, value)}".rstrip())
    table = output.table("CHILD_SA", "mode", "algorithms", "local", "remote")
    for child in facts["children"]:
        table.add_row(
            child["name"],
            child["mode"],
            child["algorithms"],
            "\n".join(child["local_ts"]),
            "\n".join(child["remote_ts"]),
        )
    if facts["children"]:
        output.show(table)


def _text(name: str, value: Any) -> str:
    """A value of `describe` for people."""
    if name in TIMES:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(value)) if value else "never"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, list) else str(value or "")


def describe(stub: Stub) -> dict[str, Any]:
    """A stub without its secrets."""
    return {
        "gateway": stub.index.gateway,
        "spi": stub.index.spi.hex(),
        "spi_i": stub.spi_i.hex(),
        "spi_r": stub.spi_r.hex(),
        "initiator": stub.initiator,
        "local_id": stub.local_id.text,
        "remote_id": stub.remote_id.text,
        "eap_id": stub.eap_id.text if stub.eap_id else None,
        "proposal": stub.suite.name,
        "connection": stub.connection,
        "local": f"{stub.local.address}[{stub.local.port}]",
        "remote": f"{stub.remote.address}[{stub.remote.port}]",
        "virtual_ips": list(stub.remote_vips or stub.local_vips),
        "revision": stub.revision,
        "established": stub.established,
        "rekey_at": stub.rekey_at,
        "reauth_at": stub.reauth_at,
        "expires": stub.expires,
        "shared_secret": "carried" if stub.shared_secret else "left out",
        "children": [
            {
                "name": child.name,
                "mode": {1: "transport", 2: "tunnel", 3: "BEET"}.get(child.mode, str(child.mode)),
                "algorithms": child.algorithms,
                "local_ts": [selector.text for selector in child.local_ts],
                "remote_ts": [selector.text for selector in child.remote_ts],
            }
            for child in stub.children
        ],
    }


@stubs.command()
@options.gateway_config_option
@click.argument("gateway", callback=options.an_address)
@click.argument("spi", callback=_a_spi)
@options.json_option
def delete(path: str | None, gateway: str, spi: bytes, as_json: bool) -> None:
    """Delete one stub.

    Its client then has to perform a full handshake. GATEWAY and SPI (16 hex digits) are those that `list` prints.
    """
    index = Index(gateway, spi)

    async def work(bank: StubBank, _: Keyring) -> bool:
        return (await bank.delete([Ending(index, 0)]))[0]

    deleted = with_bank(path, work)
    if as_json:
        output.print_json({"deleted": deleted, "gateway": gateway, "spi": spi.hex()})
    elif deleted:
        click.echo(f"deleted {index.key}")
    if not deleted and not as_json:
        options.fail(f"no stub {index.key}")
    if not deleted:
        raise SystemExit(1)


@stubs.command()
@options.gateway_config_option
@click.option(
    "--from",
    "gateway",
    required=True,
    metavar="ADDRESS",
    callback=options.an_address,
    help="The gateway whose stubs to fetch.",
)
@options.json_option
def download(path: str | None, gateway: str, as_json: bool) -> None:
    """Make the other gateways fetch the stubs of one gateway.

    Do this before its clients come. Shows the progress of the sidecar on this host, and the number of stubs it fetched.
    """
    config = options.read_config(path, GatewayConfig)
    try:
        done = event_loop.run(_download(config.control, gateway, sys.stderr.isatty() and not as_json))
    except control.ControlError as error:
        options.fail(error)
    if as_json:
        output.print_json(done)
    elif done["state"] == "own":
        click.echo(f"{gateway} is this gateway: all others fetch its stubs")
    else:
        click.echo(f"{done['state']}: {output.count(done['stubs'], 'stub')} of {gateway} in {done['seconds']:.2f} s")
        if done["state"] == "done" and not done["stubs"]:
            click.echo("the bank has none of that gateway; `ike-sa-sync stubs list` names those it has")
    sys.exit(0 if done["state"] in ("done", "own") else 1)


async def _download(socket: str, gateway: str, show: bool) -> control.Answer:
    answer = await control.call(socket, {"command": "fetch", "from": gateway})
    with Progress(
        TextColumn("{task.description}"),
        SpinnerColumn(),
        TextColumn("{task.completed} stubs"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=not show,
        transient=True,
    ) as progress:
        task = progress.add_task(f"stubs of {gateway}", total=None)
        while answer["state"] == "running":
            await asyncio.sleep(0.1)
            answer = await control.call(socket, {"command": "fetched", "from": gateway})
            progress.update(task, completed=answer["stubs"])
    return answer
