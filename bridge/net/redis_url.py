"""Where a bank's Redis is: one URL for a single server, Sentinel or Cluster.

    redis://[user:password@]host[:port][/database]          rediss:// for TLS
    unix:///path/to/socket[?db=database]
    redis+sentinel://[user:password@]host[:port][,...]/service[/database]
    redis+cluster://[user:password@]host[:port][,...]

Options of redis-py follow as a query: `?ssl_ca_certs=FILE&ssl_certfile=FILE&ssl_keyfile=FILE`. For Sentinel and
Cluster, `ssl=true` turns TLS on. bridge.bank.redis_url connects.
"""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import urlsplit

SINGLE = ("redis", "rediss", "unix")
SENTINEL, CLUSTER = "redis+sentinel", "redis+cluster"
SCHEMES = (*SINGLE, SENTINEL, CLUSTER)
REDIS_PORT = 6379
SENTINEL_PORT = 26379


class RedisUrl(NamedTuple):
    """A URL, and what is read out of it for Sentinel and Cluster; redis-py reads the others itself."""

    url: str
    scheme: str
    credentials: str = ""
    """user:password, in the form of the URL"""
    hosts: tuple[tuple[str, int], ...] = ()
    service: str = ""
    database: int = 0
    query: str = ""


def parse(url: str) -> RedisUrl:
    """Raises ValueError, without the URL (it may hold a password), where it is not of the forms above."""
    try:
        parts = urlsplit(url)
        scheme = parts.scheme
        if scheme in SINGLE:
            # urlsplit looks at the port when it is asked for it
            _ = parts.port
            return RedisUrl(url, scheme)
    except ValueError:
        raise ValueError("is not SCHEME://[USER:PASSWORD@]HOST[:PORT][/DATABASE]") from None
    if scheme not in SCHEMES:
        raise ValueError(f"must start with one of {', '.join(f'{each}://' for each in SCHEMES)}")
    credentials, _, hosts = parts.netloc.rpartition("@")
    service, _, database = parts.path.strip("/").partition("/")
    if scheme == CLUSTER:
        return RedisUrl(url, scheme, credentials, _hosts(hosts, REDIS_PORT), query=parts.query)
    if not service or (database and not database.isdecimal()):
        raise ValueError("a redis+sentinel:// URL ends in /SERVICE or /SERVICE/DATABASE")
    return RedisUrl(
        url, scheme, credentials, _hosts(hosts, SENTINEL_PORT), service, int(database or 0), query=parts.query
    )


def _hosts(text: str, default_port: int) -> tuple[tuple[str, int], ...]:
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
    return tuple(pairs)
