"""One round trip with one Redis: commands sent together, their replies in order.

redis-py's client spends 100 us of the event loop on that, of which 70 are for what the bank does not use: a task and a
timer for each reply, callbacks, a packer in Python. Here hiredis packs the commands, and a connection of redis-py
carries them, which logs in, does TLS, follows Sentinel, and reads the replies; one timer bounds all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

from hiredis import pack_command
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ExecAbortError, ResponseError

_BEGIN: Final = pack_command(("MULTI",))
_END: Final = pack_command(("EXEC",))


async def exchange(
    client: Redis, commands: Sequence[tuple[Any, ...]], timeout: float | None, *, transaction: bool = False
) -> list[Any]:
    """The replies of one server to `commands`; an exception in the place of each that failed. All of it may take
    `timeout` s, the connection included: a server that accepts connections and says nothing takes no longer.

    It tries once more, immediately, where the connection has gone. `client` is a bare one (bridge.bank.redis_url).
    Raises what redis-py raises, and TimeoutError.
    """
    packed = b"".join([pack_command(command) for command in commands])
    if transaction:
        packed = b"".join((_BEGIN, packed, _END))
    async with asyncio.timeout(timeout):
        try:
            return await _once(client, packed, len(commands), transaction)
        except RedisConnectionError:
            return await _once(client, packed, len(commands), transaction)


async def _once(client: Redis, packed: bytes, count: int, transaction: bool) -> list[Any]:
    connections, task = client.connection_pool, asyncio.current_task()
    assert task is not None
    cancelled = task.cancelling()
    connection: Any = await connections.get_connection()  # type: ignore[no-untyped-call]
    connecting = connection.socket_timeout
    try:
        if task.cancelling() > cancelled:
            # redis-py loses a cancellation, and so the end of the time, that comes with a failure to connect
            raise asyncio.CancelledError
        # replies have the time of the exchange alone: a timer for each costs more than to read it
        connection.socket_timeout = None
        return await _carry(connection, packed, count, transaction)
    finally:
        connection.socket_timeout = connecting
        await connections.release(connection)


async def _carry(connection: Any, packed: bytes, count: int, transaction: bool) -> list[Any]:
    await connection.send_packed_command(packed)
    if not transaction:
        return [await _reply(connection) for _ in range(count)]
    # to MULTI and to each command there is one too, which names only what was refused before it was tried
    refused = [reply for _ in range(count + 1) if isinstance(reply := await _reply(connection), Exception)]
    replies: list[Any] | Exception = await _reply(connection)
    if isinstance(replies, Exception):
        raise refused[0] if refused and isinstance(replies, ExecAbortError) else replies
    return replies


async def _reply(connection: Any) -> Any:
    try:
        return await connection.read_response()
    except ResponseError as error:
        return error
