"""A gateway ends an IKE_SA by a DELETE, and its session is set up again by a full handshake: because the session's
authentication had ended, because it has just been resumed and the gateway's charon did not take all of it, because the
gateway had asked it to move and it could not, or, with `resume.after_delete: handshake`, whatever the reason was.

VICI reports an end in state DELETING whichever side sent the DELETE. The HA channel says which: charon reports each
verified request of the peer, and each request of its own, before it acts on it. An SA that ends right after a request
of the peer, and not around one from charon itself, was ended by the peer; shortly after one from charon itself, which
may have been a liveness check, only if it ends together with the peer's. In doubt it was this host.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

import structlog

from bridge.charon.charon import Charon
from bridge.charon.ike_sa import IkeSa, Requests
from bridge.charon.vici_types import ViciError
from bridge.charon.vpns import Vpn
from bridge.client.attempt import Attempt, Means
from bridge.client.auto_resume import NEWS_SECONDS, RETURN_MAX, RETURN_MIN
from bridge.client.candidates import Candidates
from bridge.client.outcome import Outcome, Result
from bridge.client.sessions import Session, Sessions

log = structlog.get_logger()

AGAIN_SECONDS: Final = 1.0
"""that charon has to begin a handshake by itself, where it is configured to"""
SPREAD: Final = 2.0
"""times AGAIN_SECONDS by which the handshakes of a gateway's clients differ: it deletes all their SAs at a time"""
PAUSE_MAX: Final = 300.0
"""seconds before a session is set up again whose last IKE_SA was deleted soon: its client may be locked out"""
FORGET_SECONDS: Final = 600.0
"""an IKE_SA that lived for so long was not deleted soon"""
TOGETHER_SECONDS: Final = 1.0
"""deletions of a VPN's IKE_SAs that come so soon after each other count as one; less than any pause"""
DELETE_SECONDS: Final = 1.0
"""from the peer's request to the end of the SA, at most"""
ANSWER_SECONDS: Final = 0.5
"""from a request of charon's own to the next of the peer, at least: an answer to a DELETE of its own ends the SA too"""
NOT_TAKEN_SECONDS: Final = 30.0
"""after a resumption its gateway has compared what it installed with what its charon has"""
ASKED_SECONDS: Final = 120.0
"""after a gateway asked a session to move, it may stop: a drain waits `drain.timeout`, and charon ends its SAs then"""
PROMPT_SECONDS: Final = 0.05
"""between the peer's DELETE and the end of the SA, as they are reported"""
UNDER_WAY: Final = ("CONNECTING", "ESTABLISHED")
"""states of an IKE_SA that works or may come to"""

Finish = Callable[[Vpn, Session, Attempt], Awaitable[Outcome]]


def ended_by_peer(requests: Requests, at: float) -> bool:
    """Whether the peer ended an SA that ended at `at` (the tracker's clock)."""
    after_own = requests.of_peer - requests.own
    if requests.deleting or after_own < 0:
        return False
    return at - requests.of_peer < (PROMPT_SECONDS if after_own < ANSWER_SECONDS else DELETE_SECONDS)


class SetUpAgain:
    """`later` starts a task, `finish` runs an attempt and notes its outcome."""

    def __init__(
        self,
        charon: Charon,
        sessions: Sessions,
        candidates: Candidates,
        means: Means,
        vpn_of: Callable[[Session], Vpn],
        finish: Finish,
        later: Callable[[str, Coroutine[Any, Any, None]], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._charon = charon
        self._sessions = sessions
        self._candidates = candidates
        self._means = means
        self._vpn_of = vpn_of
        self._finish = finish
        self._later = later
        self._clock = clock
        self._deleted: dict[str, tuple[float, float]] = {}
        """by VPN: when a session of it was deleted last, and the pause after that"""
        self._unended: dict[Session, float] = {}
        """until when an end by its gateway is no end of a session"""

    def resumed(self, session: Session, sa: IkeSa) -> None:
        """A session goes on with this SA: its gateway ends it soon if its charon does not take one of the CHILD_SAs."""
        self._goes_on(session, sa, NOT_TAKEN_SECONDS)

    def asked_away(self, sa: IkeSa) -> None:
        """The gateway of this SA wants its session to move: where it cannot, the gateway's stop ends the SA."""
        session = self._sessions.of(sa.id.spis)
        if session is not None:
            self._goes_on(session, sa, ASKED_SECONDS)

    def _goes_on(self, session: Session, sa: IkeSa, seconds: float) -> None:
        now = self._clock()
        self._unended = {one: until for one, until in self._unended.items() if now < until}
        self._unended[session] = now + seconds
        if sa.requests is None:
            sa.requests = Requests()

    def goes_on(self, session: Session) -> bool:
        """Whether an end by its gateway is no end of a session: it has just been resumed, or its gateway asked it to
        move, and it did not."""
        return self._clock() < self._unended.get(session, float("-inf"))

    def lapsed(self, session: Session, sa: IkeSa) -> None:
        """An SA ended when its authentication did: its gateway ended it, or charon, which authenticates again."""
        self._later(f"again {session.connection}", self._lapsed(session, sa))

    def deleted(self, session: Session, sa: IkeSa) -> None:
        """One of the sides ended an SA by a DELETE."""
        self._later(f"deleted {session.connection}", self._deleted_by_peer(session, sa, self._clock()))

    async def _deleted_by_peer(self, session: Session, sa: IkeSa, at: float) -> None:
        # the HA channel's news may come after VICI's
        await asyncio.sleep(NEWS_SECONDS)
        if sa.requests is None or not ended_by_peer(sa.requests, at):
            return
        before, pause = self._deleted.get(session.vpn, (float("-inf"), 0.0))
        if pause and at - before < TOGETHER_SECONDS:
            # a gateway that stops deletes all that this host has there
            pass
        elif at - before > FORGET_SECONDS + pause:
            pause = random.uniform(AGAIN_SECONDS, (1 + SPREAD) * AGAIN_SECONDS)
        else:
            pause = min(2 * pause, PAUSE_MAX)
        self._deleted[session.vpn] = at, pause
        log.warning(
            "deleted-by-gateway",
            vpn=session.vpn,
            connection=sa.connection,
            handshake_after=round(pause, 1),
            **sa.id.logged,
        )
        await self._again(session, "deleted-by-gateway", pause)

    async def _lapsed(self, session: Session, sa: IkeSa) -> None:
        await asyncio.sleep(AGAIN_SECONDS)
        if await self._is_under_way(session):
            return
        log.info("authentication-lapsed", vpn=session.vpn, connection=sa.connection, **sa.id.logged)
        await self._again(session, "authentication-ended", 0.0)

    async def _again(self, session: Session, reason: str, pause: float) -> None:
        """A full handshake, unless charon does that by itself; again and again while no gateway takes it. The gateway
        that ended the SA comes last: it may be shutting down."""
        vpn, old = self._vpn_of(session), session.last
        while True:
            await asyncio.sleep(pause)
            if await self._is_under_way(session):
                return
            await self._candidates.resolve(vpn)
            gateways = list(self._candidates.of(vpn, session, None, restored=False))
            if reason != "authentication-ended":
                gateways.sort(key=lambda gateway: self._candidates.is_here(old, gateway))
            for gateway in gateways:
                attempt = Attempt.set_up_at(self._means, vpn, session, gateway, reason)
                if (await self._finish(vpn, session, attempt)).result is not Result.FAILED:
                    return
            pause = min(max(2 * pause, RETURN_MIN), max(RETURN_MAX, pause))

    async def _is_under_way(self, session: Session) -> bool:
        """Whether charon has an IKE_SA that may be the session's next."""
        try:
            connections = {info.connection for info in await self._charon.vici.list_sas() if info.state in UNDER_WAY}
        except ViciError:
            return False
        return any(self._sessions.may_stand_for(connection, session) for connection in connections)
