"""Fixtures that several files of tests share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from bank_support import RedisServer, keyring
from bridge.bank.redis_bank import RedisBank
from bridge.lab import Lab, Topology, standard, valkey
from bridge.stub.keyring import Keyring

# how long drawing and running an example takes says how busy the machine is
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


@pytest.fixture(params=["redis", pytest.param("valkey", marks=pytest.mark.releases)])
def program(request: pytest.FixtureRequest) -> list[str]:
    """The command line of a server for the bank: Redis 7, and with `-m releases` Valkey 8."""
    return ["redis-server"] if request.param == "redis" else valkey.program()


@pytest.fixture
def server(tmp_path: Path, program: list[str]) -> Iterator[RedisServer]:
    """A server for the bank, up."""
    with RedisServer(tmp_path, program=program) as server:
        yield server


@pytest.fixture
def ring() -> Keyring:
    """The gateways' key."""
    return keyring()


@pytest.fixture
async def bank(server: RedisServer, ring: Keyring) -> AsyncIterator[RedisBank]:
    """A bank in `server`."""
    bank = RedisBank(server.url, ring, get_timeout=5.0)
    yield bank
    await bank.close()


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    """The standard lab with its sidecars, up; shared by the tests of a file. The client moves when it is told to only:
    how long charon takes to find its gateway dead is a matter of how busy the machine is."""
    with Lab() as lab:
        built = standard(lab, start=False)
        built.agent.config["resume_on_down"] = False
        built.start()
        yield built


_MOVES = pytest.StashKey[list[tuple[str, ...]]]()


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Notes what was resumed, and how, for the table at the end of the run: what it is about, its name, the outcome."""
    rows = request.config.stash.setdefault(_MOVES, [])

    def note(about: str, name: str, outcome: dict[str, Any]) -> None:
        took = [f"{outcome[key]:.1f}" if outcome[key] is not None else "" for key in ("exchange_ms", "total_ms")]
        rows.append((about, name, outcome["result"], ", ".join(outcome["children"]), *took))

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The table of what was resumed."""
    rows = config.stash.get(_MOVES, [])
    if not rows:
        return
    head = ("", "session", "outcome", "CHILD_SAs", "answer, ms", "tunnel, ms")
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    terminalreporter.section("what was resumed")
    for row in (head, *rows):
        terminalreporter.line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed lab test shows what its daemons said last."""
    report = yield
    topology = getattr(item, "funcargs", {}).get("topology")
    if report.failed and isinstance(topology, Topology):
        for host in topology.lab.hosts.values():
            for daemon in (host.charon, *host.sidecars):
                report.sections.append((f"{host.name}: end of {daemon.name}'s log", daemon.tail(30)))
    machines = getattr(item, "funcargs", {}).get("machines")
    if report.failed and machines:
        for machine in machines.values():
            report.sections.append((f"{machine.name}: what it does", machine.tail()))
    return report
