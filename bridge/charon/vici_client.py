"""The few VICI commands that the sidecar needs, each over a connection of its own.

VICI is the source of truth for which IKE_SAs exist, how long they live and which connections are configured.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Final

import structlog
from vici.exception import CommandException

from bridge.charon.vici_session import FAILURES, ViciSession
from bridge.charon.vici_types import (
    ConnectionInfo,
    GuardInfo,
    SaInfo,
    Section,
    ViciError,
    as_number,
    as_text,
    parse_connection,
    parse_guard,
    parse_ike_sa,
    parse_tasks,
)
from bridge.ike.address import Pool

log = structlog.get_logger()

START_SECONDS: Final = 2
"""how much too early the start may be that charon reports: two clocks, both cut to seconds"""

SLICE_SECONDS: Final = 0.001
"""of a long list that is read and handed over before the event loop has its turn; its timers know whole milliseconds"""
LISTING_SHARE: Final = 0.25
"""of the event loop's time, at most, that goes into reading a long list"""


class ViciClient:
    """Commands to one charon. Every method raises ViciError where charon is not there, or refuses."""

    def __init__(self, path: str) -> None:
        self.path = path

    @asynccontextmanager
    async def _session(self, name: str) -> AsyncIterator[ViciSession]:
        """A session for the command `name`, whose failures are ViciError."""
        with _failures(name):
            async with ViciSession.open(self.path) as session:
                yield session

    async def _request(self, command: str) -> Section:
        async with self._session(command) as session:
            return await session.request(command)

    async def version(self) -> str:
        """charon's release, such as "5.9.8"."""
        return as_text((await self._request("version")).get("version"))

    async def started(self) -> int:
        """When charon was started, in Unix seconds by its host's clock; at most START_SECONDS before it really was."""
        stats = await self._request("stats")
        with _failures("stats"):
            since = as_text(stats["uptime"]["since"])
            return int(time.mktime(time.strptime(since, "%b %d %H:%M:%S %Y")))

    async def half_open(self) -> int:
        """How many IKE_SAs are in state CONNECTING, or about to be."""
        stats = await self._request("stats")
        with _failures("stats"):
            return as_number(stats["ikesas"]["half-open"]) or 0

    async def plugins(self) -> list[str]:
        """The plugins that charon has loaded."""
        return [as_text(name) for name in (await self._request("stats")).get("plugins", ())]

    async def pools(self) -> list[Pool]:
        """The in-memory pools that charon gives virtual IPs from."""
        pools = await self._request("get-pools")
        with _failures("get-pools"):
            return [
                Pool(name, as_text(section["base"]), as_number(section["size"]) or 0) for name, section in pools.items()
            ]

    async def list_sas(self, connection: str | None = None) -> list[SaInfo]:
        """All IKE_SAs, or those of one connection; waits for those that a thread of charon's holds, so none is left
        out."""
        return [info async for info in self._listed(connection)]

    async def each_sas(self, take: Callable[[list[SaInfo]], None]) -> float:
        """All IKE_SAs, as `list_sas`, handed to `take` some at a time.

        charon answers immediately with all it has then, so the last of a long list may be minutes old. Reading it
        leaves the event loop most of its time. Gives the seconds it slept for that. Raises what `take` raises.
        """
        slept, infos = 0.0, list[SaInfo]()
        nap = SLICE_SECONDS * (1 / LISTING_SHARE - 1)
        async with aclosing(self._listed()) as listed:
            began = time.perf_counter()
            async for info in listed:
                infos.append(info)
                if time.perf_counter() - began < SLICE_SECONDS:
                    continue
                take(infos)
                infos = []
                await asyncio.sleep(nap)
                slept += nap
                began = time.perf_counter()
        take(infos)
        return slept

    async def _listed(self, connection: str | None = None) -> AsyncGenerator[SaInfo]:
        """The answer to list-sas, of one connection if given; what cannot be read is left out."""
        message = {"ike": connection} if connection else {}
        async with (
            self._session("list-sas") as session,
            aclosing(session.stream("list-sas", "list-sa", message)) as entries,
        ):
            async for entry in entries:
                for name, section in entry.items():
                    try:
                        info = parse_ike_sa(name, section)
                    except ViciError as error:
                        log.warning("vici-sa-unreadable", connection=name, reason=str(error))
                    else:
                        yield info

    async def find_sa(self, connection: str, spis: bytes) -> SaInfo | None:
        """The IKE_SA of a connection that has these SPIs (16 octets)."""
        return next((info for info in await self.list_sas(connection) if info.spis == spis), None)

    async def tasks(self, unique_ids: Sequence[str]) -> list[frozenset[str]]:
        """What charon has begun or queued at each of the IKE_SAs with these unique IDs; nothing where there is no such
        IKE_SA. Over one connection. Raises ViciError."""
        found = []
        async with self._session("list-sas") as session:
            for unique_id in unique_ids:
                names: frozenset[str] = frozenset()
                async with aclosing(session.stream("list-sas", "list-sa", {"ike-id": unique_id})) as entries:
                    async for entry in entries:
                        names = names.union(*map(parse_tasks, entry.values()))
                found.append(names)
        return found

    async def list_connections(self) -> dict[str, ConnectionInfo]:
        """All configured connections by name."""
        found: dict[str, ConnectionInfo] = {}
        async with (
            self._session("list-conns") as session,
            aclosing(session.stream("list-conns", "list-conn")) as entries,
        ):
            async for entry in entries:
                found |= {name: parse_connection(name, section) for name, section in entry.items()}
        return found

    async def list_guards(self) -> list[GuardInfo]:
        """The policies that keep packets in while there is no CHILD_SA: those of children that drop, and traps."""
        wanted = {"drop": "yes", "trap": "yes"}
        async with (
            self._session("list-policies") as session,
            aclosing(session.stream("list-policies", "list-policy", wanted)) as entries,
        ):
            return [parse_guard(section) async for entry in entries for section in entry.values()]

    async def initiate(self, connection: str, child: str, patience: float, used: set[str]) -> None:
        """Bring up a CHILD_SA, and its IKE_SA where there is none. `patience` in seconds. `used` gets the unique IDs of
        the IKE_SAs that charon worked on for that, also where it fails. Raises ViciError."""
        # level 1, charon's default, names the IKE_SA in each line
        message = {"ike": connection, "child": child, "timeout": str(int(patience * 1000)), "loglevel": "1"}
        async with (
            self._session(f"initiate {connection}/{child}") as session,
            aclosing(session.stream("initiate", "control-log", message)) as lines,
        ):
            async for line in lines:
                if unique_id := as_text(line.get("ikesa-uniqueid")):
                    used.add(unique_id)

    async def reauthenticate(self, unique_id: str) -> None:
        """Begin to authenticate the IKE_SA with this unique ID again. Raises ViciError, also when there is none."""
        name = f"rekey #{unique_id}"
        async with self._session(name) as session:
            answer = await session.request("rekey", {"ike-id": unique_id, "reauth": "yes"})
        if as_text(answer.get("success")) != "yes":
            raise ViciError(f"{name}: {as_text(answer.get('errmsg')) or 'refused'}")

    async def rekey_children(self, wanted: Sequence[tuple[str, str]]) -> list[str]:
        """Begin to rekey CHILD_SAs, each given by the unique ID of its IKE_SA and its name, over one connection. For
        each the reason why charon refused, "" if it did not. Raises ViciError where charon does not answer."""
        refused = []
        async with self._session("rekey") as session:
            for unique_id, child in wanted:
                try:
                    answer = await session.request("rekey", {"ike-id": unique_id, "child": child})
                except CommandException as error:
                    refused.append(str(error))
                else:
                    done = as_text(answer.get("success")) == "yes"
                    refused.append("" if done else as_text(answer.get("errmsg")) or "refused")
        return refused

    async def end_sa(self, unique_id: str, patience: float | None = None) -> None:
        """End the IKE_SA with this unique ID. charon sends its peer a DELETE, and waits up to `patience` seconds for
        the answer; not at all without. Raises ViciError, also when there is none."""
        async with self._session(f"terminate #{unique_id}") as session:
            await session.request("terminate", _terminate(unique_id, patience))

    @asynccontextmanager
    async def ending(self, same: Callable[[], bool]) -> AsyncIterator[Callable[[str], Awaitable[str]]]:
        """A connection over which IKE_SAs are ended as by `end_sa`, without waiting for their peers: a function that
        takes a unique ID and gives the reason why charon refused, "" if it did not. `same()` returns whether the charon
        runs that gave these IDs. Raises ViciError, also inside, where it does not or does not answer."""
        async with self._session("terminate") as session:
            # this connection is to it, if it still runs now
            if not same():
                raise ViciError("terminate: charon was restarted")

            async def end_sa(unique_id: str) -> str:
                try:
                    await session.request("terminate", _terminate(unique_id, None))
                except CommandException as error:
                    return str(error)
                return ""

            yield end_sa


def _terminate(unique_id: str, patience: float | None) -> dict[str, str]:
    """With -1 charon answers once it has sent its DELETE and raised its events."""
    timeout = -1 if patience is None else int(patience * 1000)
    return {"ike-id": unique_id, "force": "yes", "timeout": str(timeout), "loglevel": "-1"}


@contextmanager
def _failures(name: str) -> Iterator[None]:
    """What fails within a command, or is not there in its answer, as ViciError."""
    try:
        yield
    except (*FAILURES, KeyError, TypeError, ValueError) as error:
        raise ViciError(f"{name}: {str(error) or type(error).__name__}") from error
