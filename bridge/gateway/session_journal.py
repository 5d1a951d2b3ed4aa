"""Which sessions the program of `hooks.session` was told of and not of their end, in a file, for the next start.

A session may end while no sidecar runs. The sidecar that starts then reports the end, or the firewall would keep the
session's addresses, and its account would stay open. A sidecar may be killed at any moment: the beginning is in the
file before the program is called, and the end once the program has run. So each of them is reported once, or twice
where the sidecar was killed in between. Of a session of a failed gateway, which has its end reported here alone, the
file has the facts with a "reason" from when the failure is known.

The file has a JSON object a line: what a session's first event said, with `"told": false`, then `{"told": NAME}` and
`{"ended": NAME}`. No keys are in it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog

from bridge.service.state_file import append, replace

log = structlog.get_logger()

FILE: Final = "sessions"
"""in the folder that `state` names"""
WRITE_SECONDS: Final = 0.5
"""between two writes to the file"""
AGAIN_SECONDS: Final = 5.0
"""until the next attempt, where the file could not be written"""
COMPACT_LINES: Final = 10_000
"""a file with this many lines more than twice the sessions in it is written again"""


class _Line(msgspec.Struct):
    """As much of a line as is needed here."""

    session: str | None = None
    virtual_ips: list[str] | None = None
    told: str | bool | None = None
    ended: str | None = None


class SessionJournal:
    """The open sessions by name, with the facts of their first event. `directory` is where the file lies, None for
    memory alone."""

    def __init__(self, directory: str | Path | None) -> None:
        self._path = None if directory is None else Path(directory) / FILE
        self._open: dict[str, bytes] = {}
        """encoded, which is smaller"""
        self._untold: set[str] = set()
        """those that the sidecar before this one recorded, and perhaps did not tell the program of"""
        self._ending: set[str] = set()
        """those that have ended; the program is still to be told"""
        self._unwritten: list[bytes] = []
        self._writing = asyncio.Lock()
        self._lines = 0
        self._failed = False
        self._torn = False
        """the file does not end with a whole line"""
        self._load()
        self._before = list(self._open)

    @property
    def lasts(self) -> bool:
        """Whether the sidecar that starts next will know."""
        return self._path is not None

    def __contains__(self, name: str) -> bool:
        """Whether the program was told of its beginning, and its end is not under way."""
        return name in self._open and name not in self._untold and name not in self._ending

    def before(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The sessions that were open when the sidecar before this one stopped, and are. Gives them once."""
        names, self._before = self._before, []
        for name in names:
            if name in self._open and name not in self._ending:
                facts = msgspec.json.decode(self._open[name], type=dict[str, Any])
                facts.pop("told", None)
                yield name, facts

    async def begin(self, name: str, facts: Mapping[str, Any]) -> None:
        """The program is about to be told of a session: that is in the file, where it can be written, when this
        returns."""
        self.add(name, facts)
        if not self._failed:
            await self.write()

    def add(self, name: str, facts: Mapping[str, Any]) -> None:
        """The same, in the file with the next write. With a `reason` among the facts it is a session of which the
        program is to be told its end alone, with that reason."""
        self._untold.discard(name)
        self._open[name] = msgspec.json.encode({**facts, "told": False})
        self._unwritten.append(self._open[name])

    def told(self, name: str, facts: Mapping[str, Any]) -> None:
        """The program was told of a session."""
        if name in self._open:
            self._open[name] = msgspec.json.encode(facts)
            self._unwritten.append(msgspec.json.encode({"told": name}))

    def ending(self, name: str) -> None:
        """A session ended, and the program is to be told."""
        self._ending.add(name)

    def ended(self, name: str) -> None:
        """The program was told of the end."""
        self._ending.discard(name)
        self._untold.discard(name)
        if self._open.pop(name, None) is not None:
            self._unwritten.append(msgspec.json.encode({"ended": name}))

    async def keep(self) -> None:
        """Write what is new to the file, until cancelled."""
        while True:
            await asyncio.sleep(AGAIN_SECONDS if self._failed else WRITE_SECONDS)
            await self.write()

    async def write(self) -> None:
        """Write what is new to the file: all of it at once, while others wait for their part."""
        async with self._writing:
            await self._write()

    async def _write(self) -> None:
        lines, self._unwritten = self._unwritten, []
        if self._path is None or not (lines or self._failed):
            return
        # after a failure nothing is known of what is in the file: all that is open takes its place
        compact = self._failed or self._torn or self._lines + len(lines) > 2 * len(self._open) + COMPACT_LINES
        if compact:
            lines = list(self._open.values())
        text = b"".join([line + b"\n" for line in lines]).decode()
        try:
            await asyncio.to_thread(replace if compact else append, self._path, text)
        except OSError as error:
            if not self._failed:
                fix = "make the folder of `state` writable"
                log.warning("sessions-not-kept", file=str(self._path), reason=error.strerror, fix=fix)
            self._failed = True
        else:
            self._failed = self._torn = False
            self._lines = len(lines) if compact else self._lines + len(lines)

    def _load(self) -> None:
        if self._path is None:
            return
        try:
            octets = self._path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning("sessions-not-read", file=str(self._path), reason=error.strerror)
            return
        lines = octets.splitlines()
        self._torn = not octets.endswith(b"\n") and bool(octets)
        self._lines, unreadable = len(lines), 0
        for line in lines:
            try:
                entry = msgspec.json.decode(line, type=_Line)
                if entry.ended is not None:
                    self._open.pop(entry.ended, None)
                    self._untold.discard(entry.ended)
                elif isinstance(entry.told, str):
                    self._untold.discard(entry.told)
                elif entry.session is not None and entry.virtual_ips is not None:
                    self._open[entry.session] = line
                    (self._untold.discard if entry.told is None else self._untold.add)(entry.session)
            except (msgspec.MsgspecError, ValueError):
                # the last line of a host that lost its power, perhaps
                unreadable += 1
        if unreadable:
            log.warning("sessions-not-read", file=str(self._path), lines=unreadable)
