"""The bank of a gateway that has no other: a redis-server of its own, on a Unix socket that no other user can reach."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import structlog

from bridge.bank.interface import BankUnavailable
from bridge.bank.redis_bank import GET_TIMEOUT, RedisBank
from bridge.service import shipped_files
from bridge.service.tasks import end, spawn
from bridge.stub.keyring import Keyring

log = structlog.get_logger()

SERVERS: Final = ("redis-server", "valkey-server")
SOCKET: Final = "redis.sock"
PID_FILE: Final = "redis.pid"
LOG_FILE: Final = "redis.log"

START_PATIENCE: Final = 10.0
"""seconds from its start to its first answer, which comes before it has read its append-only file"""
STOP_PATIENCE: Final = 5.0
"""seconds from SIGTERM to its end"""
LOOK_SECONDS: Final = 0.02
RESTART_MAX: Final = 30.0
"""seconds between two attempts to start it, at most"""
STEADY_SECONDS: Final = 60.0
"""a server that lived this long is started again without delay"""


class PrivateBank(RedisBank):
    """A RedisBank that, after `start`, keeps its own redis-server running in `directory`.

    The server has its data in `directory` too. Where the sidecar was killed its server lives on: the next `start`
    takes it over, with all that is in it. `close` stops it.
    """

    def __init__(self, directory: str | Path, keyring: Keyring, *, get_timeout: float = GET_TIMEOUT) -> None:
        self.directory = Path(directory)
        self.socket = self.directory / SOCKET
        super().__init__(self.url_of(directory), keyring, get_timeout=get_timeout)
        self._keeper: asyncio.Task[None] | None = None
        self._server: asyncio.subprocess.Process | None = None

    @staticmethod
    def url_of(directory: str | Path) -> str:
        """Where the server of `directory` is."""
        return f"unix://{quote(str(Path(directory) / SOCKET))}"

    async def start(self) -> None:
        """Start the server, or take over the one that is there; from here on it is started again whenever it ends.

        Where that fails it is logged and tried again: calls to the bank raise BankUnavailable meanwhile.
        """
        first = asyncio.get_running_loop().create_future()
        self._keeper = spawn("private-redis", self._keep(first))
        await first

    async def close(self) -> None:
        """Stop the server if `start` was called, and let go of it."""
        if self._keeper is not None:
            await end(self._keeper)
            self._keeper = None
            await self._stop()
        await super().close()

    async def _keep(self, first: asyncio.Future[None]) -> None:
        delay = LOOK_SECONDS
        while True:
            began = time.monotonic()
            try:
                pid = await self._serving() or await self._launch()
            except (BankUnavailable, OSError) as error:
                log.warning("private-redis-failed", reason=str(error), directory=str(self.directory))
            else:
                log.info("private-redis-started", pid=pid, socket=str(self.socket))
                if not first.done():
                    first.set_result(None)
                await _ended(pid)
                log.warning("private-redis-ended", pid=pid, log=str(self.directory / LOG_FILE))
            # one that starts and ends immediately, time after time, is no less failed than one that does not start
            steady = time.monotonic() - began >= STEADY_SECONDS
            delay = LOOK_SECONDS if steady else min(delay * 2, RESTART_MAX)
            if not first.done():
                first.set_result(None)
            await asyncio.sleep(delay)

    async def _serving(self) -> int | None:
        """The process that answers on the socket, if any does; it may still be reading its append-only file."""
        with contextlib.suppress(BankUnavailable):
            return int((await self.info())["process_id"])
        return None

    async def info(self) -> dict[str, Any]:
        """Redis' INFO. Raises BankUnavailable."""
        with self._redis.reaching():
            info: dict[str, Any] = await self._redis.client.info()
            return info

    def _check_none_hangs(self) -> None:
        """Two servers on one append-only file would spoil it. Raises BankUnavailable where one runs and does not
        answer."""
        with contextlib.suppress(OSError, ValueError):
            pid = int((self.directory / PID_FILE).read_text())
            name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
            if name in SERVERS and rest.split()[0] != "Z":
                raise BankUnavailable(f"the redis-server of {self.directory}, process {pid}, does not answer: kill it")

    async def _launch(self) -> int:
        """Start the server and wait for its first answer. Raises BankUnavailable with what it said."""
        binary = next((path for name in SERVERS if (path := shutil.which(name))), None)
        if binary is None:
            raise BankUnavailable("no redis-server here: install redis-server, or set bank.url")
        self._check_none_hangs()
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.directory.chmod(0o700)
        settings = {
            "port": "0",
            "unixsocket": self.socket,
            "unixsocketperm": "700",
            "dir": self.directory,
            "pidfile": self.directory / PID_FILE,
            "logfile": self.directory / LOG_FILE,
            "daemonize": "no",
        }
        arguments = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        # its own session: Ctrl-C is for the sidecar, which stops it after its last writes
        self._server = server = await asyncio.create_subprocess_exec(
            binary,
            str(shipped_files.path("redis/redis.conf")),
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + START_PATIENCE
        while server.returncode is None:
            try:
                info = await self.info()
            except BankUnavailable:
                if time.monotonic() > deadline:
                    server.kill()
                    break
            else:
                if not info["loading"]:
                    return server.pid
            await asyncio.sleep(LOOK_SECONDS)
        status = await server.wait()
        raise BankUnavailable(f"{binary} did not come up (status {status}): see {self.directory / LOG_FILE}")

    async def _stop(self) -> None:
        pid = await self._serving()
        if pid is None:
            # hung, or never there
            if self._server is not None and self._server.returncode is None:
                self._server.kill()
                await self._server.wait()
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
            try:
                async with asyncio.timeout(STOP_PATIENCE):
                    await _ended(pid)
            except TimeoutError:
                log.warning("private-redis-killed", pid=pid, reason=f"ignored SIGTERM for {STOP_PATIENCE:g} s")
                os.kill(pid, signal.SIGKILL)
        if self._server is not None:
            await self._server.wait()


async def _ended(pid: int) -> None:
    """Wait for the end of a process, also of one that is not this process's child."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    try:
        loop.add_reader(descriptor, ended.set)
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
