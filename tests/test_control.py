"""The control socket of a running sidecar (bridge.service.control)."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from bridge.service.control import MAX_LINE, SLICE, Answer, ControlError, ControlServer, call, encoded


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


async def test_others_have_their_turn_while_a_long_answer_is_encoded() -> None:
    async def encode() -> list[str]:
        return [part async for part in encoded({"sas": ["x"] * 10 * SLICE})]

    turns, begun = 0, asyncio.create_task(encode())
    while not begun.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns >= 10
    assert json.loads("".join(begun.result())) == {"sas": ["x"] * 10 * SLICE}


@pytest.mark.parametrize("answer", [{}, {"a": []}, {"a": [1], "b": {"c": 2}}, {"sas": [{"x": n} for n in range(600)]}])
async def test_an_answer_in_parts_is_the_same_json(tmp_path: Path, answer: Answer) -> None:
    async def give(_: dict[str, Any]) -> Answer:
        return answer

    server = ControlServer(str(tmp_path / "control.sock"), {"give": give})
    await server.start()
    assert await said(str(tmp_path / "control.sock"), b'{"command": "give"}\n') == json.dumps(answer).encode() + b"\n"
    await server.close()


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
