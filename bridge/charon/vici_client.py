"""charon's VICI socket: events, and the few commands the sidecar needs.

VICI is the source of truth for which IKE_SAs exist, how long they live and which connections are configured. The
`vici` package is blocking, so events have a session and a thread of their own, and each command runs in a worker
thread over a session of its own; what arrives is handed to the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import structlog
import vici
import vici.exception

from bridge.charon.vici_types import (
    ConnectionInfo,
    Event,
    SaInfo,
    Section,
    ViciError,
    as_number,
    as_text,
    parse_connection,
    parse_event,
    parse_ike_sa,
)
from bridge.ike.address import Pool

log = structlog.get_logger()

EVENTS = ("ike-updown", "ike-rekey", "ike-update", "child-updown")
COMMAND_SECONDS = 60.0
"""a charon that says nothing for so long hangs"""
_FAILURES = (
    OSError,
    vici.exception.SessionException,
    vici.exception.CommandException,
    vici.exception.DeserializationException,
)
CLOSE_SECONDS = 1.0
"""that `close` gives the thread of the events, which looks up every 0.2 s"""
RETRY_SECONDS = 0.5
"""between attempts to reach a charon that is not there"""
START_SECONDS = 2
"""how much too early the start may be that charon tells: two clocks, both cut to seconds"""

LISTED_AT_ONCE = 128
"""IKE_SAs of a long list that are handed over together"""
LISTING_SHARE = 0.25
"""of the interpreter's time, at most, that goes into reading a long list"""

Result = TypeVar("Result")


class ViciClient:
    """One charon's VICI socket.

    `on_event` gets each Event, `on_connect` charon's release whenever the socket is (re)connected, `on_disconnect`
    is called when it is lost; all three on the event loop.
    """

    def __init__(
        self,
        path: str,
        *,
        on_event: Callable[[Event], None],
        on_connect: Callable[[str], None],
        on_disconnect: Callable[[], None],
    ) -> None:
        self.path = path
        self.connected = False
        self._on_event = on_event
        self._on_connect = on_connect
        self._on_disconnect = on_disconnect
        self._stop = threading.Event()
        self._workers = ThreadPoolExecutor(max_workers=8, thread_name_prefix="vici")
        self._thread = threading.Thread(target=self._listen, name="vici-events", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asking: set[socket.socket] = set()

    def start(self) -> None:
        """Begin to listen; call on the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def close(self) -> None:
        """Stop listening, and end the commands that are under way: their threads would keep the process."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)
        for sock in list(self._asking):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._workers.shutdown(wait=False, cancel_futures=True)

    # events

    def _listen(self) -> None:
        told = False
        while not self._stop.is_set():
            try:
                self._listen_once()
                told = False
            except (*_FAILURES, vici.exception.EventUnknownException) as error:
                if not told:
                    log.warning(
                        "charon-unreachable", vici=self.path, reason=str(error), mend="is charon running? retrying"
                    )
                told = True
            self._stop.wait(RETRY_SECONDS)

    def _listen_once(self) -> None:
        with self._socket() as sock:
            session = vici.Session(sock)
            release = as_text(session.version().get("version"))
            # the first wait registers the events: only after it none is missed
            stream = session.listen(list(EVENTS), timeout=0.2)
            first = self._next(stream)
            self._call(self._connected, release)
            try:
                while not self._stop.is_set():
                    if first is not None:
                        self._deliver(*first)
                    first = self._next(stream)
            finally:
                self._call(self._disconnected)
                # or it would unregister at some later time, on a socket that is closed, and complain
                with contextlib.suppress(*_FAILURES, vici.exception.EventUnknownException):
                    stream.close()

    @staticmethod
    def _next(stream: Any) -> tuple[str, Section] | None:
        try:
            kind, message = next(stream)
        except StopIteration:
            raise OSError("the VICI connection was closed") from None
        return None if kind is None else (as_text(kind, str(kind)), message)

    def _deliver(self, kind: str, message: Section) -> None:
        try:
            events = parse_event(kind, message)
        except ViciError as error:
            log.warning("vici-event-unreadable", kind=kind, reason=str(error))
            return
        for event in events:
            self._call(self._on_event, event)

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None
        # a loop that is closed already: the sidecar is going away
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)

    def _connected(self, release: str) -> None:
        self.connected = True
        self._on_connect(release)

    def _disconnected(self) -> None:
        self.connected = False
        self._on_disconnect()

    # commands

    def _socket(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(self.path)
        except OSError:
            sock.close()
            raise
        return sock

    async def _run(self, name: str, command: Callable[[Any], Result]) -> Result:
        def work() -> Result:
            try:
                with self._socket() as sock:
                    sock.settimeout(COMMAND_SECONDS)
                    self._asking.add(sock)
                    try:
                        return command(vici.Session(sock))
                    finally:
                        self._asking.discard(sock)
            except _FAILURES as error:
                raise ViciError(f"{name}: {error}") from error

        return await asyncio.get_running_loop().run_in_executor(self._workers, work)

    async def version(self) -> str:
        """charon's release, such as "5.9.8"."""
        return await self._run("version", lambda session: as_text(session.version().get("version")))

    async def started(self) -> int:
        """When charon was started, in Unix seconds by its host's clock; at most START_SECONDS before it really was."""

        def command(session: Any) -> str:
            return as_text(session.stats()["uptime"]["since"])

        since = await self._run("stats", command)
        return int(time.mktime(time.strptime(since, "%b %d %H:%M:%S %Y")))

    async def plugins(self) -> list[str]:
        """The plugins that charon has loaded."""
        return await self._run("stats", lambda session: [as_text(name) for name in session.stats()["plugins"]])

    async def pools(self) -> list[Pool]:
        """The in-memory pools that charon gives virtual IPs from."""

        def command(session: Any) -> list[Pool]:
            return [
                Pool(name, as_text(section["base"]), as_number(section["size"]) or 0)
                for name, section in session.get_pools().items()
            ]

        return await self._run("get-pools", command)

    async def list_sas(self, connection: str | None = None) -> list[SaInfo]:
        """All IKE_SAs, or those of one connection; waits for those that a thread of charon's holds, so none is left
        out."""
        return await self._run("list-sas", lambda session: list(_listed(session, connection)))

    async def each_sas(self, take: Callable[[list[SaInfo]], None]) -> float:
        """All IKE_SAs, as `list_sas`, handed to `take` on the event loop some at a time.

        charon answers at once with all it has then, so the last of a long list may be minutes old. Reading it leaves
        the event loop most of the interpreter's time. Gives the seconds it slept for that. Raises what `take` raises.
        """
        loop = asyncio.get_running_loop()
        failures: list[Exception] = []

        def hand_over(infos: list[SaInfo]) -> None:
            try:
                if not failures:
                    take(infos)
            except Exception as error:
                failures.append(error)

        def command(session: Any) -> float:
            slept, infos = 0.0, []
            began = time.thread_time()
            for info in _listed(session, None):
                infos.append(info)
                if len(infos) < LISTED_AT_ONCE:
                    continue
                loop.call_soon_threadsafe(hand_over, infos)
                infos = []
                nap = (time.thread_time() - began) * (1 / LISTING_SHARE - 1)
                time.sleep(nap)
                slept += nap
                began = time.thread_time()
            loop.call_soon_threadsafe(hand_over, infos)
            return slept

        slept = await self._run("list-sas", command)
        if failures:
            raise failures[0]
        return slept

    async def find_sa(self, connection: str, spis: bytes) -> SaInfo | None:
        """The IKE_SA of a connection that has these SPIs (16 octets)."""
        return next((info for info in await self.list_sas(connection) if info.spis == spis), None)

    async def list_connections(self) -> dict[str, ConnectionInfo]:
        """All configured connections by name."""

        def command(session: Any) -> dict[str, ConnectionInfo]:
            return {
                name: parse_connection(name, section)
                for entry in session.list_conns()
                for name, section in entry.items()
            }

        return await self._run("list-conns", command)

    async def initiate(self, connection: str, child: str, patience: float, used: set[str]) -> None:
        """Bring up a CHILD_SA, and its IKE_SA where there is none. `patience` in seconds. `used` gets the unique IDs of
        the IKE_SAs that charon worked on for that, also where it fails. Raises ViciError."""

        def command(session: Any) -> None:
            # level 1, charon's default, names the IKE_SA in each line
            request = {"ike": connection, "child": child, "timeout": str(int(patience * 1000)), "loglevel": "1"}
            for line in session.initiate(request):
                if unique_id := as_text(line.get("ikesa-uniqueid")):
                    used.add(unique_id)

        await self._run(f"initiate {connection}/{child}", command)

    async def end_sa(self, unique_id: str, patience: float | None = None) -> None:
        """End the IKE_SA with this unique ID. charon sends its peer a DELETE, and waits up to `patience` seconds for
        the answer; not at all without. Raises ViciError, also when there is none."""
        timeout = -1 if patience is None else int(patience * 1000)

        def command(session: Any) -> None:
            for _ in session.terminate(
                {"ike-id": unique_id, "force": "yes", "timeout": str(timeout), "loglevel": "-1"}
            ):
                pass

        await self._run(f"terminate #{unique_id}", command)


def _listed(session: Any, connection: str | None) -> Iterator[SaInfo]:
    """The answer to list-sas, what cannot be read left out."""
    for entry in session.list_sas({"ike": connection} if connection else None):
        for name, section in entry.items():
            try:
                yield parse_ike_sa(name, section)
            except ViciError as error:
                log.warning("vici-sa-unreadable", connection=name, reason=str(error))
