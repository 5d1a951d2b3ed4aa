"""The command line: `ike-sa-sync COMMAND`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_args

import click

from bridge import control
from bridge.config import ClientConfig, Config, ConfigError, GatewayConfig, LogLevel, canonical_address, load, read

if TYPE_CHECKING:
    from rich.table import Table

    from bridge.check import Finding

BAD_CONFIGURATION = 2
GATEWAY_FILE = "/etc/ike-sa-sync/gateway.yaml"
CLIENT_FILE = "/etc/ike-sa-sync/client.yaml"

Function = TypeVar("Function", bound=Callable[..., Any])


def fail(text: object, code: int = 1) -> NoReturn:
    """One line on stderr, and out."""
    click.echo(f"ike-sa-sync: {text}", err=True)
    sys.exit(code)


def read_config(path: str | None, kind: type[Config]) -> Config:
    """The configuration, or one line and exit 2."""
    try:
        return load(path or (GATEWAY_FILE if kind is GatewayConfig else CLIENT_FILE), kind)
    except ConfigError as error:
        fail(error, BAD_CONFIGURATION)


def read_any(path: str | None) -> GatewayConfig | ClientConfig:
    """A configuration of either role: one with `gateways` is a client's."""
    if path is None:
        path = GATEWAY_FILE if Path(GATEWAY_FILE).exists() or not Path(CLIENT_FILE).exists() else CLIENT_FILE
    try:
        raw = read(path)
    except ConfigError as error:
        fail(error, BAD_CONFIGURATION)
    if isinstance(raw, dict) and "gateways" in raw:
        return read_config(path, ClientConfig)
    return read_config(path, GatewayConfig)


def _config_option(default: str) -> Callable[[Function], Function]:
    where = f"Configuration file (YAML).  [default: {default}]"
    return click.option("-c", "--config", "path", metavar="FILE", help=where)


gateway_config_option = _config_option(GATEWAY_FILE)
"""-c FILE; without it the one that packages install"""
client_config_option = _config_option(CLIENT_FILE)
config_option = _config_option(f"{GATEWAY_FILE} or client.yaml")
"""where both roles have the command"""


def an_address(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """Callback of an argument or option: an IP address, as everything here writes it."""
    if value is None:
        return None
    try:
        return canonical_address(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not an IP address") from None


def json_option(function: Function) -> Function:
    """--json."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")(function)


def print_json(value: Any) -> None:
    """One value on stdout."""
    click.echo(json.dumps(value, indent=None, sort_keys=False))


def duration(seconds: float) -> str:
    """Seconds as a person reads them: 3h 12m."""
    left = int(seconds)
    if left < 0:
        return "expired"
    for size, unit, lower, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if left >= size:
            return f"{left // size}{unit} {left % size // lower}{name}"
    return f"{left}s"


def table(*columns: str, title: str | None = None) -> Table:
    """A table in the one style of all commands."""
    from rich import box
    from rich.table import Table

    return Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)


def show(*tables: Table) -> None:
    """Print tables; as wide as they are where nobody's terminal limits them, and in colour only on a terminal."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 1000)
    for each in tables:
        console.print(each)


@contextlib.contextmanager
def working(text: str) -> Iterator[None]:
    """Say on a terminal that something takes a while."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    console = Console(stderr=True)
    try:
        with console.status(text):
            yield
    finally:
        console.show_cursor()  # a signal may come while the status hides it


def count(number: int, thing: str) -> str:
    """1 stub, 2 stubs."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


LAZY = {
    "lab": ("bridge.lab.cli", "Real strongSwan hosts in network namespaces: try it, see it."),
    "bench": ("bridge.bench.cli", "Measure what resumption costs on this machine."),
    "drain": ("bridge.draining", "Move clients of this gateway to another one, while it lives."),
    "stubs": ("bridge.stubs", "Look at the stubs in the bank, delete or download them."),
    "monitor": ("bridge.monitor", "Watch the bank: gateways, stubs, resumptions, fallbacks."),
}
"""commands in modules that take long to import, which `resume` in an outage shall not wait for"""


class Commands(click.Group):
    """The commands of this file, and those of LAZY, imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *LAZY])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in LAZY:
            return super().get_command(ctx, cmd_name)
        command: click.Command = getattr(import_module(LAZY[cmd_name][0]), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [
            (name, LAZY[name][1] if name in LAZY else self.commands[name].get_short_help_str(100))
            for name in self.list_commands(ctx)
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="ike-sa-sync", prog_name="ike-sa-sync")
@click.pass_context
def cli(context: click.Context) -> None:
    """IKEv2 SA synchronization for session resumption (draft-xu-ike-sa-sync-01), beside an unmodified strongSwan.

    When a VPN gateway dies or is drained, its IKE_SAs continue on another one, in one round trip.

    Begin with `ike-sa-sync lab demo`, as root: it shows that on this machine, and leaves nothing behind.
    """
    if os.environ.get("NO_COLOR"):
        context.color = False


@cli.command()
@gateway_config_option
def gateway(path: str | None) -> None:
    """Run the gateway's sidecar, in the foreground.

    Stores a stub of every IKE_SA of the local charon in the bank, and answers clients that resume here.
    """
    config = read_config(path, GatewayConfig)
    from bridge.gatewayd import run_gateway

    _run(lambda: run_gateway(config))


@cli.command()
@client_config_option
def client(path: str | None) -> None:
    """Run the client's sidecar, in the foreground.

    Moves the local charon's IKE_SA to another gateway when its own dies, or when `resume` asks for it.
    """
    config = read_config(path, ClientConfig)
    from bridge.clientd import run_client

    _run(lambda: run_client(config))


def _run(main: Callable[[], None]) -> None:
    from bridge.daemon import StartError

    try:
        main()
    except ConfigError as error:
        fail(error, BAD_CONFIGURATION)
    except (StartError, control.ControlError) as error:
        fail(error)


def _call(path: str, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return asyncio.run(control.call(path, request))
    except control.ControlError as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)


@cli.command()
@client_config_option
@click.option("--connection", metavar="NAME", help="swanctl connection to move. [default: the first that is up]")
@click.option(
    "--to",
    metavar="ADDRESS",
    callback=an_address,
    help="Gateway to move to. [default: the configured ones in order]",
)
@json_option
def resume(path: str | None, connection: str | None, to: str | None, as_json: bool) -> None:
    """Move the client's session now.

    Asks the running client sidecar, and waits for the outcome.

    Exit code 0 when the session continues (resumed, or by an ordinary handshake: fallback), 1 when it does not.
    """
    config = read_config(path, ClientConfig)
    with working("moving the session"):
        outcome = _call(config.control, {"command": "resume", "connection": connection, "to": to})
    if as_json:
        print_json(outcome)
    else:
        _print_outcome(outcome)
    sys.exit(1 if outcome["result"] == "failed" else 0)


def _print_outcome(outcome: dict[str, Any]) -> None:
    where = f"{outcome['connection']} at {outcome['gateway']}" if outcome["gateway"] else outcome["connection"] or ""
    click.echo(f"{outcome['result']}: {where}")
    if outcome["spi_i"]:
        click.echo(f"  SPIs      {outcome['spi_i']}_i {outcome['spi_r']}_r")
    if outcome["children"]:
        click.echo(f"  CHILD_SAs {', '.join(outcome['children'])}")
    if outcome["exchange_ms"] is not None:
        click.echo(f"  answer    {outcome['exchange_ms']:.1f} ms")
    if outcome["total_ms"] is not None:
        click.echo(f"  total     {outcome['total_ms']:.1f} ms")
    if outcome["reason"]:
        click.echo(f"  reason    {outcome['reason']}")


@cli.command()
@config_option
@json_option
def status(path: str | None, as_json: bool) -> None:
    """Show what the running sidecar knows.

    IKE_SAs, unconfirmed ones, counters, and whether bank and charon answer.
    """
    config = read_any(path)
    answer = _call(config.control, {"command": "status"})
    if as_json:
        print_json(answer)
        return
    charon = answer["charon"]
    reach = f"reachable, release {charon['release']}" if charon["reachable"] else "NOT REACHABLE"
    if charon["reachable"]:
        reach += f", ha version {charon['ha_version']}" if charon["ha_plugin"] else ", ha plugin MISSING"
    click.echo(f"charon      {reach}")
    if "bank" in answer:
        bank = answer["bank"]
        click.echo(
            f"bank        {'reachable' if bank['reachable'] else 'NOT REACHABLE'}, "
            f"{count(bank['stubs'], 'stub')}, {count(bank['pending'], 'change')} waiting"
        )
        for each in bank["banks"]:
            reach = "reachable" if each["reachable"] else "NOT REACHABLE"
            click.echo(f"  {each['bank']:<17} {reach}, {each['pending']} changes waiting for it")
        click.echo(f"unconfirmed {answer['unconfirmed']}")
    if answer.get("last"):
        last = answer["last"]
        click.echo(f"last move   {last['result']} {last['gateway'] or ''} {last['reason'] or ''}".rstrip())
    click.echo()
    _print_sas(answer["sas"], answer["time"])
    counters = table("counter", "value")
    for name, value in answer["counters"].items():
        if value and not name.endswith("_sum"):
            counters.add_row(name, f"{value:g}")
    if counters.row_count:
        click.echo()
        show(counters)


def _print_sas(rows: list[dict[str, Any]], now: int) -> None:
    sas = table("connection", "peer", "identity", "virtual IPs", "CHILD_SAs", "expires in", "resumable")
    for row in rows:
        sas.add_row(
            row["connection"],
            row["remote"] or "",
            row["remote_id"] or "",
            " ".join(row["virtual_ips"]),
            " ".join(row["children"]),
            duration(row["expires"] - now),
            "yes" if row["resumable"] else "no",
        )
    if rows:
        show(sas)
    else:
        click.echo("no IKE_SA")


@cli.command("log-level")
@config_option
@click.argument("level", required=False, type=click.Choice(get_args(LogLevel)))
@json_option
def log_level(path: str | None, level: str | None, as_json: bool) -> None:
    """Show or set the level of the running sidecar's log.

    Until it is restarted: then `log.level` of its configuration holds again.
    """
    answer = _call(read_any(path).control, {"command": "log-level", "level": level})
    if as_json:
        print_json(answer)
    else:
        click.echo(answer["level"])


@cli.command()
@config_option
@json_option
def check(path: str | None, as_json: bool) -> None:
    """Say whether this host is ready.

    Each finding comes with its mend; exit code 1 when something fails.
    """
    config = read_any(path)
    from bridge import log as logging
    from bridge.check import Grade, run_checks

    logging.configure("warning")
    with working("looking"):
        findings = asyncio.run(run_checks(config))
    if as_json:
        print_json([finding.as_dict() for finding in findings])
    else:
        _print_findings(findings)
    sys.exit(1 if any(finding.grade is Grade.FAIL for finding in findings) else 0)


def _print_findings(findings: list[Finding]) -> None:
    from bridge.check import Grade

    colour = {Grade.OK: "green", Grade.WARN: "yellow", Grade.FAIL: "red"}
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        grade = f"{finding.grade.upper() if finding.grade is Grade.FAIL else finding.grade:<4}"
        click.echo(f"{click.style(grade, fg=colour[finding.grade])}  {finding.name:<{width}}  {finding.text}")
        if finding.mend:
            click.echo(f"{'':<{width + 6}}  mend: {finding.mend}")
    grades = Counter(finding.grade for finding in findings)
    click.echo(f"{count(len(findings), 'check')}: {grades[Grade.FAIL]} fail, {grades[Grade.WARN]} warn")


@cli.command()
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--add", is_flag=True, help="Put a new key in front of those in FILE: it seals, the old ones still open.")
@json_option
def keygen(file: str, add: bool, as_json: bool) -> None:
    """Write a new bank key to FILE (mode 0600). All gateways of one bank need the same file."""
    from bridge.seal import SealError, generate

    try:
        key_id = generate(Path(file), add=add)
    except SealError as error:
        fail(error)
    except OSError as error:
        fail(f"{file} cannot be written: {error.strerror}")
    if as_json:
        print_json({"file": file, "key": key_id, "added": add})
    else:
        click.echo(f"{file}: key {key_id}{' added in front' if add else ''}")


def main() -> None:
    """Run one command; errors are one line each, and an exit code."""
    try:
        code = cli.main(prog_name="ike-sa-sync", standalone_mode=False)
    except click.UsageError as error:
        error.show()
        code = BAD_CONFIGURATION
    except click.ClickException as error:
        click.echo(f"ike-sa-sync: {error.format_message()}", err=True)
        code = error.exit_code
    except click.Abort:
        code = 130
    sys.exit(code or 0)
