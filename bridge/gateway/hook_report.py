"""The events of sessions, as they are written into the journal and given to the program of `hooks.session`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from enum import StrEnum
from functools import partial
from typing import Any, Final

from bridge.charon.ike_sa import IkeSa
from bridge.charon.sa_tracker import SaTracker
from bridge.gateway.hook_program import Call, HookProgram
from bridge.gateway.hook_session import Name, Session
from bridge.gateway.session_journal import SessionJournal
from bridge.stub.stub import Stub
from bridge.stub.types import ChildSa


class SessionEvent(StrEnum):
    """What the program gets."""

    ESTABLISHED = "established"
    RESUMED_HERE = "resumed-here"
    TAKEN_OVER = "taken-over"
    MOVED_AWAY = "moved-away"
    ENDED = "ended"


ENDS: Final = (SessionEvent.MOVED_AWAY, SessionEvent.ENDED)


class HookReport:
    """Tells `program`, and keeps in `journal` which sessions it was told of."""

    def __init__(
        self,
        program: HookProgram,
        journal: SessionJournal,
        tracker: SaTracker,
    ) -> None:
        self._program = program
        self._journal = journal
        self._tracker = tracker

    def raised(self, event: SessionEvent, session: Session, *, reason: str | None = None) -> None:
        """Something happened to a session."""
        sa = session.sa
        over = event in ENDS
        facts = {
            **_facts(session.name, sa.id.spis, sa, session.children if over else sa.children),
            "previous": session.previous.facts if session.previous else None,
        }
        to = session.to if event is SessionEvent.MOVED_AWAY else None
        call = self._call(event, facts, octets=session.octets.both, to=to, reason=reason, own=sa.id.spis)
        name = session.name.text
        session.key = session.key or _key(facts)
        if over:
            self._end(session.key, name, call)
        else:
            begin, told = partial(self._journal.begin, name, facts), partial(self._journal.told, name, facts)
            self._program.call(session.key, call._replace(before=begin, after=told))

    def lost(self, previous: Name, old: Stub) -> None:
        """A session of a gateway that failed went on here: that gateway reports no end of it."""
        facts = {**_facts(previous, old.spi_i + old.spi_r, old, old.children), "previous": None}
        reason = "gateway-failed"
        # no other sidecar will tell of it, should this one be killed before the program has run
        self._journal.add(previous.text, {**facts, "reason": reason})
        call = self._call(SessionEvent.ENDED, facts, reason=reason)
        self._end(_key(facts), previous.text, call._replace(before=self._journal.write))

    def unseen(self, name: str, facts: Mapping[str, Any]) -> None:
        """A session ended while no sidecar ran, or the sidecar before this one was about to tell of its end."""
        reason = facts.get("reason") or "sidecar-was-away"
        self._end(_key(facts), name, self._call(SessionEvent.ENDED, facts, reason=reason))

    def _end(self, key: str, name: str, call: Call) -> None:
        self._journal.ending(name)
        self._program.call(key, call._replace(after=partial(self._journal.ended, name)))

    def _call(
        self,
        event: SessionEvent,
        facts: Mapping[str, Any],
        *,
        octets: tuple[int | None, int | None] = (None, None),
        to: str | None = None,
        reason: str | None = None,
        own: bytes = b"",
    ) -> Call:
        """The call of the program; `own` is the IKE_SA of the session, by both SPIs, if it is one of this gateway."""
        now, addresses = round(time.time(), 3), facts["virtual_ips"]

        def build() -> dict[str, Any]:
            in_use = [address for address in addresses if self._has(address, own)]
            ends = {"octets_in": octets[0], "octets_out": octets[1], "to": to, "reason": reason}
            return {"event": str(event), "time": now, **facts, "virtual_ips_in_use": in_use, **ends}

        return Call(str(event), build)

    def _has(self, address: str, own: bytes) -> bool:
        """Whether another IKE_SA here than `own` has an address; not one whose client has yet to confirm it."""
        for spis in self._tracker.virtual_ips.holders([address]) - {own}:
            sa = self._tracker.sas.get(spis)
            if sa is None or sa.up:
                return True
        return False


def _key(facts: Mapping[str, Any]) -> str:
    """The end of the session that had an address comes before the start of the next."""
    addresses: list[str] = facts["virtual_ips"]
    return addresses[0] if addresses else str(facts["session"])


def _facts(name: Name, spis: bytes, of: IkeSa | Stub, children: Iterable[ChildSa]) -> dict[str, Any]:
    """What an event says of a session with the IKE_SA, or the stub, `of`."""
    return {
        **name.facts,
        "connection": of.connection,
        "spi_i": spis[:8].hex(),
        "spi_r": spis[8:].hex(),
        "local_id": of.local_id.text if of.local_id else None,
        "remote_id": of.remote_id.text if of.remote_id else None,
        "eap_id": of.eap_id.text if of.eap_id else None,
        "local": {"address": of.local.address, "port": of.local.port} if of.local else None,
        "remote": {"address": of.remote.address, "port": of.remote.port} if of.remote else None,
        "virtual_ips": of.remote_vips,
        "children": _children(children),
        "established": of.established,
        "authenticated_until": of.authenticated_until or None,
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
