"""`ike-sa-sync monitor` against a real Redis."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from bank_support import GATEWAY, PATIENCE, RedisServer, ending, keyring, shipped_users, stub_of
from bridge.bank import failover_progress
from bridge.bank.failover_progress import FailoverProgress
from bridge.bank.redis_bank import RedisBank

pytestmark = pytest.mark.redis


@pytest.fixture
async def watched(tmp_path: Path) -> AsyncIterator[tuple[RedisBank, asyncio.subprocess.Process, RedisServer]]:
    """A bank with the shipped users, and a monitor that runs as the user `monitor`."""
    (tmp_path / "gateway.yaml").write_text(f"address: {GATEWAY}\n")
    settings = shipped_users(tmp_path / "users.acl")
    with RedisServer(tmp_path, *settings, username="gateway", password="secret") as server:
        bank = RedisBank(f"unix://gateway:secret@{server.socket}", keyring(), get_timeout=5.0)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bridge", "monitor", "--json", "-c", str(tmp_path / "gateway.yaml")),
            *("--url", f"unix://monitor:secret@{server.socket}"),
            stdout=subprocess.PIPE,
        )
        yield bank, process, server
        process.kill()
        await process.wait()
        await bank.close()


async def until(process: asyncio.subprocess.Process, **wanted: Any) -> dict[str, Any]:
    """The next line that has all that is `wanted`."""
    assert process.stdout is not None
    async with asyncio.timeout(20):
        while True:
            line = await process.stdout.readline()
            assert line, "the monitor ended"
            told: dict[str, Any] = json.loads(line)
            if wanted.items() <= told.items():
                return told


async def test_it_reports_what_happens_to_stubs(
    watched: tuple[RedisBank, asyncio.subprocess.Process, RedisServer],
) -> None:
    bank, process, _ = watched
    await until(process, event="reachable")
    stub = stub_of()
    await bank.store([stub])
    await until(process, kind="stub", event="stored", gateway=GATEWAY, spi=stub.index.spi.hex())
    await bank.delete([ending(stub)])
    await until(process, kind="stub", event="deleted", spi=stub.index.spi.hex())
    brief = stub_of(lifetime=1)
    await bank.store([brief])
    await until(process, kind="stub", event="expired", spi=brief.index.spi.hex())


async def test_it_reports_a_gateway_that_fails(
    watched: tuple[RedisBank, asyncio.subprocess.Process, RedisServer],
) -> None:
    bank, process, _ = watched
    await until(process, event="reachable")
    await bank.heartbeat(GATEWAY, 0.3)
    await until(process, kind="gateway", event="alive", gateway=GATEWAY)
    await until(process, kind="gateway", event="failed", gateway=GATEWAY)


TAKEN = {"sessions_taken_over_total": 5.0, "sessions_not_taken_over_total": 1.0}


async def test_it_shows_stubs_and_counters_of_each_gateway(
    watched: tuple[RedisBank, asyncio.subprocess.Process, RedisServer],
) -> None:
    bank, process, _ = watched
    await bank.store([stub_of() for _ in range(30)])
    await bank.post(
        "stats", GATEWAY, json.dumps({"resumptions_total": 7.0, "refusals_total[no-stub]": 2.0} | TAKEN), 60
    )
    await bank.heartbeat(GATEWAY, 60)
    while not (rows := (await until(process, kind="gateways"))["gateways"]):
        pass
    [row] = rows
    assert (row["gateway"], row["alive"], row["stubs"]) == (GATEWAY, True, 30)
    assert (row["resumed"], row["fallbacks"], row["reasons"]) == (7, 2, {"no-stub": 2})
    assert (row["taken_over"], row["not_taken_over"]) == (5, 1)


async def test_it_goes_on_after_redis_was_away(
    watched: tuple[RedisBank, asyncio.subprocess.Process, RedisServer],
) -> None:
    bank, process, server = watched
    await until(process, event="reachable")
    server.kill()
    await until(process, event="lost")
    server.start()
    await until(process, event="reachable")
    stub = stub_of()
    await bank.store([stub])
    await until(process, event="stored", spi=stub.index.spi.hex())


async def test_a_redis_that_is_not_there_is_reported_with_the_reason(
    watched: tuple[RedisBank, asyncio.subprocess.Process, RedisServer],
) -> None:
    _, process, server = watched
    server.kill()
    while str(server.socket) not in (await until(process, kind="bank", event="unreachable"))["reason"]:
        pass
    server.start()
    await until(process, kind="bank", event="reachable")


class Screen:
    """A terminal of 40 lines of 120 columns, and what a program draws on it."""

    LEFT = "\x1b[?1049l"
    """what gives a terminal its former content back"""

    def __init__(self, *command: str) -> None:
        self.text = ""
        self._side, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        self.process = subprocess.Popen(
            command, stdin=other, stdout=other, stderr=other, env={**os.environ, "TERM": "xterm-256color"}
        )
        os.close(other)
        os.set_blocking(self._side, False)

    def read(self) -> None:
        """Take what was drawn since."""
        try:
            while octets := os.read(self._side, 65536):
                self.text += octets.decode(errors="replace")
        except BlockingIOError:
            pass
        except OSError:
            # the program, the only one on the other side, has ended
            return

    @property
    def frame(self) -> str:
        """The last picture that is complete, without colours."""
        pictures = self.text.split("\x1b[H")
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", pictures[-2]) if len(pictures) > 2 else ""

    async def shows(self, wanted: Callable[[str], bool], what: str) -> str:
        """The first picture of which `wanted` holds."""
        deadline = time.monotonic() + PATIENCE
        while not wanted(self.frame):
            assert self.process.poll() is None, self.text
            assert time.monotonic() < deadline, f"{what} is not in:\n{self.frame}"
            await asyncio.sleep(0.05)
            self.read()
        return self.frame

    def close(self) -> None:
        """Kill the program."""
        self.process.kill()
        self.process.wait()
        os.close(self._side)


def row(frame: str, name: str) -> list[str]:
    """The cells of a gateway's line in the table above the events."""
    lines = [line.split() for line in frame.partition("events")[0].splitlines() if line.split()[:1] == [name]]
    return lines[0] if lines else []


async def test_the_live_view_shows_gateways_their_counters_and_what_happens(tmp_path: Path) -> None:
    (tmp_path / "gateway.yaml").write_text(f"address: {GATEWAY}\n")
    with RedisServer(tmp_path, *shipped_users(tmp_path / "users.acl"), username="gateway", password="secret") as server:
        bank = RedisBank(f"unix://gateway:secret@{server.socket}", keyring(), get_timeout=5.0)
        screen = Screen(
            *(sys.executable, "-m", "bridge", "monitor", "-c", str(tmp_path / "gateway.yaml")),
            *("--url", f"unix://monitor:secret@{server.socket}"),
        )
        try:
            await screen.shows(lambda frame: "bank: listening" in frame, "the bank")
            stubs = [stub_of() for _ in range(30)]
            await bank.store(stubs)
            counters = {"resumptions_total": 7.0, "refusals_total[no-stub]": 2.0}
            await bank.post("stats", GATEWAY, json.dumps(counters), 60)
            await bank.heartbeat(GATEWAY, 60)
            frame = await screen.shows(lambda frame: row(frame, GATEWAY)[3:4] == ["30"], "the gateway with 30 stubs")
            assert row(frame, GATEWAY)[4:] == ["7", "0", "2", "0", "no-stub", "2"]
            assert "stored 30   deleted 0   expired 0" in frame
            await bank.delete([ending(stubs[0])])
            frame = await screen.shows(lambda frame: "deleted 1 " in frame, "the deletion")
            # the latest event comes first
            [first] = re.findall(r"events.*\n.*?(\S+ +\S+ +\S+) +[0-9a-f]{16}", frame)
            assert first.split() == ["stub", "deleted", GATEWAY]
            # another gateway failed, and this one announces that
            failure = FailoverProgress("192.0.2.9", "running", "", 2000, 2000, 10, 1500, 1234, 5, 6, 7, 1.5)
            await bank.post("failovers", GATEWAY, failover_progress.encode([failure]), 60)
            frame = await screen.shows(lambda frame: "192.0.2.9" in frame, "the failure that is announced")
            cells = row(frame, "192.0.2.9")
            assert cells[2:] == ["2,000", "1,500", "1,241", "5", "6", "0"]
            assert "running, 1.5 s" in frame
            assert set(cells[1]) <= set("━╸╺")
            # a gateway whose heartbeat ends has failed
            await bank.heartbeat(GATEWAY, 0.05)
            await screen.shows(lambda frame: row(frame, GATEWAY)[1:2] == ["failed"], "the failure")
            server.kill()
            await screen.shows(lambda frame: "bank: listening" not in frame, "that Redis is away")
            server.start()
            await screen.shows(lambda frame: "bank: listening" in frame, "that Redis is back")
            screen.process.send_signal(signal.SIGINT)
            assert await asyncio.to_thread(screen.process.wait, PATIENCE) == 130
            screen.read()
            assert Screen.LEFT in screen.text
        finally:
            screen.close()
            await bank.close()
