"""`ike-sa-sync monitor`: the bank as it lives, read from Redis alone.

What happens comes from keyspace notifications; how many stubs there are, which gateways live and what they count is
asked for every second.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import click
import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bridge.bank import bank_url, failover_progress, gateway_stats
from bridge.bank.failover_progress import FailoverProgress
from bridge.bank.interface import BankUnavailable
from bridge.bank.keyspace import Event, Keyspace
from bridge.bank.redis_bank import TIMEOUT
from bridge.bank.redis_client import RedisClient
from bridge.bank.redis_gateways import FORGET_GATEWAY, GATEWAYS_MAX
from bridge.cli import event_loop, options, output
from bridge.config import GatewayConfig
from bridge.service import log as logging
from bridge.stub import bank_keys
from bridge.stub.bank_keys import FETCH, GATEWAYS, HEARTBEAT, STUB
from bridge.stub.stub import Index, StubError
from bridge.stub.types import printable

SECONDS: Final = 1.0
"""between two looks"""
EVENTS_SHOWN: Final = 200
BAR_COLUMNS: Final = 20
PAGE: Final = (160, 30)
"""columns and lines of a view where there is no terminal"""
_SIGNALS: Final = {"hset": "stored", "del": "deleted", "expired": "expired"}


class Watch:
    """What a monitor knows. `emit` gets each event as an object for JSON."""

    def __init__(self, url: str, emit: Callable[[dict[str, Any]], None]) -> None:
        self.gateways: list[dict[str, Any]] = []
        self.failovers: list[FailoverProgress] = []
        self.events: deque[dict[str, Any]] = deque(maxlen=EVENTS_SHOWN)
        self.counts: Counter[str] = Counter()
        """stored, deleted, expired stubs since the start"""
        self.state = "connecting"
        self._emit = emit
        self._server = RedisClient(url, TIMEOUT)
        self._keyspace = Keyspace(url, (f"{STUB}*", f"{HEARTBEAT}*", f"{FETCH}*"), self._event, self._on_state)
        self._before: dict[str, tuple[float, dict[str, float]]] = {}
        self._alive: dict[str, bool] = {}

    async def run(self) -> None:
        """Watch for ever; `gateways` is news after each turn of the loop."""
        self._keyspace.start()
        try:
            while True:
                try:
                    await self._look()
                except BankUnavailable as error:
                    if self.state != str(error):
                        self.state = str(error)
                        self._say("bank", "unreachable", reason=self.state)
                await asyncio.sleep(SECONDS)
        finally:
            await self._keyspace.close()
            await self._server.close()

    # what happens

    def _on_state(self, listening: bool) -> None:
        self.state = "listening" if listening else "Redis is away"
        self._say("bank", "reachable" if listening else "lost")

    def _event(self, event: Event) -> None:
        if event.key.startswith(STUB):
            if (signal := _SIGNALS.get(event.event)) is None:
                return
            self.counts[signal] += 1
            try:
                index = Index.parse(event.key)
            except StubError:
                return
            self._say("stub", signal, gateway=index.gateway, spi=index.spi.hex())
        elif event.key.startswith(HEARTBEAT):
            gateway = printable(event.key.removeprefix(HEARTBEAT))
            alive = event.event != "expired" and event.event != "del"
            if self._alive.get(gateway) != alive and event.event in ("set", "expired", "del"):
                self._alive[gateway] = alive
                self._say("gateway", "alive" if alive else "failed", gateway=gateway)
        elif event.event == "set":
            self._say("gateway", "stubs fetched by the others", gateway=printable(event.key.rpartition("fetch:")[2]))

    def _say(self, kind: str, what: str, **more: str) -> None:
        event = {"time": round(time.time(), 3), "kind": kind, "event": what, **more}
        self.events.appendleft(event)
        self._emit(event)

    # how things are

    async def _look(self) -> None:
        now = time.time()
        [members] = await self._server.replies([("ZRANGE", GATEWAYS, 0, GATEWAYS_MAX - 1, "REV", "WITHSCORES")])
        gateways = []
        published: dict[str, list[FailoverProgress]] = {}
        rows = members if isinstance(members, list) else []
        recent = [raw for raw, score in zip(rows[::2], rows[1::2], strict=True) if float(score) > now - FORGET_GATEWAY]
        for name in sorted(filter(None, map(bank_keys.gateway_name, recent))):
            commands: list[tuple[Any, ...]] = [
                ("PTTL", bank_keys.heartbeat_key(name)),
                ("GET", bank_keys.posted_key(bank_keys.STATS_KIND, name)),
                ("GET", bank_keys.posted_key(bank_keys.FAILOVERS_KIND, name)),
            ]
            commands += [("ZCOUNT", bucket, f"({now}", "+inf") for bucket in bank_keys.buckets(name)]
            ttl, stats, failovers, *stubs = await self._server.replies(commands)
            published[name] = failover_progress.decode(failovers)
            ttl = ttl if isinstance(ttl, int) else 0
            gateways.append(
                {
                    "gateway": name,
                    "alive": ttl > 0,
                    "heartbeat_s": round(max(ttl, 0) / 1000, 1),
                    "stubs": sum(count for count in stubs if isinstance(count, int)),
                    **self._rates(name, gateway_stats.decode(stats), now),
                }
            )
        self.gateways = gateways
        self._emit({"time": round(now, 3), "kind": "gateways", "gateways": gateways})
        self.failovers = failover_progress.together(published)
        if self.failovers:
            rows = [msgspec.to_builtins(failure) | {"left": failure.left} for failure in self.failovers]
            self._emit({"time": round(now, 3), "kind": "failovers", "failovers": rows})

    def _rates(self, name: str, counters: dict[str, float], now: float) -> dict[str, Any]:
        """Resumptions and fallbacks: in all, and a second since the look before; fallbacks by reason."""
        then, before = self._before.get(name, (now, counters))
        self._before[name] = (now, counters)
        elapsed = max(now - then, 0.001)
        refusals = {
            key.partition("[")[2].rstrip("]"): value
            for key, value in counters.items()
            if key.startswith("refusals") and value
        }
        resumed, refused = counters.get("resumptions_total", 0.0), sum(refusals.values())
        refused_before = sum(value for key, value in before.items() if key.startswith("refusals"))
        return {
            "resumed": int(resumed),
            "resumed_per_s": round(max(resumed - before.get("resumptions_total", 0.0), 0) / elapsed, 1),
            "fallbacks": int(refused),
            "fallbacks_per_s": round(max(refused - refused_before, 0) / elapsed, 1),
            "duplicate_addresses": int(counters.get("duplicate_address_sessions", 0.0)),
            "taken_over": int(counters.get("sessions_taken_over_total", 0.0)),
            "not_taken_over": int(counters.get("sessions_not_taken_over_total", 0.0)),
            "reasons": {printable(reason): int(value) for reason, value in sorted(refusals.items())},
        }

    def view(self, height: int) -> Group:
        """The whole of it, for a terminal of so many lines."""
        table = output.table("gateway", "heartbeat", "stubs", "resumed", "/s", "fallbacks", "/s", "reasons")
        for row in self.gateways:
            table.add_row(
                row["gateway"],
                Text(f"{row['heartbeat_s']:.0f} s", "green") if row["alive"] else Text("failed", "bold red"),
                f"{row['stubs']:,}",
                f"{row['resumed']:,}",
                f"{row['resumed_per_s']:g}",
                f"{row['fallbacks']:,}",
                f"{row['fallbacks_per_s']:g}",
                _notes(row),
            )
        signals = "   ".join(f"{name} {self.counts[name]:,}" for name in ("stored", "deleted", "expired"))
        lines = Table.grid(padding=(0, 2))
        for event in list(self.events)[
            : max(height - len(self.gateways) - (len(self.failovers) and 2 * len(self.failovers) + 3) - 9, 3)
        ]:
            clock = time.strftime("%H:%M:%S", time.localtime(event["time"]))
            lines.add_row(
                Text(clock, "dim"), event["kind"], event["event"], event.get("gateway", ""), event.get("spi", "")
            )
        return Group(
            Text(f"bank: {self.state}", "" if self.state == "listening" else "bold red"),
            table,
            *([_bars(self.failovers)] if self.failovers else []),
            Text(f"stubs since the start of this view: {signals}"),
            Panel(lines, title="events", title_align="left"),
        )


def _notes(row: dict[str, Any]) -> Text:
    """Why requests fell back, and what is wrong."""
    notes = Text(" ".join(f"{reason} {count}" for reason, count in row["reasons"].items()))
    if row["taken_over"]:
        notes.append(f" {row['taken_over']:,} taken over")
    if row["not_taken_over"]:
        notes.append(f" {row['not_taken_over']:,} not taken over", "bold red")
    if row["duplicate_addresses"]:
        notes.append(f" {row['duplicate_addresses']} duplicate virtual IPs", "bold red")
    return notes


def _bars(failures: Sequence[FailoverProgress]) -> Table:
    """A bar for each gateway that failed."""
    table = output.table("failed", "", "sessions", "announced", "resumed", "refused", "silent", "left to DPD")
    # which gateway it is, whatever the terminal's width
    table.columns[0].no_wrap = True
    for failure in failures:
        over = min(failure.over, failure.stubs)
        table.add_row(
            f"{failure.gateway}\n{f'{failure.state} {failure.reason}'.strip()}, {failure.seconds:.1f} s",
            ProgressBar(max(failure.stubs, 1), over if failure.stubs else 1, BAR_COLUMNS),
            f"{failure.stubs:,}",
            f"{failure.announced:,}",
            f"{over:,}",
            f"{failure.refused:,}",
            f"{failure.silent:,}",
            f"{failure.left:,}",
        )
    return table


@click.command()
@options.gateway_config_option
@click.option("--url", metavar="URL", help="Another Redis, or another user, than in the configuration.")
@options.json_option
def monitor(path: str | None, url: str | None, as_json: bool) -> None:
    """Watch the bank live: gateways, stubs and their changes, resumptions, fallbacks.

    Reads only Redis, with the rights of the user `monitor` of users.acl; needs no key file.
    """
    config = options.read_config(path, GatewayConfig)
    logging.configure("error", "logfmt")
    try:
        event_loop.run(_lines(url or bank_url(config.bank)) if as_json else _live(url or bank_url(config.bank)))
    except ValueError as error:
        options.fail(error, options.BAD_CONFIGURATION)
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(130)


async def _lines(url: str) -> None:
    await Watch(url, lambda event: print(json.dumps(event), flush=True)).run()


async def _pages(url: str) -> None:
    """One view after the other, as `top -b`."""
    console = Console(width=PAGE[0])

    def emit(event: dict[str, Any]) -> None:
        if event["kind"] in ("gateways", "bank"):
            console.print(watch.view(PAGE[1]))

    watch = Watch(url, emit)
    await watch.run()


async def _live(url: str) -> None:
    console = Console()
    if not console.is_terminal:
        await _pages(url)
        return
    watch = Watch(url, lambda _: None)
    with Live(console=console, screen=True, auto_refresh=False) as live:
        task = asyncio.create_task(watch.run())
        try:
            while not task.done():
                live.update(watch.view(console.height), refresh=True)
                await asyncio.sleep(0.25)
            task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
