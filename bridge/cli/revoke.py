"""`ike-sa-sync revoke`, `unrevoke` and `revoked`: an identity is locked out at all gateways."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from contextlib import aclosing
from typing import Any

import click

from bridge.bank.interface import BankUnavailable, Ending, StubBank
from bridge.cli import options, output
from bridge.cli.stubs import with_bank
from bridge.stub.bank_keys import LOCKOUT_KIND
from bridge.stub.keyring import Keyring, SealError
from bridge.stub.revocation import TEXT_MAX, Mark, canonical, names_of, open_mark, seal
from bridge.stub.types import printable

REPORT_SECONDS = 10.0
"""how long living gateways have to report that they enforce a mark"""
POLL_SECONDS = 0.2


def _an_identity(_: click.Context, __: click.Parameter, value: str) -> str:
    if not canonical(value) or len(value) > TEXT_MAX or not value.isprintable():
        raise click.BadParameter("an identity is 1 to 1024 printable characters")
    return value


@click.command()
@options.gateway_config_option
@click.argument("identity", callback=_an_identity)
@click.option(
    "--for",
    "seconds",
    type=options.Duration(),
    default="30d",
    show_default=True,
    help="Duration: at least as long as its certificate or password stays valid.",
)
@options.json_option
def revoke(path: str | None, identity: str, seconds: int, as_json: bool) -> None:
    """Lock an identity out.

    IDENTITY is the client's IKE or EAP identity as `swanctl --list-sas` or `stubs show` prints it. The
    command deletes its stubs in all banks. All living gateways end its IKE_SAs, whether the client answers or not, and
    no gateway rebuilds or keeps a session of it, until `unrevoke` or until the time has passed. Revoke its certificate
    or password as well: the lock-out works only while sidecars run.

    Exit code 0 when all living gateways reported that they enforce it, 1 when one did not.
    """

    async def work(bank: StubBank, keyring: Keyring) -> dict[str, Any]:
        mark = Mark(identity, True, int(time.time() * 1000), int(time.time()) + seconds)
        before = await _reports(bank)
        await _put(bank, keyring, mark)
        deleted = await _delete_stubs(bank, mark)
        return {
            "identity": identity,
            "until": mark.expires,
            "stubs_deleted": deleted,
            "gateways": await _await_reports(bank, mark, before),
        }

    with output.working("locking out"):
        done = with_bank(path, work)
    if as_json:
        output.print_json(done)
    else:
        click.echo(f"{printable(identity)} is locked out until {_date(done['until'])}")
        click.echo(f"{output.count(done['stubs_deleted'], 'stub')} deleted")
        _print_gateways(done["gateways"])
    sys.exit(0 if all(row["enforced"] for row in done["gateways"]) else 1)


@click.command()
@options.gateway_config_option
@click.argument("identity", callback=_an_identity)
@options.json_option
def unrevoke(path: str | None, identity: str, as_json: bool) -> None:
    """Let a locked-out identity in again.

    Its client needs a full handshake: the stubs of its sessions were deleted.
    """

    async def work(bank: StubBank, keyring: Keyring) -> dict[str, Any]:
        marks = {mark.name: mark for mark in await _marks(bank, keyring)}
        old = marks.get(canonical(identity))
        before = await _reports(bank)
        if old is None:
            newest = max((mark.made for mark in marks.values()), default=0)
            if any(_number(report, "latest") > newest for report in before.values()):
                options.fail("the bank lost a mark that gateways write again within 30 s: repeat the command then")
            options.fail(f"{printable(identity)} is not locked out; `ike-sa-sync revoked` names those that are")
        if old.revoked:
            # as long as the older mark could come back from a bank that was away
            mark = Mark(identity, False, max(int(time.time() * 1000), old.made + 1), old.expires)
            await _put(bank, keyring, mark)
        else:
            # repeated, since a gateway had not reported
            mark = old
        return {"identity": identity, "gateways": await _await_reports(bank, mark, before)}

    done = with_bank(path, work)
    if as_json:
        output.print_json(done)
    else:
        click.echo(f"{printable(identity)} is let in again")
        _print_gateways(done["gateways"])
    sys.exit(0 if all(row["enforced"] for row in done["gateways"]) else 1)


@click.command()
@options.gateway_config_option
@options.json_option
def revoked(path: str | None, as_json: bool) -> None:
    """List the identities that are locked out."""

    async def work(bank: StubBank, keyring: Keyring) -> list[Mark]:
        now = time.time()
        return [mark for mark in await _marks(bank, keyring) if mark.revoked and mark.expires > now]

    marks = with_bank(path, work)
    if as_json:
        output.print_json(
            [{"identity": mark.identity, "since": mark.made // 1000, "until": mark.expires} for mark in marks]
        )
        return
    table = output.table("identity", "since", "until")
    for mark in marks:
        table.add_row(printable(mark.identity), _date(mark.made // 1000), _date(mark.expires))
    if marks:
        output.show(table)
    else:
        click.echo("no identity is locked out")


async def _marks(bank: StubBank, keyring: Keyring) -> list[Mark]:
    """The newest mark of each identity, by identity; those that do not open are counted on stderr."""
    newest: dict[str, Mark] = {}
    left_out, reason = 0, ""
    for sealed in {sealed for marks in await bank.revocations() for sealed in marks}:
        try:
            mark = open_mark(sealed, keyring)
        except SealError as error:
            left_out, reason = left_out + 1, str(error)
            continue
        if mark.name not in newest or newest[mark.name].made < mark.made:
            newest[mark.name] = mark
    if left_out:
        click.echo(f"ike-sa-sync: {output.count(left_out, 'mark')} in the bank left out: {reason}", err=True)
    return [newest[name] for name in sorted(newest)]


async def _put(bank: StubBank, keyring: Keyring, mark: Mark) -> None:
    stale = []
    for sealed in {sealed for marks in await bank.revocations() for sealed in marks}:
        try:
            if open_mark(sealed, keyring).name == mark.name:
                stale.append(sealed)
        except SealError:
            # another key's: not for this command to take away
            continue
    await bank.put_revocations({seal(mark, keyring): mark.expires}, stale)


async def _delete_stubs(bank: StubBank, mark: Mark) -> int:
    """Delete the stubs of an identity, by their sealed parts, of all gateways that the bank has stubs of."""
    gateways = set(await bank.gateways())
    async with aclosing(bank.list()) as pages:
        async for rows in pages:
            gateways.update(row.index.gateway for row in rows)
    deleted = 0
    for gateway in sorted(gateways):
        found = []
        async for stubs in bank.download(gateway):
            found += [
                Ending(stub.index, stub.expires)
                for stub in stubs
                if mark.name in names_of((stub.remote_id, stub.eap_id))
            ]
        if found:
            deleted += sum(await bank.delete(found))
    return deleted


async def _reports(bank: StubBank) -> dict[str, dict[str, Any]]:
    """What each living gateway reported last."""
    reports = {}
    for gateway, sign in (await bank.gateways()).items():
        if sign.alive:
            try:
                report = json.loads(await bank.posted(LOCKOUT_KIND, gateway) or b"{}")
            except ValueError:
                report = {}
            reports[gateway] = report if isinstance(report, dict) else {}
    return reports


async def _await_reports(bank: StubBank, mark: Mark, before: dict[str, Any]) -> list[dict[str, Any]]:
    """Wait until all living gateways report that they know the mark."""
    deadline = time.monotonic() + REPORT_SECONDS
    while True:
        try:
            reports = before | await _reports(bank)
        except BankUnavailable:
            reports = before
        rows = [
            {
                "gateway": gateway,
                "enforced": _number(report, "latest") >= mark.made,
                "ended": _number(report, "ended") if _number(report, "latest") >= mark.made else 0,
            }
            for gateway, report in sorted(reports.items())
        ]
        # a bank that was just emptied names its gateways with their next heartbeats
        if (rows and all(row["enforced"] for row in rows)) or time.monotonic() > deadline:
            return rows
        await asyncio.sleep(POLL_SECONDS)


def _number(report: dict[str, Any], name: str) -> int:
    value = report.get(name)
    return value if isinstance(value, int) else 0


def _print_gateways(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        what = (
            f"{output.count(row['ended'], 'IKE_SA')} ended" if row["enforced"] else "did NOT report: is its sidecar up?"
        )
        click.echo(f"  {row['gateway']:<17} {what}")
    if not rows:
        click.echo("  no gateway has a heartbeat in the bank")


def _date(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
