"""The control socket of a running sidecar (bridge.control)."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from bridge.control import MAX_LINE, Answer, ControlError, ControlServer, call


async def _echo(request: dict[str, Any]) -> Answer:
    return {"got": request}


async def _fail(_: dict[str, Any]) -> Answer:
    raise RuntimeError("no luck")


async def _long(request: dict[str, Any]) -> Answer:
    return {"sas": ["x" * 250] * request["count"]}


@pytest.fixture
async def path(tmp_path: Path) -> Any:
    server = ControlServer(str(tmp_path / "run" / "control.sock"), {"echo": _echo, "fail": _fail, "long": _long})
    await server.start()
    yield str(tmp_path / "run" / "control.sock")
    await server.close()


async def said(path: str, line: bytes) -> bytes:
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(line)
    writer.write_eof()
    answer = await reader.read()
    writer.close()
    return answer


async def test_a_command_gets_its_answer(path: str) -> None:
    assert await call(path, {"command": "echo", "to": "x"}) == {"got": {"command": "echo", "to": "x"}}


async def test_the_status_of_a_hundred_thousand_sas_arrives_whole(path: str) -> None:
    answer = await call(path, {"command": "long", "count": 100_000})
    assert len(answer["sas"]) == 100_000


async def test_a_command_that_fails_says_so_and_the_next_is_served(path: str) -> None:
    with pytest.raises(ControlError, match="no luck"):
        await call(path, {"command": "fail"})
    assert await call(path, {"command": "echo"})


@pytest.mark.parametrize(
    "line",
    [b"\n", b"not JSON\n", b"[]\n", b"{}\n", b'{"command": "no"}\n', b'{"command": ["echo"]}\n', b"[" * 60000 + b"\n"],
    ids=["nothing", "no JSON", "no object", "no command", "unknown", "a list", "deeper than can be read"],
)
async def test_anything_else_gets_an_error_that_names_the_commands(path: str, line: bytes) -> None:
    assert "known are echo, fail" in json.loads(await said(path, line))["error"]
    assert await call(path, {"command": "echo"})


async def test_a_line_that_is_too_long_is_not_waited_for(path: str) -> None:
    assert await said(path, b"x" * (2 * MAX_LINE)) == b""
    assert await call(path, {"command": "echo"})
