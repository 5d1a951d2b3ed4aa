"""Fixtures that several files of tests share."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest
from hypothesis import HealthCheck, settings

from bridge.lab import Lab, Topology, standard, valkey

# how long drawing and running an example takes says how busy the machine is
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


@pytest.fixture(params=["redis", pytest.param("valkey", marks=pytest.mark.releases)])
def program(request: pytest.FixtureRequest) -> list[str]:
    """The command line of a server for the bank: Redis 7, and with `-m releases` Valkey 8."""
    return ["redis-server"] if request.param == "redis" else valkey.program()


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    """The standard lab with its sidecars, up; shared by the tests of a file. The client moves when it is told to only:
    how long charon takes to find its gateway dead is a matter of how busy the machine is."""
    with Lab() as lab:
        built = standard(lab, start=False)
        built.agent.config["resume_on_down"] = False
        built.start()
        yield built


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed lab test shows what its daemons said last."""
    report = yield
    topology = getattr(item, "funcargs", {}).get("topology")
    if report.failed and isinstance(topology, Topology):
        for host in topology.lab.hosts.values():
            for daemon in (host.charon, *host.sidecars):
                report.sections.append((f"{host.name}: end of {daemon.name}'s log", daemon.tail(30)))
    return report
