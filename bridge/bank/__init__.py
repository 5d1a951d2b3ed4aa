"""Where stubs live."""

from __future__ import annotations

from collections.abc import Callable

from bridge.bank.interface import StubBank
from bridge.bank.keyspace import Keyspace
from bridge.bank.private_redis import PrivateBank
from bridge.bank.redis_bank import RedisBank
from bridge.bank.replica import Replica
from bridge.bank.replicated import ReplicatedBank
from bridge.bank.write_queue import LIMIT
from bridge.config import BankConfig
from bridge.stub import bank_keys
from bridge.stub.keyring import Keyring


def bank_url(config: BankConfig) -> str:
    """Where the bank that `config` names is, the private one included; in mode mixed, the central one."""
    return config.url or PrivateBank.url_of(config.runtime)


async def open_bank(config: BankConfig, keyring: Keyring, *, serve: bool = False) -> StubBank:
    """The bank that `config` names. It need not be reachable yet.

    Without a URL that is the private Redis in `config.runtime`: with `serve` it is started, watched, and stopped by
    `close`, which is the sidecar's part; without, it is only spoken to. Where there are more banks than one, they are
    kept in step only with `serve`. Raises ValueError for a URL of no known form.
    """
    if config.mode == "centralised":
        return await _one(config, config.url, keyring, config.get_timeout, serve)
    # what is at hand is asked first, then the peers; a request waits for both
    at_hand = config.get_timeout - (config.peer_timeout if config.peers else 0.0)
    near_url = config.url if config.mode == "distributed" else config.local
    near = replica_in(
        "local",
        near_url or PrivateBank.url_of(config.runtime),
        await _one(config, near_url, keyring, at_hand, serve),
        config.pending,
    )
    central = None
    if config.mode == "mixed":
        url = bank_url(config)
        central = replica_in("central", url, RedisBank(url, keyring, get_timeout=at_hand), config.pending)
    peers = [
        replica_in(address, url, RedisBank(url, keyring, get_timeout=config.peer_timeout), config.pending)
        for address, url in config.peers.items()
    ]
    bank = ReplicatedBank(
        near, central, peers, targets=config.targets, copies=config.copies, peer_timeout=config.peer_timeout
    )
    if serve:
        await bank.start()
    return bank


def replica_in(name: str, url: str, bank: StubBank, pending: int = LIMIT) -> Replica:
    """A bank in the Redis at `url`, among others; its keyspace notifications show whether it is reachable."""

    def watch(there: Callable[[bool], None]) -> Keyspace:
        return Keyspace(url, (bank_keys.GATEWAYS,), lambda _: None, there)

    return Replica(name, bank, watch=watch, pending=pending)


async def _one(config: BankConfig, url: str | None, keyring: Keyring, get_timeout: float, serve: bool) -> RedisBank:
    if url is not None:
        return RedisBank(url, keyring, get_timeout=get_timeout)
    bank = PrivateBank(config.runtime, keyring, get_timeout=get_timeout)
    if serve:
        await bank.start()
    return bank
