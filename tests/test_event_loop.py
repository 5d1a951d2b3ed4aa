"""How a signal ends a command that waits (bridge.cli.event_loop)."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

# A command that waits; for a moment in a destructor, from which no exception gets out, or in code that swallows
# one cancellation. It says when it is there.
WAITS = """
import asyncio, signal, sys, time
sys.argv = ["x"]
from bridge.__main__ import _leave
from bridge.cli.event_loop import run

class Slow:
    def __del__(self):
        print("there", flush=True)
        until = time.monotonic() + 1
        while time.monotonic() < until:
            pass

async def in_a_destructor():
    Slow()
    await asyncio.sleep(3600)

async def swallows():
    try:
        print("there", flush=True)
        await asyncio.sleep(3600)
    except BaseException:
        pass
    await asyncio.sleep(3600)

signal.signal(signal.SIGTERM, _leave)
run(globals()[WHICH]())
"""


@pytest.mark.parametrize("which", ["in_a_destructor", "swallows"])
def test_sigterm_ends_it_wherever_it_is(which: str) -> None:
    code = WAITS.replace("WHICH", repr(which))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"there\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143


def test_a_command_that_ends_by_itself_gives_its_result() -> None:
    code = "from bridge.cli.event_loop import run\nasync def f(): return 7\nprint(run(f()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "7\n"
