"""One Redis server, Sentinel set or Cluster: commands in pipelines, scripts by digest, failures in one shape."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from redis.asyncio import RedisCluster
from redis.exceptions import NoScriptError

from bridge.bank.interface import BankUnavailable
from bridge.bank.redis_url import FAILURES, Client, connect
from bridge.service import shipped_files
from bridge.stub.types import printable


class Script:
    """A Lua script that is shipped in redis/, called by its digest."""

    def __init__(self, name: str) -> None:
        self.source = shipped_files.path(f"redis/{name}.lua").read_bytes()
        self.digest = hashlib.sha1(self.source, usedforsecurity=False).hexdigest()

    def call(self, keys: Sequence[str | bytes], arguments: Iterable[Any]) -> tuple[Any, ...]:
        """The command that runs it. All `keys` belong to one bucket."""
        return ("EVALSHA", self.digest, len(keys), *keys, *arguments)


class RedisClient:
    """What a URL of `bridge.bank.redis_url` leads to; connects when it is first used. `timeout` in seconds."""

    def __init__(self, url: str, timeout: float, scripts: Sequence[Script] = ()) -> None:
        self.client: Client = connect(url, timeout)
        self._scripts = scripts

    async def pipeline(self, commands: Sequence[tuple[Any, ...]], *, writing: bool = False) -> list[Any]:
        """The replies to `commands`, sent at once. Scripts that Redis does not know are loaded.

        `writing`: in one transaction, where there is one server. Redis then goes to its disk once for all, instead of
        after every 16 KB that it reads.

        Raises BankUnavailable; some of the commands may have been carried out then.
        """
        transaction = writing and not isinstance(self.client, RedisCluster)
        with self.reaching():
            replies = await self._send(commands, transaction)
            unknown = [position for position, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
            if unknown:
                for script in self._scripts:
                    await self.client.script_load(script.source)
                again = await self._send([commands[position] for position in unknown], transaction)
                for position, reply in zip(unknown, again, strict=True):
                    replies[position] = reply
        for reply in replies:
            if isinstance(reply, Exception):
                raise BankUnavailable(_cause(reply)) from None
        return replies

    async def _send(self, commands: Sequence[tuple[Any, ...]], transaction: bool) -> list[Any]:
        pipeline = self.client.pipeline(transaction=transaction)
        for command in commands:
            pipeline.execute_command(*command)
        replies: list[Any] = await pipeline.execute(raise_on_error=False)
        return replies

    @contextmanager
    def reaching(self) -> Iterator[None]:
        """Every way in which Redis fails within, as BankUnavailable."""
        try:
            yield
        except TimeoutError:
            raise BankUnavailable("Redis did not answer in time") from None
        except FAILURES as error:
            raise BankUnavailable(_cause(error)) from None

    async def close(self) -> None:
        """Close the connections."""
        await self.client.aclose()


def _cause(error: Exception) -> str:
    """One line, short: redis-py repeats whole commands in some of its errors, in front of what Redis said."""
    text = str(error).rpartition("caused error: ")[2].strip('(),"') or type(error).__name__
    return f"Redis: {printable(text)[:160]}"
