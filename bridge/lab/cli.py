"""`ike-sa-sync lab`: the lab on the command line."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click

from bridge.cli.options import json_option
from bridge.cli.output import print_json, working
from bridge.lab import demo as demonstration
from bridge.lab import space
from bridge.lab.lab import Lab
from bridge.lab.space import LabError
from bridge.lab.topology import SERVER, standard

Result = TypeVar("Result")


@click.group()
def lab() -> None:
    """Real strongSwan hosts in network namespaces: a bank, two gateways, a server, a client.

    \b
        client 192.168.50.10 ---+--- gw1 192.168.50.1 ---+--- server 10.10.1.10
                                +--- gw2 192.168.50.2 ---'
                                +--- bank 192.168.50.20 (Redis)

    Needs root. Nothing outside the namespaces is changed: not the network, the files or the daemons of this machine.
    """


def _reporting(work: Callable[[], Result]) -> Result:
    try:
        return work()
    except LabError as error:
        raise click.ClickException(str(error)) from None


@lab.command()
@json_option
def demo(as_json: bool) -> None:
    """Kill a gateway, and see its session go on at another."""
    start = time.monotonic()

    def say(heading: str, text: str) -> None:
        elapsed = time.monotonic() - start
        click.echo(f"{elapsed:6.2f} s  {click.style(f'{heading:<8}', bold=True)}  {text}", err=as_json)

    outcome = _reporting(lambda: demonstration.run(say))
    if outcome["result"] != "resumed":
        raise click.ClickException(f"the session was not resumed: {outcome['result']}, {outcome['reason']}")
    if as_json:
        print_json(outcome)
        return
    result = f"resumed with {outcome['lost']} of {outcome['sent']} packets lost; the lab is gone again"
    click.echo(click.style(result, fg="green"))


@lab.command()
@click.option("--name", default="lab", show_default=True, help="Name of the lab; its namespaces are NAME-gw1 ...")
def up(name: str) -> None:
    """Set the standard lab up, and leave it there.

    The client has a session at gw1.
    """

    def work() -> None:
        with Lab(name, keep=True) as built:
            standard(built, ha_pools=True).connect()

    with working(f"setting lab {name} up: bank, gw1, gw2, server, client"):
        _reporting(work)
    click.echo(f"lab {name} is up: bank, gw1, gw2, server, and client with a session at gw1")
    which = "" if space.labs() == [name] else f"--lab {name} "
    click.echo(f"  ike-sa-sync lab shell {which}client ping {SERVER}")
    click.echo(f"  ike-sa-sync lab shell {which}gw1 swanctl --list-sas")
    click.echo(f"  ike-sa-sync lab clean {name if which else ''}".rstrip())


@lab.command()
@click.argument("names", nargs=-1, metavar="[LAB]...")
def clean(names: tuple[str, ...]) -> None:
    """Remove labs that were left behind.

    Without a name, all that no running process uses.
    """
    _reporting(space.need_root)
    if not names and not space.labs():
        click.echo("no lab here")
    for name in names or space.labs():
        if name not in space.labs() and not space.namespaces(name):
            click.echo(f"no lab {name} here")
        elif space.is_owned(name):
            click.echo(f"lab {name} is in use, left alone")
        else:
            _reporting(lambda name=name: space.remove(name))  # type: ignore[misc]
            click.echo(f"lab {name} removed")


def _host(name: str | None, host: str) -> tuple[str, int]:
    """The network namespace of a host, and the process that holds it."""
    _reporting(space.need_root)
    labs = [name] if name else space.labs()
    if len(labs) != 1:
        raise click.ClickException(f"{len(labs)} labs here ({', '.join(labs) or 'none'}): choose one with --lab")
    directory = space.STATE / labs[0] / host
    try:
        holder = int((directory / space.HOLDER).read_text())
    except FileNotFoundError:
        hosts = sorted(entry.name for entry in directory.parent.glob("*") if (entry / space.HOLDER).exists())
        raise click.ClickException(f"no host {host} in lab {labs[0]}: {', '.join(hosts) or 'none'}") from None
    return f"{labs[0]}-{host}", holder


@lab.command()
@click.option("--lab", "name", default=None, help="Which lab, if there are several.")
@click.argument("host")
def kill(name: str | None, host: str) -> None:
    """Fail a host of a running lab, as a machine does.

    SIGKILL to everything that runs on it; its SAs are lost, and no peer receives a DELETE.
    """
    namespace, holder = _host(name, host)
    _reporting(lambda: space.kill_all(namespace, spare=holder))
    space.forget_sas(namespace)
    click.echo(f"{host} is dead")


@lab.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--lab", "name", default=None, help="Which lab, if there are several.")
@click.argument("host")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def shell(name: str | None, host: str, command: tuple[str, ...]) -> None:
    """Run COMMAND, or a shell, on a host of a running lab.

    The hosts are bank, gw1, gw2, server and client.
    """
    _, holder = _host(name, host)
    argv = [*space.into(holder), *(command or (os.environ.get("SHELL", "/bin/sh"),))]
    # so that `ike-sa-sync` there is this one
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    sys.stdout.flush()
    os.execvp(argv[0], argv)  # noqa: S606
