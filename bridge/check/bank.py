"""The bank: reachable, observable, of the same time, and what the other gateways have published in it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Mapping

from bridge.bank import gateway_facts
from bridge.bank.gateway_facts import Facts
from bridge.bank.interface import BEATS, RESTART_SECONDS, BankUnavailable, GatewaySign
from bridge.bank.keyspace import Event, Keyspace
from bridge.bank.redis_bank import RedisBank
from bridge.bank.redis_url import FAILURES, Client, connect
from bridge.bank.seal_volume import SEALS_ASK, SEALS_MAX
from bridge.bank.seal_volume import decode as decode_seals
from bridge.charon.ha_segments import SEGMENTS_MIN
from bridge.charon.placeholders import HaPool, ha_pools
from bridge.charon.vici_client import ViciClient
from bridge.charon.vici_types import ViciError
from bridge.check.charon import CharonAnswer
from bridge.check.finding import Finding, fail, ok, warn
from bridge.config import GatewayConfig
from bridge.ike.address import Pool
from bridge.stub import bank_keys
from bridge.stub.keyring import Keyring, SealError
from bridge.stub.revocation import open_mark
from bridge.stub.types import printable

PATIENCE = 3.0
"""seconds"""
SLOW = 0.02
"""seconds from which on the way to the bank is felt"""
EVENTS = {"hset", "del", "set", "expired"}
"""the events that gateways need"""
CLOCK_WARN, CLOCK_FAIL = 2.0, 60.0
"""seconds by which this host's clock may differ from the bank's: stubs expire by the clock"""
OTHER_CLOCK_FAIL = CLOCK_FAIL + RESTART_SECONDS
"""those by which the time of a heartbeat may differ from this host's: one may be as old as that"""


async def bank(config: GatewayConfig, charon: CharonAnswer | None) -> list[Finding]:
    """Everything about the banks that `config` names."""
    findings = await _main(config, charon)
    other = {f"bank of {address}": url for address, url in config.bank.peers.items()}
    if config.bank.local is not None:
        other = {"local bank": config.bank.local, **other}
    for name, url in other.items():
        findings.append(await _another(name, url))
    return findings


async def _another(name: str, url: str) -> Finding:
    client = connect(url, PATIENCE)
    try:
        began = time.monotonic()
        await client.ping()
    except FAILURES as error:
        return fail(name, printable(str(error)), "is its URL right, and the server up and open to this gateway?")
    finally:
        await client.aclose()
    return ok(name, f"answers in {(time.monotonic() - began) * 1000:.1f} ms")


async def _main(config: GatewayConfig, charon: CharonAnswer | None) -> list[Finding]:
    if config.bank.url is None:
        binary = shutil.which("redis-server") or shutil.which("valkey-server")
        if binary:
            return [ok("bank", f"private, by {binary}; other gateways cannot reach it")]
        return [fail("bank", "no redis-server here", "install redis-server, or set bank.url")]
    try:
        client = connect(config.bank.url, PATIENCE)
    except ValueError as error:
        return [fail("bank", str(error), "is bank.url right?")]
    try:
        findings, ahead = await _reach(client, config.failover.detect)
        findings += await _events(config.bank.url, client)
        return findings + await _others(config, charon, ahead)
    except (*FAILURES, BankUnavailable) as error:
        return [fail("bank", printable(str(error)), "is bank.url right, and the server up?")]
    finally:
        await client.aclose()


async def _reach(client: Client, detect: float) -> tuple[list[Finding], float]:
    """Also by how many seconds this host's clock is ahead of the bank's."""
    await client.ping()
    began = time.time()
    answer = await client.time()
    took = time.time() - began
    findings = [
        warn("bank", f"answers in {took * 1000:.1f} ms", "a bank this far away slows every resumption down")
        if took > SLOW
        else ok("bank", f"answers in {took * 1000:.1f} ms")
    ]
    if took > detect / BEATS:
        findings.append(
            warn(
                "failover",
                f"the bank takes more than a third of failover.detect ({detect:g} s) to answer",
                "raise failover.detect on all gateways, or this one notices no failure of another one",
            )
        )
    # a Cluster gives the time of each node
    seconds, microseconds = next(iter(answer.values())) if isinstance(answer, dict) else answer
    ahead = began + took / 2 - (int(seconds) + int(microseconds) / 1e6)
    text = f"this host's clock is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} the bank's"
    fix = "set both by NTP: stubs expire by the clock"
    if abs(ahead) - took > CLOCK_FAIL:
        findings.append(fail("clock", text, fix))
    elif abs(ahead) - took > CLOCK_WARN:
        findings.append(warn("clock", text, fix))
    else:
        findings.append(ok("clock", f"differs from the bank's by less than {max(abs(ahead), 0.1):.1f} s"))
    return findings, ahead


async def _events(url: str, client: Client) -> list[Finding]:
    """By trying: the user `gateway` of users.acl may not ask for settings."""
    received: set[str] = set()
    listening, complete = asyncio.Event(), asyncio.Event()

    def on_event(event: Event) -> None:
        received.add(event.event)
        if received >= EVENTS:
            complete.set()

    key = bank_keys.check_key(os.urandom(8).hex())
    keyspace = Keyspace(url, (key,), on_event, lambda state: listening.set() if state else None)
    keyspace.start()
    try:
        async with asyncio.timeout(PATIENCE):
            await listening.wait()
            for command in (("HSET", key, "a", "b"), ("DEL", key), ("SET", key, "a", "PX", 20)):
                await client.execute_command(*command)
            await complete.wait()
    except TimeoutError:
        missing = ", ".join(sorted(EVENTS - received))
        return [
            warn(
                "keyspace events",
                f"the bank sends no events for {missing}: the stubs of a gateway that fails are not fetched ahead",
                "use redis/redis.conf, or CONFIG SET notify-keyspace-events Kg$hzxe",
            )
        ]
    finally:
        await keyspace.close()
    return [ok("keyspace events", "the bank sends its keyspace events")]


async def _others(config: GatewayConfig, charon: CharonAnswer | None, ahead: float) -> list[Finding]:
    """This gateway beside the others that live: clocks, keys, connections, pools; its own clock is `ahead` of the
    bank's. Raises BankUnavailable."""
    try:
        keyring = Keyring.load(config.bank.key_file)
    except (SealError, OSError) as error:
        return [fail("bank key", str(error), "the gateways of a bank need the same key file")]
    assert config.bank.url is not None
    bank = RedisBank(config.bank.url, keyring, timeout=PATIENCE)
    try:
        signs = {name: sign for name, sign in (await bank.gateways()).items() if sign.alive and name != config.address}
        seals = [decode_seals(await bank.posted(bank_keys.SEALS_KIND, name)) for name in (config.address or "", *signs)]
        published = {name: gateway_facts.decode(await bank.posted(bank_keys.FACTS_KIND, name) or b"") for name in signs}
        stats = await bank.posted(bank_keys.STATS_KIND, config.address) if config.address is not None else None
        marks = {sealed for each in await bank.revocations() for sealed in each}
        named = {name: await bank.posted(bank_keys.LOCKOUT_KIND, name) for name in (config.address or "", *signs)}
    finally:
        await bank.close()
    findings = [
        *_clocks(signs, time.time() - ahead),
        *_keys(keyring, signs),
        *_volume(keyring, seals),
        *_duplicates(stats or b""),
    ]
    findings += _lock_out(keyring, marks, {name: _latest(text or b"") for name, text in named.items()})
    others = {name: facts for name, facts in published.items() if facts is not None}
    if not others:
        return [*findings, ok("other gateways", "none is in this bank now: pools and connections are not compared")]
    if charon is not None:
        mine = {name: [child.name for child in info.children] for name, info in charon.connections.items()}
        findings += _connections(mine, others)
        in_memory = await _pools_in_memory(config)
        ha = await asyncio.to_thread(ha_pools)
        findings += _pools([*in_memory, *(pool.range for pool in ha)], others)
        findings += _in_memory(in_memory, ha, config)
    return findings or [ok("other gateways", f"fits {', '.join(others)}: connections, children, pools")]


def _clocks(signs: Mapping[str, GatewaySign], now: float) -> list[Finding]:
    """The clocks of the other gateways, as their heartbeats have them, beside the bank's, which shows `now`."""
    return [
        fail(
            "clock",
            f"the clock of gateway {name} differs from the bank's by {abs(sign.at - now):.0f} s",
            "set the clocks of all gateways by NTP: stubs expire by the clock",
        )
        for name, sign in signs.items()
        if sign.at is not None and abs(sign.at - now) > OTHER_CLOCK_FAIL
    ]


def _duplicates(stats: bytes) -> list[Finding]:
    """Sessions of this gateway with the virtual IP of another one, as its sidecar published last."""
    try:
        count = int(json.loads(stats or b"{}").get("duplicate_address_sessions", 0))
    except (ValueError, TypeError, AttributeError):
        return []
    if not count:
        return []
    return [
        fail(
            "duplicate addresses",
            f"{count} sessions here have a virtual IP that another peer's session has too",
            "the sidecar's log names them: duplicate-address. Use HA pools, or pools that do not overlap",
        )
    ]


def _keys(keyring: Keyring, others: Mapping[str, GatewaySign]) -> list[Finding]:
    """Whether the other gateways that live have this one's keys. A heartbeat can be forged by anyone with write access
    to the bank: one that never ends and has no key keeps every new key from being used."""
    newest = keyring.ids[0]
    findings = []
    for name, sign in others.items():
        if not sign.keys & set(keyring.ids):
            findings.append(
                fail(
                    "bank key",
                    f"{name} has none of this gateway's keys: neither opens the other's stubs",
                    f"copy the key file to {name}; if that is no gateway, delete {bank_keys.heartbeat_key(name)}",
                )
            )
        elif newest not in sign.keys:
            findings.append(
                warn(
                    "bank key",
                    f"{name} lacks key {newest.hex()}, which therefore seals no stub yet",
                    f"copy the key file to {name}; if that is no gateway, delete {bank_keys.heartbeat_key(name)}",
                )
            )
    return findings


def _volume(keyring: Keyring, seals: Iterable[Mapping[str, int]]) -> list[Finding]:
    """Whether a key has sealed so much that the next one is due."""
    totals: Counter[str] = Counter()
    for counts in seals:
        totals.update(counts)
    return [
        (fail if totals[key_id.hex()] >= SEALS_MAX // 2 else warn)(
            "bank key",
            f"key {key_id.hex()} has sealed {totals[key_id.hex()]:,} stubs; {SEALS_MAX:,} are the most for one key",
            "make a new key: ike-sa-sync keygen FILE --add, and copy the file to all gateways",
        )
        for key_id in keyring.ids[:1]
        if totals[key_id.hex()] >= SEALS_ASK
    ]


def _lock_out(keyring: Keyring, marks: Iterable[bytes], enforced: Mapping[str, int]) -> list[Finding]:
    """Whether each gateway knows every mark of a locked-out identity: `enforced` has the time of the newest one that it
    reported, by its address."""
    now = time.time()
    unreadable, known = 0, []
    for sealed in marks:
        try:
            known.append(open_mark(sealed, keyring))
        except SealError:
            unreadable += 1
    count = sum(mark.revoked and mark.expires > now for mark in known)
    findings = []
    if unreadable:
        findings.append(
            fail(
                "locked out",
                f"{unreadable} marks of locked-out identities in the bank do not open with this gateway's key file",
                "copy the key file of the gateway where `revoke` ran; without it these identities resume here",
            )
        )
    old = [mark for mark in known if mark.expires > now and mark.made < (now - PATIENCE) * 1000]
    newest = max(old, key=lambda mark: mark.made, default=None)
    for name, made in enforced.items():
        if name and newest is not None and made < newest.made:
            findings.append(
                fail(
                    "locked out",
                    f"{name} has not reported that it knows the mark of {printable(newest.identity)}",
                    "is its sidecar up, with the same key file? Its log has `revocations` or `revocation-unreadable`",
                )
            )
    return findings or ([ok("locked out", f"identities locked out at all gateways: {count}")] if count else [])


def _latest(report: bytes) -> int:
    """When the newest mark was made that a gateway reports to enforce, in Unix milliseconds."""
    try:
        return int(json.loads(report or b"{}").get("latest", 0))
    except (ValueError, TypeError, AttributeError, RecursionError):
        return 0


def _connections(mine: dict[str, list[str]], others: dict[str, Facts]) -> list[Finding]:
    findings = []
    for address, facts in others.items():
        for name, children in facts.connections.items():
            if name not in mine:
                findings.append(
                    fail(
                        "connection",
                        f"{address} has connection {printable(name)!r}, this gateway has not",
                        "add it to swanctl.conf: sessions of that name fall back to a full handshake here",
                    )
                )
            elif missing := [child for child in children if child not in mine[name]]:
                findings.append(
                    fail(
                        "children",
                        f"connection {name} of {address} has {printable(', '.join(missing))}, this gateway has not",
                        "use the same children on all gateways: what is missing does not come up here",
                    )
                )
    return findings


def _pools(mine: list[Pool], others: dict[str, Facts]) -> list[Finding]:
    return [
        fail(
            "pools",
            f"pool {pool.name} ({pool.text}) overlaps {printable(theirs.name)} ({theirs.text}) of {address}",
            "give each gateway a range of its own: a resumed client keeps its address, which this pool would give out",
        )
        for address, facts in others.items()
        for theirs in facts.pools
        for pool in mine
        if pool.overlaps(theirs)
    ]


def _in_memory(pools: list[Pool], ha: list[HaPool], config: GatewayConfig) -> list[Finding]:
    """What becomes of addresses after a restart of charon."""
    findings = []
    names = {pool.name for pool in ha}
    for pool in pools:
        if pool.name in names:
            text = f"pool {pool.name} is an HA pool and one in charon's memory ({pool.text}), which charon asks first"
            findings.append(fail("pools in memory", text, f"take pools.{pool.name} out of swanctl.conf"))
        elif pool.size > 1:
            findings.append(
                warn(
                    "pools in memory",
                    f"pool {pool.name} ({pool.text}) is kept in charon's memory: after a restart charon gives out "
                    "addresses that sessions at other gateways have",
                    f"use an HA pool: charon.plugins.ha.pools.{pool.name} in strongswan.conf, and no "
                    f"pools.{pool.name} in swanctl.conf (docs/network.md)",
                )
            )
    if ha and config.ha.segments < SEGMENTS_MIN:
        findings.append(
            fail("pools", "with one segment HA pools give out addresses that are in use", "set ha.segments to 16")
        )
    return findings


async def _pools_in_memory(config: GatewayConfig) -> list[Pool]:
    vici = ViciClient(config.vici)
    try:
        return await vici.pools()
    except ViciError:
        return []


async def own_pools(config: GatewayConfig) -> list[Pool]:
    """All pools of this gateway: those in charon's memory, and the HA pools."""
    ha = await asyncio.to_thread(ha_pools)
    return [*await _pools_in_memory(config), *(pool.range for pool in ha)]
