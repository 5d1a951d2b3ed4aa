"""When the client moves by itself: a gateway died, or this host comes up with the sessions that it had."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from bridge.charon.charon import Charon
from bridge.charon.vici_types import ViciError
from bridge.client.outcome import Outcome, Result
from bridge.client.sessions import Session, Sessions
from bridge.service.tasks import end, spawn

NEWS_SECONDS = 0.05
"""the HA message may come so long after VICI's event about the same SA"""
RETURN_MIN, RETURN_MAX = 5.0, 60.0
"""between attempts to come back when no gateway can be reached, in seconds"""


class AutoResume:
    """Resumes each session that went down, again and again while no gateway can be reached: the fault may be on this
    side. `begin` starts to move a session."""

    def __init__(self, charon: Charon, sessions: Sessions, begin: Callable[[Session], asyncio.Task[Outcome]]) -> None:
        self._charon = charon
        self._sessions = sessions
        self._begin = begin
        self._returning: dict[Session, asyncio.Task[None]] = {}

    def start(self, session: Session) -> None:
        """Try from now on."""
        if session not in self._returning:
            task = spawn(f"return {session.connection}", self._return(session))
            self._returning[session] = task
            task.add_done_callback(lambda done: self._ended(session, done))

    def stop(self, session: Session) -> None:
        """Try no more."""
        task = self._returning.pop(session, None)
        if task is not None:
            task.cancel()

    def _ended(self, session: Session, task: asyncio.Task[None]) -> None:
        # one that was stopped ends after the next one may have begun
        if self._returning.get(session) is task:
            del self._returning[session]

    async def close(self) -> None:
        """Stop."""
        await end(*self._returning.values())

    async def _return(self, session: Session) -> None:
        pause = NEWS_SECONDS
        while True:
            await asyncio.sleep(pause)
            if session.up or not self._sessions.has(session):
                return
            outcome = await asyncio.shield(self._begin(session))
            if outcome.result is not Result.FAILED:
                return
            pause = min(max(2 * pause, RETURN_MIN), RETURN_MAX)

    async def restored(self, sessions: Iterable[Session]) -> None:
        """This host came up with sessions that it had before: once charon has its connection, each of them is resumed,
        unless charon has begun one in its place by itself."""
        await self._charon.reconciled.wait()
        waiting = list(sessions)
        while waiting:
            loaded = [one for one in waiting if self._charon.connection(one.connection) is not None]
            waiting = [one for one in waiting if one not in loaded]
            begun = await self._begun() if loaded else set()
            for session in loaded:
                if not any(self._sessions.may_stand_for(name, session) for name in begun):
                    self.start(session)
            # no event reports connections that are loaded
            await asyncio.sleep(NEWS_SECONDS)

    async def _begun(self) -> set[str]:
        """The connections that charon has, or sets up, an IKE_SA of."""
        try:
            return {info.connection for info in await self._charon.vici.list_sas()}
        except ViciError:
            # charon went away again, and has none
            return set()
