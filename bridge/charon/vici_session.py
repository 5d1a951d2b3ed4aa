"""One connection to charon's VICI socket, on the event loop. The `vici` package's own session blocks; its packets and
messages are used as they are.

A packet is a 32-bit length and that many octets (strongSwan, src/libcharon/plugins/vici/README.md).
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from vici.exception import CommandException, DeserializationException, EventUnknownException, SessionException
from vici.protocol import Message, Packet, Transport

from bridge.charon.vici_types import Section, as_text

ANSWER_SECONDS: Final = 60.0
"""a charon that says nothing for so long hangs"""
AGAIN_SECONDS: Final = 0.01
"""between two attempts to connect"""
LENGTH: Final = struct.Struct("!I")

FAILURES: Final = (
    OSError,
    CommandException,
    DeserializationException,
    EventUnknownException,
    SessionException,
    struct.error,
    UnicodeDecodeError,
)
"""all that a session raises: charon is not there, refuses, or says what cannot be read"""


async def _connected(path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection. charon's socket lets three wait: more that come together are refused with EAGAIN."""
    while True:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.setblocking(False)
            # at once or not at all: the event loop would take EAGAIN for a connection that is under way
            sock.connect(path)
            return await asyncio.open_unix_connection(sock=sock, limit=Transport.MAX_SEGMENT)
        except BlockingIOError:
            sock.close()
            await asyncio.sleep(AGAIN_SECONDS)
        except BaseException:
            sock.close()
            raise


class ViciSession:
    """Commands and events of one connection, one command at a time. Every method raises FAILURES."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._early: deque[tuple[str, Section]] = deque()
        """events that came while another answer was awaited"""

    @classmethod
    @asynccontextmanager
    async def open(cls, path: str) -> AsyncIterator[ViciSession]:
        """A session over the Unix socket at `path`."""
        async with asyncio.timeout(ANSWER_SECONDS):
            reader, writer = await _connected(path)
        try:
            yield cls(reader, writer)
        finally:
            # nothing is left to be sent; a charon that hangs would keep an orderly close waiting
            writer.transport.abort()

    async def request(self, command: str, message: dict[str, Any] | None = None) -> Section:
        """The answer to a command."""
        self._send(Packet.request(command, Message.serialize(message or {})))
        return _outcome(await self._answer(Packet.CMD_RESPONSE, f"the command {command}"))

    async def stream(self, command: str, event: str, message: dict[str, Any] | None = None) -> AsyncGenerator[Section]:
        """What charon answers to a command in events of the kind `event`, one by one."""
        await self.register(event)
        self._send(Packet.request(command, Message.serialize(message or {})))
        while (packet := await self._receive(ANSWER_SECONDS)).response_type == Packet.EVENT:
            yield _message(packet)
        _expect(packet, Packet.CMD_RESPONSE, f"the command {command}")
        _outcome(_message(packet))

    async def register(self, event: str) -> None:
        """Have charon send events of this kind from now on."""
        self._send(Packet.register_event(event))
        await self._answer(Packet.EVENT_CONFIRM, f"events of the kind {event}")

    async def events(self) -> AsyncGenerator[tuple[str, Section]]:
        """What happens of the kinds that are registered, without end."""
        while True:
            while self._early:
                yield self._early.popleft()
            packet = await self._receive(None)
            if packet.response_type != Packet.EVENT:
                raise SessionException(f"an answer of type {packet.response_type} to no command")
            yield _event(packet)

    def _send(self, packet: bytes) -> None:
        # a command is less than a socket accepts in one write: nothing to wait for
        self._writer.write(LENGTH.pack(len(packet)) + packet)

    async def _answer(self, kind: int, what: str) -> Section:
        """The message of the next packet that is no event. It has to be of this kind."""
        while (packet := await self._receive(ANSWER_SECONDS)).response_type == Packet.EVENT:
            self._early.append(_event(packet))
        _expect(packet, kind, what)
        return _message(packet)

    async def _receive(self, patience: float | None) -> Any:
        async with asyncio.timeout(patience):
            try:
                (length,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
                if length > Transport.MAX_SEGMENT:
                    raise SessionException(f"a packet of {length} octets, which VICI does not allow")
                return Packet.parse(await self._reader.readexactly(length))
            except asyncio.IncompleteReadError:
                raise ConnectionError("charon closed the connection") from None


def _message(packet: Any) -> Section:
    message: Section = Message.deserialize(packet.payload)
    return message


def _event(packet: Any) -> tuple[str, Section]:
    return as_text(packet.event_type), _message(packet)


def _expect(packet: Any, kind: int, what: str) -> None:
    if packet.response_type in (Packet.CMD_UNKNOWN, Packet.EVENT_UNKNOWN):
        raise EventUnknownException(f"charon does not know {what}")
    if packet.response_type != kind:
        raise SessionException(f"an answer of type {packet.response_type} to {what}")


def _outcome(message: Section) -> Section:
    """A command's answer, unless it says that the command failed."""
    if message.get("success", b"yes") != b"yes":
        raise CommandException(as_text(message.get("errmsg"), "refused without a reason"))
    return message
