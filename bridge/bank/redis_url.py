"""A client for a bank's URL (bridge.net.redis_url): a single server, Sentinel or Cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeAlias

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisClusterException, RedisError

from bridge.net.redis_url import CLUSTER, SINGLE, parse

Client: TypeAlias = "Redis | RedisCluster"

FAILURES: Final = (RedisError, RedisClusterException, OSError)
"""all that a client raises where Redis cannot be reached, or refuses: redis-py's errors of a Cluster without a
reachable node, or with a slot that no node serves, are no RedisError. TimeoutError is an OSError."""


BARE: Final = 2
"""times as long as an exchange may take: its end comes first, and this one where redis-py has lost that"""


@contextmanager
def closed_as_lost() -> Iterator[None]:
    """A connection that went away while something was written to it: uvloop raises a bare RuntimeError then, which
    becomes redis-py's ConnectionError here. Every other RuntimeError is a mistake of ours."""
    try:
        yield
    except RuntimeError as error:
        if "the handler is closed" not in str(error):
            raise
        raise RedisConnectionError("the connection was closed") from None


def node_client(cluster: RedisCluster, host: str, port: int, *, bare: bool = False) -> Redis:
    """A client for one node of a Cluster, which asks no other node: for what is to go on while other nodes are away.
    `bare`: as `connect` has it."""
    options: dict[str, Any] = {
        key: value
        for key, value in cluster.connection_kwargs.items()
        if key in ("username", "password", "socket_timeout", "socket_connect_timeout", "protocol")
        or (key.startswith("ssl") and key != "ssl")
    }
    tls = "rediss" if any(key.startswith("ssl") for key in options) else "redis"
    address = f"[{host}]" if ":" in host else host
    retry = Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,))
    if bare:
        options |= {name: BARE * options[name] for name in ("socket_timeout", "socket_connect_timeout")}
    return Redis.from_url(f"{tls}://{address}:{port}", retry=retry, **options)


def connect(url: str, timeout: float, *, bare: bool = False) -> Client:
    """A client for `url` that connects when it is first used; connecting and each reply may take `timeout` s. `bare`:
    BARE times as long, for bridge.bank.exchange, which limits the time of an exchange as a whole.

    It tries once more, immediately, where a connection has gone: a restarted Redis closes those that lie ready.
    Raises ValueError, without the URL (it may hold a password), where it is not of the forms of bridge.net.redis_url.
    """
    options: dict[str, Any] = {
        "socket_timeout": timeout * (BARE if bare else 1),
        "socket_connect_timeout": timeout * (BARE if bare else 1),
        "protocol": 2,
        "retry": Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,)),
    }
    parts = parse(url)
    if parts.scheme in SINGLE:
        try:
            return Redis.from_url(url, **options)
        except ValueError:
            # redis-py's text could quote the URL
            raise ValueError("has an option that redis-py does not take") from None
    login = f"{parts.credentials}@" if parts.credentials else ""
    given: dict[str, Any] = dict(parse_url(f"redis://{login}localhost?{parts.query}"))
    given.pop("host")
    options |= given
    if "ssl" in options:
        options["ssl"] = str(options["ssl"]).lower() in ("1", "true", "yes")
    if parts.scheme == CLUSTER:
        return RedisCluster(startup_nodes=[ClusterNode(host, port) for host, port in parts.hosts], **options)
    # a Sentinel is asked as its servers are, but for the user
    tls = {name: value for name, value in options.items() if name.startswith("ssl")}
    # within the time of an exchange all but one of them may be silent, and the primary is still asked
    share = timeout / (len(parts.hosts) + 1)
    sentinel: Sentinel = Sentinel(  # type: ignore[no-untyped-call]
        list(parts.hosts),
        sentinel_kwargs={"socket_timeout": share, "socket_connect_timeout": share, "protocol": 2, **tls},
        **options,
    )
    master: Redis = sentinel.master_for(parts.service, db=parts.database)
    return master
