"""charon's VICI socket: events, and the few commands the sidecar needs.

VICI is the source of truth for which IKE_SAs exist, how long they live and which connections are configured. The
`vici` package is blocking, so events have a session and a thread of their own, and each command runs in a worker
thread over a session of its own; what arrives is handed to the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from ipaddress import ip_address
from typing import Any, NamedTuple, TypeVar

import structlog
import vici
import vici.exception

from bridge.facts import Pool
from bridge.stub import Endpoint

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
OVER_TIME = 0.1
"""charon's default over_time: this share of the larger of rekey_time and reauth_time"""

Section = dict[str, Any]
Result = TypeVar("Result")


class ViciError(Exception):
    """charon cannot be reached over VICI, or refused a command; the text says which, and why."""


class ChildInfo(NamedTuple):
    """One CHILD_SA of list-sas. `spi_in` is charon's in-memory value, as in HA messages; 0 while it has none."""

    name: str
    state: str
    spi_in: int

    @property
    def works(self) -> bool:
        """Whether it is installed, and not replaced or about to go."""
        return self.state in ("INSTALLED", "REKEYING")


class SaInfo(NamedTuple):
    """An IKE_SA as VICI reports it. Times in seconds from now; None where charon has set none."""

    connection: str
    spi_i: bytes
    spi_r: bytes
    initiator: bool
    version: int
    state: str
    local: Endpoint
    remote: Endpoint
    local_vips: tuple[str, ...]
    remote_vips: tuple[str, ...]
    established: int
    rekey: int | None
    reauth: int | None
    children: tuple[ChildInfo, ...]

    @property
    def spis(self) -> bytes:
        return self.spi_i + self.spi_r


class ChildConfig(NamedTuple):
    name: str
    mode: str


class ConnectionInfo(NamedTuple):
    """A configured connection. Times in seconds, 0 = never."""

    name: str
    rekey_time: int
    reauth_time: int
    children: tuple[ChildConfig, ...]
    dpd_delay: int = 0
    remote_addresses: tuple[str, ...] = ()
    """as configured: addresses, ranges or names; none where any will do"""

    @property
    def over_time(self) -> int:
        """charon's default; VICI does not report a configured one."""
        return int(OVER_TIME * max(self.rekey_time, self.reauth_time))

    @property
    def lifetime(self) -> int:
        """How long a fresh IKE_SA of this connection lives at most, in seconds; 0 = for ever."""
        soft = [t for t in (self.rekey_time, self.reauth_time) if t]
        return min(soft) + self.over_time if soft else 0


def _text(value: Any, default: str = "") -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else default


def _number(value: Any) -> int | None:
    try:
        return int(_text(value))
    except ValueError:
        return None


def _spi(value: Any) -> int:
    """An ESP SPI in hex as the number that charon has in memory, where it is in network order."""
    return int.from_bytes(bytes.fromhex(_text(value)), sys.byteorder)


def _addresses(values: Any) -> tuple[str, ...]:
    return tuple(str(ip_address(_text(value))) for value in values or ())


_UNKNOWN = {"%any": "0.0.0.0", "%any6": "::"}  # noqa: S104 - a peer that charon cannot resolve, nothing to listen on


def _endpoint(section: Section, side: str) -> Endpoint:
    # a link-local address carries its zone, which no table of ours wants
    text = _text(section.get(f"{side}-host"))
    host = _UNKNOWN.get(text) or text.split("%")[0]
    return _seen_endpoint(host, _number(section.get(f"{side}-port")) or 0)


@lru_cache(maxsize=4096)
def _seen_endpoint(host: str, port: int) -> Endpoint:
    return Endpoint(str(ip_address(host)), port)


_ENDPOINTS = ("local-host", "local-port", "remote-host", "remote-port")

_NOT_AS_EXPECTED = (KeyError, ValueError, AttributeError, TypeError)
"""a field is missing or no number or address; a value, a list or a section is there in place of another of them"""


def parse_ike_sa(connection: str, section: Section) -> SaInfo:
    """One IKE_SA section of list-sas or an event. Raises ViciError on what charon would not send."""
    try:
        return SaInfo(
            connection=sys.intern(connection),
            spi_i=bytes.fromhex(_text(section["initiator-spi"])),
            spi_r=bytes.fromhex(_text(section["responder-spi"])),
            initiator=_text(section.get("initiator")) == "yes",
            version=_number(section.get("version")) or 0,
            state=sys.intern(_text(section.get("state"))),
            local=_endpoint(section, "local"),
            remote=_endpoint(section, "remote"),
            local_vips=_addresses(section.get("local-vips")),
            remote_vips=_addresses(section.get("remote-vips")),
            established=_number(section.get("established")) or 0,
            rekey=_number(section.get("rekey-time")),
            reauth=_number(section.get("reauth-time")),
            children=tuple(
                ChildInfo(
                    sys.intern(_text(child.get("name"))),
                    sys.intern(_text(child.get("state"))),
                    _spi(child.get("spi-in")),
                )
                for child in section.get("child-sas", {}).values()
            ),
        )
    except _NOT_AS_EXPECTED as error:
        raise ViciError(f"an IKE_SA of connection {connection!r} could not be read from VICI: {error}") from error


def parse_connection(name: str, section: Section) -> ConnectionInfo:
    """One connection of list-conns. Raises ViciError on what charon would not send."""
    try:
        return ConnectionInfo(
            name=name,
            rekey_time=_number(section.get("rekey_time")) or 0,
            reauth_time=_number(section.get("reauth_time")) or 0,
            children=tuple(
                ChildConfig(child, _text(value.get("mode"))) for child, value in section.get("children", {}).items()
            ),
            dpd_delay=_number(section.get("dpd_delay")) or 0,
            remote_addresses=tuple(
                address for value in section.get("remote_addrs", ()) if not (address := _text(value)).startswith("%any")
            ),
        )
    except _NOT_AS_EXPECTED as error:
        raise ViciError(f"connection {name!r} could not be read from VICI: {error}") from error


class Event(NamedTuple):
    """A VICI event. `up` is None where the event has no direction; `old` is the SA before an ike-rekey."""

    kind: str
    sa: SaInfo
    up: bool | None = None
    old: SaInfo | None = None


def parse_event(kind: str, message: Section) -> list[Event]:
    """The IKE_SAs a VICI event tells of. Raises ViciError."""
    up = (_text(message.get("up")) == "yes") if kind.endswith("updown") else None
    events = []
    for name, section in message.items():
        if not isinstance(section, dict):
            continue
        if kind == "ike-rekey":
            # without one of them, parse_ike_sa says what it misses
            old, new = parse_ike_sa(name, section.get("old", {})), parse_ike_sa(name, section.get("new", {}))
            events.append(Event(kind, new, None, old))
        elif kind == "ike-update":
            # raised before charon changes the SA: the new endpoints stand beside the section, the old ones in it
            moved = {field: message[field] for field in _ENDPOINTS if field in message}
            events.append(Event(kind, parse_ike_sa(name, section | moved)))
        else:
            events.append(Event(kind, parse_ike_sa(name, section), up))
    return events


class Vici:
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
            release = _text(session.version().get("version"))
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
        return None if kind is None else (_text(kind, str(kind)), message)

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
        return await self._run("version", lambda session: _text(session.version().get("version")))

    async def started(self) -> int:
        """When charon was started, in Unix seconds by its host's clock; at most START_SECONDS before it really was."""

        def command(session: Any) -> str:
            return _text(session.stats()["uptime"]["since"])

        since = await self._run("stats", command)
        return int(time.mktime(time.strptime(since, "%b %d %H:%M:%S %Y")))

    async def plugins(self) -> list[str]:
        """The plugins that charon has loaded."""
        return await self._run("stats", lambda session: [_text(name) for name in session.stats()["plugins"]])

    async def pools(self) -> list[Pool]:
        """The in-memory pools that charon gives virtual IPs from."""

        def command(session: Any) -> list[Pool]:
            return [
                Pool(name, _text(section["base"]), _number(section["size"]) or 0)
                for name, section in session.get_pools().items()
            ]

        return await self._run("get-pools", command)

    async def list_sas(self, connection: str | None = None) -> list[SaInfo]:
        """All IKE_SAs, or those of one connection; waits for those that a thread of charon's holds, so none is left
        out."""

        def command(session: Any) -> list[SaInfo]:
            infos = []
            for entry in session.list_sas({"ike": connection} if connection else None):
                for name, section in entry.items():
                    try:
                        infos.append(parse_ike_sa(name, section))
                    except ViciError as error:
                        log.warning("vici-sa-unreadable", connection=name, reason=str(error))
            return infos

        return await self._run("list-sas", command)

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

    async def initiate(self, connection: str, child: str, patience: float) -> None:
        """Bring up a CHILD_SA, and its IKE_SA where there is none. `patience` in seconds. Raises ViciError."""

        def command(session: Any) -> None:
            request = {"ike": connection, "child": child, "timeout": str(int(patience * 1000)), "loglevel": "-1"}
            for _ in session.initiate(request):
                pass

        await self._run(f"initiate {connection}/{child}", command)

    async def terminate(self, connection: str, patience: float, *, force: bool = False) -> None:
        """End the IKE_SAs of a connection. Raises ViciError, also when there is none."""

        def command(session: Any) -> None:
            request = {"ike": connection, "timeout": str(int(patience * 1000)), "loglevel": "-1"}
            for _ in session.terminate(request | ({"force": "yes"} if force else {})):
                pass

        await self._run(f"terminate {connection}", command)


def expiry(info: SaInfo, connection: ConnectionInfo | None, now: float | None = None) -> tuple[int, int, int]:
    """(rekey_at, reauth_at, expires) of an IKE_SA in Unix seconds, 0 = never.

    charon deletes an IKE_SA at min(rekey, reauth) + over_time; over_time is charon's default,
    for VICI does not tell it.
    """
    at = time.time() if now is None else now
    rekey_at = int(at + info.rekey) if info.rekey is not None else 0
    reauth_at = int(at + info.reauth) if info.reauth is not None else 0
    soft = [t for t in (rekey_at, reauth_at) if t]
    if not soft:
        return rekey_at, reauth_at, 0
    over = connection.over_time if connection else int(OVER_TIME * (min(soft) - at))
    return rekey_at, reauth_at, min(soft) + over
