"""How the command line prints: JSON, tables, progress."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.table import Table


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
    """Print tables; in full width unless a terminal limits them, in colour only on a terminal."""
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
