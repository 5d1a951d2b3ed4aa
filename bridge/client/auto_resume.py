"""When the client moves by itself: a gateway died, or this host comes up with the sessions that it had."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from bridge.charon.charon import Charon
from bridge.client.outcome import Outcome, Result
from bridge.client.sessions import Sessions
from bridge.config import GatewayEntry
from bridge.service.tasks import end, spawn

NEWS_SECONDS = 0.05
RETURN_MIN, RETURN_MAX = 5.0, 60.0
"""between attempts to come back when no gateway can be reached"""


class AutoResume:
    """Resumes what went down, again and again while no gateway can be reached: the fault may be on this side.

    `begin` starts to move the SA of a connection.
    """

    def __init__(self, charon: Charon, sessions: Sessions, begin: Callable[[str], asyncio.Task[Outcome]]) -> None:
        self._charon = charon
        self._sessions = sessions
        self._begin = begin
        self._returning: dict[str, asyncio.Task[None]] = {}

    def start(self, connection: str) -> None:
        """Try from now on."""
        task = self._returning.get(connection)
        if task is None or task.done():
            self._returning[connection] = spawn(f"return {connection}", self._return(connection))

    def stop(self, connection: str) -> None:
        """Try no more."""
        task = self._returning.pop(connection, None)
        if task is not None:
            task.cancel()

    async def close(self) -> None:
        """Stop."""
        await end(*self._returning.values())

    async def _return(self, connection: str) -> None:
        # the HA message with the same news may still be on its way
        pause = NEWS_SECONDS
        while True:
            await asyncio.sleep(pause)
            if self._sessions.up():
                return
            outcome = await asyncio.shield(self._begin(connection))
            if outcome.result is not Result.FAILED:
                return
            pause = min(max(2 * pause, RETURN_MIN), RETURN_MAX)

    async def restored(self, gateways: tuple[GatewayEntry, ...]) -> None:
        """This host came up with sessions that it had before: once charon has its connections, one of them is resumed,
        unless charon has begun a session by itself."""
        names = {gateway.connection for gateway in gateways}
        await self._charon.reconciled.wait()
        while not any(self._charon.connection(name) for name in names):  # noqa: ASYNC110 - nothing tells of them
            await asyncio.sleep(NEWS_SECONDS)
        begun = {info.connection for info in await self._charon.vici.list_sas()}
        lost = self._sessions.lost()
        if lost is not None and not names & begun:
            self.start(lost)
