"""The control socket of a running sidecar: one JSON object a line each way, over a Unix socket only root can open."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

Answer = dict[str, Any]
Command = Callable[[dict[str, Any]], Awaitable[Answer]]
MAX_LINE = 65536
SLICE = 256
"""rows of a long list that are made, or encoded, before the event loop has its turn"""


class ControlError(Exception):
    """The sidecar does not answer on its control socket, or refuses; the text names the cause and the fix."""


class ControlServer:
    """Serves `commands` by name. Request: {"command": NAME, ...}; answer: the command's object, or {"error": TEXT}."""

    def __init__(self, path: str, commands: dict[str, Command]) -> None:
        self._path = Path(path)
        self._commands = commands
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen. Raises ControlError when another sidecar has the socket, or the folder cannot be made."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
            if self._path.exists():
                if _alive(self._path):
                    raise ControlError(
                        f"{self._path}: another sidecar is running; stop it, or set another control path"
                    )
                self._path.unlink()
            before = os.umask(0o177)
            try:
                self._server = await asyncio.start_unix_server(self._serve, str(self._path), limit=MAX_LINE)
            finally:
                os.umask(before)
        except OSError as error:
            raise ControlError(f"{self._path}: cannot listen: {error.strerror}") from error

    async def close(self) -> None:
        """Stop listening and remove the socket."""
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            line = await reader.readline()
            answer = await self._answer(line)
            async for part in encoded(answer):
                writer.write(part.encode())
            writer.write(b"\n")
            await writer.drain()
        except (ConnectionError, ValueError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _answer(self, line: bytes) -> Answer:
        try:
            request = json.loads(line)
            command = self._commands[request["command"]]
        except (ValueError, KeyError, TypeError, RecursionError):
            return {"error": f"not a command; known are {', '.join(sorted(self._commands))}"}
        try:
            return await command(request)
        except Exception as error:
            import structlog  # only here: the commands that ask a sidecar shall start fast

            structlog.get_logger().exception("control-command-failed", command=request["command"])
            return {"error": f"{request['command']}: {type(error).__name__}: {error}"}


async def encoded(answer: Answer) -> AsyncIterator[str]:
    """An answer in JSON, in parts: of a long list so much at a time that the event loop has its turn between."""
    for count, (name, value) in enumerate(answer.items()):
        yield f"{', ' if count else '{'}{json.dumps(name)}: "
        if not isinstance(value, list):
            yield json.dumps(value)
            continue
        yield "["
        for first in range(0, len(value), SLICE):
            yield (", " if first else "") + json.dumps(value[first : first + SLICE])[1:-1]
            await asyncio.sleep(0)
        yield "]"
    yield "}" if answer else "{}"


def _alive(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


async def call(path: str, request: dict[str, Any]) -> Answer:
    """Ask a running sidecar. Raises ControlError."""
    try:
        reader, writer = await asyncio.open_unix_connection(path)
    except PermissionError as error:
        raise ControlError(f"{path}: permission denied: run this as root") from error
    except OSError as error:
        raise ControlError(f"{path}: the sidecar does not answer ({error.strerror}): is it running?") from error
    try:
        writer.write(json.dumps(request).encode() + b"\n")
        # to its end, for the status of a hundred thousand SAs is a line longer than any limit
        line = await reader.read()
    except ConnectionError as error:
        raise ControlError(f"{path}: the sidecar went away: {error.strerror}") from error
    finally:
        writer.close()
    if not line.endswith(b"\n"):
        raise ControlError(f"{path}: the sidecar closed the connection; see its log")
    answer: Answer = json.loads(line)
    if "error" in answer:
        raise ControlError(str(answer["error"]))
    return answer
