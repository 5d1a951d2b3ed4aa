"""Where a bank's Redis is: one URL for a single server, Sentinel or Cluster.

    redis://[user:password@]host[:port][/database]          rediss:// for TLS
    unix:///path/to/socket[?db=database]
    redis+sentinel://[user:password@]host[:port][,...]/service[/database]
    redis+cluster://[user:password@]host[:port][,...]

Options of redis-py follow as a query: `?ssl_ca_certs=FILE&ssl_certfile=FILE&ssl_keyfile=FILE`. For Sentinel and
Cluster, `ssl=true` turns TLS on.
"""

from __future__ import annotations

from typing import Any, TypeAlias
from urllib.parse import urlsplit

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError

Client: TypeAlias = "Redis | RedisCluster"

REDIS_PORT = 6379
SENTINEL_PORT = 26379


def connect(url: str, timeout: float) -> Client:
    """A client for `url` that connects when it is first used; connecting and each reply may take `timeout` s.

    It tries once more, at once, where a connection has gone: a restarted Redis closes those that lie ready.
    Raises ValueError, without the URL (it may hold a password), where it is not of the forms above.
    """
    options: dict[str, Any] = {
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "protocol": 2,
        "retry": Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,)),
    }
    parts = urlsplit(url)
    if parts.scheme in ("redis", "rediss", "unix"):
        return Redis.from_url(url, **options)
    if parts.scheme not in ("redis+sentinel", "redis+cluster"):
        raise ValueError("the bank's URL has none of the schemes redis, rediss, unix, redis+sentinel, redis+cluster")
    credentials, _, hosts = parts.netloc.rpartition("@")
    login = f"{credentials}@" if credentials else ""
    given: dict[str, Any] = dict(parse_url(f"redis://{login}localhost?{parts.query}"))
    given.pop("host")
    options |= given
    if "ssl" in options:
        options["ssl"] = str(options["ssl"]).lower() in ("1", "true", "yes")
    if parts.scheme == "redis+cluster":
        nodes = [ClusterNode(host, port) for host, port in _hosts(hosts, REDIS_PORT)]
        return RedisCluster(startup_nodes=nodes, **options)
    service, _, database = parts.path.strip("/").partition("/")
    if not service or (database and not database.isdecimal()):
        raise ValueError("a redis+sentinel:// URL ends in /SERVICE or /SERVICE/DATABASE")
    # a Sentinel is asked as its servers are, but for the user
    tls = {name: value for name, value in options.items() if name.startswith("ssl")}
    sentinel: Sentinel = Sentinel(  # type: ignore[no-untyped-call]
        _hosts(hosts, SENTINEL_PORT),
        sentinel_kwargs={"socket_timeout": timeout, "socket_connect_timeout": timeout, "protocol": 2, **tls},
        **options,
    )
    master: Redis = sentinel.master_for(service, db=int(database or 0))
    return master


def _hosts(text: str, default_port: int) -> list[tuple[str, int]]:
    """`host:port,[v6]:port,host` as pairs."""
    pairs = []
    for part in text.split(","):
        try:
            split = urlsplit(f"//{part}")
            if not split.hostname:
                raise ValueError
            pairs.append((split.hostname, split.port or default_port))
        except ValueError:
            raise ValueError("a host in the bank's URL is not HOST or HOST:PORT") from None
    return pairs
