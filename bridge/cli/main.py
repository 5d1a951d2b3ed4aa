"""The command line: `ike-sa-sync COMMAND`."""

from __future__ import annotations

import os
import sys
from importlib import import_module

import click

from bridge.cli import commands
from bridge.cli.options import BAD_CONFIGURATION

LAZY = {
    "lab": ("bridge.lab.cli", "Real strongSwan hosts in network namespaces: try it, see it."),
    "bench": ("bridge.bench.cli", "Measure what resumption costs on this machine."),
    "drain": ("bridge.cli.drain", "Move clients of this living gateway to another one."),
    "takeover": ("bridge.cli.takeover", "Take over the sessions at an address that gateways share."),
    "yield": ("bridge.cli.takeover", "Drop the sessions at an address that gateways share, in silence."),
    "stubs": ("bridge.cli.stubs", "List, show, delete or download the stubs in the bank."),
    "revoke": ("bridge.cli.revoke", "Lock an identity out at all gateways."),
    "revoked": ("bridge.cli.revoke", "List the identities that are locked out."),
    "unrevoke": ("bridge.cli.revoke", "Let a locked-out identity in again."),
    "monitor": ("bridge.cli.monitor", "Watch the bank: gateways, stubs, resumptions, fallbacks."),
}
"""commands in modules that take long to import: `resume` in an outage does not wait for them"""


class Commands(click.Group):
    """The commands of this file, and those of LAZY, imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *LAZY])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in LAZY:
            return super().get_command(ctx, cmd_name)
        # `yield` is a word of Python
        name = "yield_" if cmd_name == "yield" else cmd_name
        command: click.Command = getattr(import_module(LAZY[cmd_name][0]), name)
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

    Begin with `ike-sa-sync lab demo`, as root: it shows a failover on this machine, and removes everything afterwards.
    """
    if os.environ.get("NO_COLOR"):
        context.color = False


for command in (
    commands.gateway,
    commands.client,
    commands.run,
    commands.resume,
    commands.status,
    commands.log_level,
    commands.check,
    commands.keygen,
):
    cli.add_command(command)


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
