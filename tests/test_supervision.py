"""No background task ends unseen: one that fails is named in the log, and its process stops in order with status 1
(bridge.service.tasks, bridge.service.process)."""

from __future__ import annotations

import asyncio
import gc
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bridge.lab import Topology
from bridge.service.tasks import SUPERVISED, end, spawn

PATIENCE = 30.0

PROCESS = """
import asyncio, sys
import bridge.sidecar
from bridge.cli.main import main
from bridge.service.tasks import spawn

async def start(configs, stack):
    stack.callback(print, "stopped in order", flush=True)
    async def work():
        {work}
    spawn("fake", work())
    {start}

bridge.sidecar._start = start
sys.argv[1:] = ["client", "-c", sys.argv[1]]
main()
"""
"""a sidecar whose parts are one background task and one thing to stop"""


@pytest.fixture
async def reported() -> list[dict[str, Any]]:
    """What the event loop's exception handler got."""
    found: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: found.append(context))
    return found


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A client's configuration."""
    file = tmp_path / "client.yaml"
    file.write_text("gateways:\n- {address: 192.0.2.1, connection: gw1}\n")
    return file


def process(config: Path, work: str, start: str = "pass") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS.format(work=work, start=start), str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


async def failing() -> None:
    raise ValueError("no such thing")


async def for_ever() -> None:
    await asyncio.Event().wait()


async def test_a_task_that_fails_is_reported_with_its_name_when_it_happens(reported: list[dict[str, Any]]) -> None:
    spawn("fake", failing())
    await asyncio.sleep(0.01)
    assert [(context[SUPERVISED], str(context["exception"])) for context in reported] == [("fake", "no such thing")]


async def test_a_task_that_returns_or_is_cancelled_is_not_reported(reported: list[dict[str, Any]]) -> None:
    done = spawn("done", asyncio.sleep(0, "result"))
    cancelled = spawn("cancelled", for_ever())
    assert await done == "result"
    await end(cancelled)
    assert cancelled.cancelled()
    assert reported == []


async def test_a_task_that_is_taken_along_by_a_cancelled_future_is_reported(reported: list[dict[str, Any]]) -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def wait() -> None:
        await future

    spawn("waiting", wait())
    await asyncio.sleep(0)
    future.cancel()
    await asyncio.sleep(0.01)
    assert [context[SUPERVISED] for context in reported] == ["waiting"]


async def test_a_task_that_no_caller_keeps_lives_until_it_ends() -> None:

    ended = asyncio.Event()

    async def work() -> None:
        await asyncio.sleep(0.01)
        ended.set()

    spawn("work", work())
    gc.collect()
    async with asyncio.timeout(PATIENCE):
        await ended.wait()


def test_a_failed_task_ends_the_process_in_order_with_status_1_and_one_line(config: Path) -> None:
    sidecar = process(config, "await asyncio.sleep(0.2); raise ValueError('no such thing')")
    out, err = sidecar.communicate(timeout=PATIENCE)
    assert sidecar.returncode == 1
    assert out.splitlines() == ["ready", "stopped in order"]
    (line,) = err.splitlines()
    assert "event=task-failed" in line
    assert "task=fake" in line
    assert 'reason="ValueError: no such thing"' in line


def test_a_task_that_fails_while_the_sidecar_starts_ends_it_too(config: Path) -> None:
    sidecar = process(config, "raise ValueError('no such thing')", start="await asyncio.sleep(3600)")
    out, err = sidecar.communicate(timeout=PATIENCE)
    assert sidecar.returncode == 1
    assert out.splitlines() == ["stopped in order"]
    assert "task=fake" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("start", ["pass", "await asyncio.sleep(3600)"], ids=["serving", "starting"])
def test_a_stop_signal_ends_the_process_in_order_with_status_0(
    config: Path, number: signal.Signals, start: str
) -> None:
    announce = "print('works', flush=True); await asyncio.sleep(3600)"
    sidecar = process(config, announce, start)
    assert sidecar.stdout is not None
    while sidecar.stdout.readline() not in ("works\n", ""):
        pass
    sidecar.send_signal(number)
    out, err = sidecar.communicate(timeout=PATIENCE)
    assert sidecar.returncode == 0
    assert out.splitlines()[-1] == "stopped in order"
    assert err == ""


def test_an_error_in_a_callback_is_logged_and_the_process_goes_on(config: Path) -> None:
    start = "asyncio.get_running_loop().call_later(0.1, lambda: 1 // 0)"
    sidecar = process(config, "await asyncio.sleep(0.4); raise ValueError('the end')", start)
    out, err = sidecar.communicate(timeout=PATIENCE)
    first, last = err.splitlines()
    assert "event=callback-failed" in first
    assert "ZeroDivisionError" in first
    assert "task=fake" in last
    assert out.splitlines() == ["ready", "stopped in order"]


@pytest.mark.lab
def test_a_gateway_whose_heartbeat_fails_ends_with_status_1_and_takes_its_rules_along(topology: Topology) -> None:
    gateway = topology.gateways["gw2"]
    gateway.stop()
    sabotage = (
        "import sys\n"
        "from bridge.cli.main import main\n"
        "from bridge.gateway.heartbeat import Heartbeat\n"
        "async def run(self):\n"
        "    while not self._charon.tracker.connections: await __import__('asyncio').sleep(0.05)\n"
        "    raise RuntimeError('sabotaged')\n"
        "Heartbeat._run = run\n"
        "main()\n"
    )
    began = time.monotonic()
    done = gateway.host.run(sys.executable, "-c", sabotage, "gateway", "-c", gateway.file, check=False)
    assert done.returncode == 1
    assert time.monotonic() - began < PATIENCE
    (line,) = [line for line in done.stderr.splitlines() if "task-failed" in line]
    assert re.search(r"\btask=heartbeat\b", line)
    assert "sabotaged" in line
    # the rule of the HA addresses stays: charon goes on
    assert "NFQUEUE" not in gateway.host.run("iptables-save", check=False).stdout
    gateway.start()
