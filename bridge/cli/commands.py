"""The commands that run a sidecar or ask one: gateway, client, run, resume, status, check, keygen."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from bridge.cli import event_loop
from bridge.cli.options import (
    BAD_CONFIGURATION,
    CLIENT_FILE,
    GATEWAY_FILE,
    Duration,
    an_address,
    client_config_option,
    config_option,
    fail,
    gateway_config_option,
    json_option,
    read_any,
    read_config,
    read_roles,
)
from bridge.cli.output import count, duration, print_json, show, table, working
from bridge.config import ClientConfig, ConfigError, GatewayConfig, LogLevel
from bridge.service import control

if TYPE_CHECKING:
    from bridge.check import Finding


@click.command()
@gateway_config_option
def gateway(path: str | None) -> None:
    """Run the gateway's sidecar, in the foreground.

    Stores a stub of every IKE_SA of the local charon in the bank, and answers clients that resume here.
    """
    config = read_config(path, GatewayConfig)
    _run(config)


@click.command()
@client_config_option
def client(path: str | None) -> None:
    """Run the client's sidecar, in the foreground.

    Moves the local charon's IKE_SA to another gateway when its own dies, or when `resume` asks for it.
    """
    config = read_config(path, ClientConfig)
    _run(config)


@click.command()
@click.option(
    "-c",
    "--config",
    "paths",
    metavar="FILE",
    multiple=True,
    help=f"Configuration file (YAML), once for each role.  [default: {GATEWAY_FILE} and client.yaml, if there]",
)
def run(paths: tuple[str, ...]) -> None:
    """Run the sidecar in the roles that its configuration files have, in the foreground.

    A host may be a gateway for some peers and a client of others. Without any file it is a client of the VPNs that
    charon has sessions of.
    """
    _run(*read_roles(paths))


def _run(*configs: GatewayConfig | ClientConfig) -> None:
    from bridge.service.process import StartError, TaskFailed
    from bridge.sidecar import run_sidecar

    try:
        run_sidecar(configs)
    except ConfigError as error:
        fail(error, BAD_CONFIGURATION)
    except (StartError, control.ControlError) as error:
        fail(error)
    except TaskFailed:
        # the units start it again (Restart=on-failure)
        sys.exit(1)


def _call(path: str, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return event_loop.run(control.call(path, request))
    except control.ControlError as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)


@click.command()
@client_config_option
@click.option("--connection", metavar="NAME", help="Session of this swanctl connection.")
@click.option("--vpn", metavar="NAME", help="Session of this VPN. [default: a lost session, else the first that is up]")
@click.option(
    "--to",
    metavar="ADDRESS",
    callback=an_address,
    help="Gateway to move to. [default: those of its VPN in order]",
)
@json_option
def resume(path: str | None, connection: str | None, vpn: str | None, to: str | None, as_json: bool) -> None:
    """Move a session of this client now.

    Asks the running client's sidecar, and waits for the outcome.

    Exit code 0 when the session continues (resumed, or by a full handshake: fallback), 1 when it does not.
    """
    config = read_config(path, ClientConfig)
    with working("moving the session"):
        outcome = _call(config.control, {"command": "resume", "connection": connection, "vpn": vpn, "to": to})
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


def _print_shared(row: dict[str, Any]) -> None:
    """An address that gateways share, and what the last takeover left out."""
    here = f"{row['state']}, {count(row['sessions'], 'session')}, {row['taken_over']:,} of them taken over"
    click.echo(f"shared      {row['address']}: {here}")
    last = row["last"] or {}
    for left in last.get("not_taken", ()):
        click.echo(f"  {left['sessions']:,} not taken over: {left['reason']}")
    for one in last.get("failures", ()):
        click.echo(f"    {one['identity']} at {one['address']}: {one['reason']}")
    if last.get("left"):
        click.echo(f"  {last['left']:,} left to their clients, which answer no request")


@click.command()
@config_option
@json_option
def status(path: str | None, as_json: bool) -> None:
    """Show the state of the running sidecar.

    IKE_SAs, unconfirmed SAs, counters, whether bank and charon answer, and whether compiled code runs.
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
    if "code" in answer:
        # a sidecar of an earlier version, which an update has not restarted yet, does not say it
        click.echo(f"code        {answer['code']}")
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
    for each in (answer.get("takeover") or {}).get("addresses", ()):
        _print_shared(each)
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
    # a client's SAs have a VPN
    vpn = ["VPN"] if any("vpn" in row for row in rows) else []
    sas = table(*vpn, "connection", "peer", "identity", "virtual IPs", "CHILD_SAs", "expires in", "resumable")
    for row in rows:
        sas.add_row(
            *([row["vpn"] or ""] if vpn else []),
            row["connection"],
            row["remote"] or "",
            row["remote_id"] or "",
            " ".join(row["virtual_ips"]),
            " ".join(row["children"]),
            duration(row["expires"] - now),
            ("yes" if row["resumable"] else "no") + (", taken over" if row.get("taken_over") else ""),
        )
    if rows:
        show(sas)
    else:
        click.echo("no IKE_SA")


@click.command("log-level")
@config_option
@click.argument("level", required=False, type=click.Choice(get_args(LogLevel)))
@json_option
def log_level(path: str | None, level: str | None, as_json: bool) -> None:
    """Show or set the level of the running sidecar's log.

    The level applies until the sidecar is restarted: then `log.level` of its configuration applies again.
    """
    answer = _call(read_any(path).control, {"command": "log-level", "level": level})
    if as_json:
        print_json(answer)
    else:
        click.echo(answer["level"])


@click.command()
@config_option
@click.option("--plan", "planning", is_flag=True, help="Report which sessions would resume; needs no configuration.")
@click.option("--write", is_flag=True, help="With --plan: write the proposed files if they do not exist.")
@json_option
def check(path: str | None, planning: bool, write: bool, as_json: bool) -> None:
    """Report whether this host is ready.

    Each problem comes with its fix; exit code 1 when a check fails.
    """
    if write and not planning:
        raise click.UsageError("--write goes with --plan")
    if planning:
        _plan(path, write, as_json)
        return
    configs = read_roles([path] if path is not None else [])
    from bridge.check import Grade, run_checks
    from bridge.service import log as logging

    logging.configure("warning")
    with working("looking"):
        # of two roles on one host, what is about its charon once
        findings = list(dict.fromkeys(finding for one in configs for finding in event_loop.run(run_checks(one))))
    if as_json:
        print_json([finding.as_dict() for finding in findings])
    else:
        _print_findings(findings)
    sys.exit(1 if any(finding.grade is Grade.FAIL for finding in findings) else 0)


def _plan(path: str | None, write: bool, as_json: bool) -> None:
    from bridge.check.plan import plan
    from bridge.service import log as logging

    logging.configure("warning")
    config = ClientConfig() if path is None else read_any(path)
    with working("looking"):
        made = event_loop.run(plan(config))
    if as_json:
        print_json(made.as_dict())
    else:
        rows = table("connection", "as", "resumable", "sessions", "why")
        for row in made.rows:
            rows.add_row(row.connection, row.role, "yes" if row.resumable else "NO", str(row.sessions), row.why)
        if made.rows:
            show(rows)
            click.echo()
        if made.findings:
            _print_findings(made.findings)
    for role, text in made.files.items():
        file = Path(GATEWAY_FILE if role == "gateway" else CLIENT_FILE)
        if write:
            _write_new(file, text)
        elif not as_json:
            click.echo(f"\n{file}, as --write would write it:\n\n{text}", nl=False)
    sys.exit(0 if made.rows else 1)


def _write_new(file: Path, text: str) -> None:
    """A file where there is none. Says so on stderr, for --json has stdout."""
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with file.open("x") as out:
            out.write(text)
    except FileExistsError:
        click.echo(f"{file} is there already, and stays as it is", err=True)
    except OSError as error:
        fail(f"{file} cannot be written: {error.strerror}")
    else:
        click.echo(f"{file} written", err=True)


def _print_findings(findings: list[Finding]) -> None:
    from bridge.check import Grade

    colour = {Grade.OK: "green", Grade.WARN: "yellow", Grade.FAIL: "red"}
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        grade = f"{finding.grade.upper() if finding.grade is Grade.FAIL else finding.grade:<4}"
        click.echo(f"{click.style(grade, fg=colour[finding.grade])}  {finding.name:<{width}}  {finding.text}")
        if finding.fix:
            click.echo(f"{'':<{width + 6}}  fix: {finding.fix}")
    grades = Counter(finding.grade for finding in findings)
    click.echo(f"{count(len(findings), 'check')}: {grades[Grade.FAIL]} fail, {grades[Grade.WARN]} warn")


@click.command()
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--add", is_flag=True, help="Put a new key in front of those in FILE: it seals, the old keys still open.")
@click.option("--epoch", type=Duration(), help="How long the key seals, such as 1d; the next key is derived from it.")
@json_option
def keygen(file: str, add: bool, epoch: int | None, as_json: bool) -> None:
    """Write a new bank key to FILE (mode 0600). All gateways of one bank need the same file.

    With --epoch every gateway derives the next key in time and rewrites its own FILE with it: a stolen key then cannot
    open stubs in old files of the bank that expired in an earlier epoch.
    """
    from bridge.stub.keyring import EPOCH_MIN, SealError, generate

    if epoch is not None and epoch < EPOCH_MIN:
        fail(f"--epoch: at least {EPOCH_MIN // 60} minutes", BAD_CONFIGURATION)
    try:
        key_id = generate(Path(file), add=add, epoch=epoch)
    except SealError as error:
        fail(error)
    except OSError as error:
        fail(f"{file} cannot be written: {error.strerror}")
    if as_json:
        print_json({"file": file, "key": key_id, "added": add})
    else:
        click.echo(f"{file}: key {key_id}{' added in front' if add else ''}")
