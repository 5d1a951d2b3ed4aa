"""charon's configured connections, and what swanctl.conf says of their children beyond VICI: read when they may have
changed, since no event reports a `swanctl --load-conns`."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from bridge.charon.child_events import ChildEvents
from bridge.charon.conf_parser import ChildProposals
from bridge.charon.installer import LOOK_SHARE
from bridge.charon.sa_tracker import SaTracker
from bridge.charon.vici_types import ViciError
from bridge.charon.vici_watch import ViciWatch
from bridge.service.tasks import spawn

CONNECTIONS_SECONDS: Final = 1.0
"""a list of connections is good for so long, as far as what is needed is in it"""
LEAST_CONNECTIONS_SECONDS: Final = 0.05
"""between two lists of connections"""
WANTING: Final = (("updown", "inactivity"), ("leftupdown", "inactivity"))
"""options of children, in swanctl.conf and in ipsec.conf, that charon acts on in an exchange only"""
MARKS: Final = ("mark_in", "mark_out")


class ConnectionReader:
    """Reads them into `tracker`. `swanctl`: the swanctl.conf that charon was loaded from, None where swanctl looks for
    it."""

    def __init__(self, tracker: SaTracker, vici: ViciWatch, swanctl: Path | None = None) -> None:
        self.wanted = False
        """a connection was named that is not among them"""
        self._tracker = tracker
        self._vici = vici
        self._swanctl = swanctl
        self._proposals: ChildProposals | None = None
        self._pfs: dict[tuple[str, str], str] = {}
        """children with a key exchange of their own, by (connection, child)"""
        self._wanting: set[tuple[str, str]] = set()
        """children with an updown script, or a time of inactivity"""
        self._marked: set[tuple[str, str]] = set()
        """children with marks"""
        self._plugins: list[str] = []
        """that charon has loaded"""
        self._events = ChildEvents()
        self._reading: asyncio.Task[None] | None = None
        self._read_from = 0.0
        self._next = 0.0
        """when connections were asked for, and when they may be again, by the monotonic clock"""

    @property
    def age(self) -> float:
        """Seconds since they were asked for."""
        return time.monotonic() - self._read_from

    def restarted(self) -> None:
        """charon is another process than before: it may have other plugins."""
        self._plugins = []

    def with_key_exchange(self, connection: str, child: str) -> bool:
        """Whether a CHILD_SA has a key exchange of its own (PFS), as far as swanctl.conf shows."""
        return (connection, child) in self._pfs

    def needs_event(self, connection: str, child: str) -> bool:
        """Whether other software waits for charon's event of a CHILD_SA, as far as can be known."""
        return self._events.needed(connection, child)

    async def read(self) -> None:
        """Take in what is configured now. Raises ViciError."""
        began = time.monotonic()
        self.wanted = False
        found = await self._vici.list_connections()
        if not self._plugins:
            # of one charon they do not change
            self._plugins = await self._vici.plugins()
        if found != self._tracker.connections or self._proposals is None or self._proposals.changed():
            self._proposals = await asyncio.to_thread(ChildProposals, self._swanctl)
            self._pfs = self._proposals.with_pfs(found)
            self._wanting = self._proposals.with_option(found, *WANTING)
            self._marked = self._proposals.with_option(found, MARKS, ("mark", *MARKS))
        # whether lookip has clients is looked at each time
        self._events = ChildEvents(self._plugins, self._wanting, self._marked)
        self._tracker.connections = found
        now = time.monotonic()
        self._read_from = began
        self._next = now + max(LEAST_CONNECTIONS_SECONDS, LOOK_SHARE * (now - began))

    def read_ahead(self) -> None:
        """Begin to read the connections, unless that is going on or they were read just now: `know` is going to
        need them."""
        if time.monotonic() < self._fresh_until or (self._reading is not None and not self._reading.done()):
            return

        async def ahead() -> None:
            with contextlib.suppress(ViciError):
                await self.read()

        self._reading = spawn("read-connections", ahead())

    @property
    def _fresh_until(self) -> float:
        """Until when (monotonic seconds) a list of connections that has what is needed need not be read again."""
        return max(self._read_from + CONNECTIONS_SECONDS, self._next)

    async def know(self, needed: Iterable[tuple[str, Iterable[str]]]) -> None:
        """Ask charon for its connections, unless these (connection, children) are all known and were read just now: no
        event reports a `swanctl --load-conns`. What charon does not answer leaves them as they are."""
        if self._reading is not None and not self._reading.done():
            await asyncio.wait([self._reading])
        now = time.monotonic()
        # in a storm they are few, and needed many times
        if all(self._is_configured(*one) for one in {(name, frozenset(children)) for name, children in needed}):
            if now < self._fresh_until:
                return
        elif now < self._next:
            await asyncio.sleep(min(self._next - now, CONNECTIONS_SECONDS))
        with contextlib.suppress(ViciError):
            await self.read()

    def _is_configured(self, name: str, children: Iterable[str]) -> bool:
        found = self._tracker.connections.get(name)
        return found is not None and {*children} <= {child.name for child in found.children}
