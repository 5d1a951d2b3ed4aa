"""The events of sessions, as they are written into the journal and given to the program of `hooks.session`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from typing import Any, Final

from bridge.charon.sa_tracker import SaTracker
from bridge.gateway.hook_program import HookProgram
from bridge.gateway.hook_session import Name, Session
from bridge.gateway.session_journal import SessionJournal
from bridge.stub.stub import Stub
from bridge.stub.types import ChildSa, Endpoint, Identity


class SessionEvent(StrEnum):
    """What the program gets."""

    ESTABLISHED = "established"
    RESUMED_HERE = "resumed-here"
    TAKEN_OVER = "taken-over"
    MOVED_AWAY = "moved-away"
    ENDED = "ended"


ENDS: Final = (SessionEvent.MOVED_AWAY, SessionEvent.ENDED)


class HookReport:
    """Tells `program`, and keeps in `journal` which sessions it was told of. `wall` gives Unix seconds."""

    def __init__(
        self,
        program: HookProgram,
        journal: SessionJournal,
        tracker: SaTracker,
        *,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._program = program
        self._journal = journal
        self._tracker = tracker
        self._wall = wall

    def raised(self, event: SessionEvent, session: Session, *, reason: str | None = None) -> None:
        """Something happened to a session."""
        sa = session.sa
        over = event in ENDS
        facts = {
            **session.name.facts,
            "connection": sa.connection,
            "spi_i": sa.id.spi_i.hex(),
            "spi_r": sa.id.spi_r.hex(),
            **_peers(sa.local_id, sa.remote_id, sa.eap_id, sa.local, sa.remote),
            "virtual_ips": sa.remote_vips,
            "children": _children(session.children if over else sa.children),
            "established": sa.established,
            "authenticated_until": sa.authenticated_until or None,
            "previous": session.previous.facts if session.previous else None,
        }
        if over:
            self._journal.end(session.name.text)
        else:
            self._journal.begin(session.name.text, facts)
        to = session.to if event is SessionEvent.MOVED_AWAY else None
        self._call(event, facts, octets=session.octets.both, to=to, reason=reason, own=sa.id.spis)

    def lost(self, previous: Name, old: Stub) -> None:
        """A session of a gateway that failed went on here: that gateway reports no end of it."""
        facts = {
            **previous.facts,
            "connection": old.connection,
            "spi_i": old.spi_i.hex(),
            "spi_r": old.spi_r.hex(),
            **_peers(old.local_id, old.remote_id, old.eap_id, old.local, old.remote),
            "virtual_ips": old.remote_vips,
            "children": _children(old.children),
            "established": old.established,
            "authenticated_until": old.authenticated_until or None,
            "previous": None,
        }
        self._call(SessionEvent.ENDED, facts, reason="gateway-failed")

    def unseen(self, name: str, facts: Mapping[str, Any]) -> None:
        """A session ended while no sidecar ran."""
        self._journal.end(name)
        self._call(SessionEvent.ENDED, facts, reason="sidecar-was-away")

    def _call(
        self,
        event: SessionEvent,
        facts: Mapping[str, Any],
        *,
        octets: tuple[int | None, int | None] = (None, None),
        to: str | None = None,
        reason: str | None = None,
        own: bytes = b"",
    ) -> None:
        """Have the program called; `own` is the IKE_SA of the session, by both SPIs, if it is one of this gateway."""
        now, addresses = round(self._wall(), 3), facts["virtual_ips"]

        def build() -> dict[str, Any]:
            in_use = [address for address in addresses if self._has(address, own)]
            ends = {"octets_in": octets[0], "octets_out": octets[1], "to": to, "reason": reason}
            return {"event": str(event), "time": now, **facts, "virtual_ips_in_use": in_use, **ends}

        # the end of the session that had an address comes before the start of the next
        self._program.call(addresses[0] if addresses else facts["session"], str(event), build)

    def _has(self, address: str, own: bytes) -> bool:
        """Whether another IKE_SA here than `own` has an address; not one whose client has yet to confirm it."""
        for spis in self._tracker.virtual_ips.holders([address]) - {own}:
            sa = self._tracker.sas.get(spis)
            if sa is None or sa.up:
                return True
        return False


def _peers(
    local_id: Identity | None,
    remote_id: Identity | None,
    eap_id: Identity | None,
    local: Endpoint | None,
    remote: Endpoint | None,
) -> dict[str, Any]:
    return {
        "local_id": local_id.text if local_id else None,
        "remote_id": remote_id.text if remote_id else None,
        "eap_id": eap_id.text if eap_id else None,
        "local": {"address": local.address, "port": local.port} if local else None,
        "remote": {"address": remote.address, "port": remote.port} if remote else None,
    }


def _children(children: Iterable[ChildSa]) -> list[dict[str, Any]]:
    return [
        {
            "name": child.name,
            "local_ts": [selector.text for selector in child.local_ts],
            "remote_ts": [selector.text for selector in child.remote_ts],
        }
        for child in children
    ]
