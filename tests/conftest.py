"""Fixtures that several files of tests share."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from bank_support import RedisServer, keyring
from bridge.bank.redis_bank import RedisBank
from bridge.lab import Lab, Topology, standard, unpacked
from bridge.stub.keyring import Keyring
from releases_support import RELEASED
from role_support import FakeTime

# how long drawing and running an example takes says how busy the machine is
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


RESUMED = "resumed"
LONG_SECONDS = 1800
"""for a test against other releases, or in an emulated machine"""


def pytest_configure() -> None:
    """Have this process, not its children, ignore what it was started to ignore: `nohup`, and a shell that puts its
    jobs into the background, start them with signals ignored that tests send to their children. A handler of Python's
    is not inherited."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that are slow by their kind have more time."""
    for item in items:
        if any(item.get_closest_marker(name) for name in ("releases", "vm")):
            item.add_marker(pytest.mark.timeout(LONG_SECONDS))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """With several workers, a test that is marked `alone` has the machine to itself."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    assert item.config.cache is not None
    place = item.config.cache.mkdir("machine")
    with (place / "next").open("w") as following, (place / "use").open("w") as use:
        # first the place in the queue, or tests that share would keep out for ever one that does not
        fcntl.flock(following, fcntl.LOCK_EX)
        fcntl.flock(use, fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH)
        fcntl.flock(following, fcntl.LOCK_UN)
        return (yield)


@pytest.fixture(params=["redis", pytest.param("valkey", marks=pytest.mark.releases)])
def program(request: pytest.FixtureRequest) -> list[str]:
    """The command line of a server for the bank: Redis 7, and with `-m releases` Valkey 8."""
    return ["redis-server"] if request.param == "redis" else unpacked.VALKEY.program(unpacked.VALKEY_SERVER)


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


@pytest.fixture
def loop() -> Iterator[FakeTime]:
    """An event loop whose time passes only while all tasks wait."""
    loop = FakeTime()
    yield loop
    loop.end()


@pytest.fixture(scope="module", params=RELEASED)
def each_release(request: pytest.FixtureRequest) -> str | None:
    """The Debian release whose strongSwan a lab is to have: the machine's own (None), and with `-m releases` each other
    one."""
    release: str | None = request.param
    return release


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    """The standard lab with its sidecars, up; shared by the tests of a file. The client moves when it is told to only:
    how long charon takes to find its gateway dead is a matter of how busy the machine is."""
    with Lab() as lab:
        built = standard(lab, start=False)
        built.agent.config["resume_on_down"] = False
        built.start()
        yield built


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Notes what was resumed, and how, for the table at the end of the run: what it is about, its name, the outcome."""

    def note(about: str, name: str, outcome: dict[str, Any]) -> None:
        took = [f"{outcome[key]:.1f}" if outcome[key] is not None else "" for key in ("exchange_ms", "total_ms")]
        row = (about, name, outcome["result"], ", ".join(outcome["children"]), *took)
        # a property of the test gets from a worker to the process that prints the table
        request.node.user_properties.append((RESUMED, row))

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of what was resumed."""
    rows = [
        row
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        if report.when == "call"
        for name, row in report.user_properties
        if name == RESUMED
    ]
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
