"""`ike-sa-sync check`: is this host ready? Every finding names its mend."""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Awaitable, Callable
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from bridge.charon.channel import proc_address
from bridge.charon.ha import PORT, HaError, version_for
from bridge.config import ClientConfig, GatewayConfig

GOOD_HASH_TABLE = 1024
"""buckets from which on look-ups stay cheap for the number of SAs one worries about"""
BANK_PATIENCE = 3.0
"""seconds"""
SLOW_BANK = 0.02
"""seconds from which on the way to the bank is felt"""


class Grade(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


class Finding(NamedTuple):
    grade: Grade
    name: str
    text: str
    mend: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {"check": self.name, "grade": str(self.grade), "finding": self.text, "mend": self.mend}


Check = Callable[[], Awaitable[list[Finding]]]


async def run_checks(config: GatewayConfig | ClientConfig) -> list[Finding]:
    """All checks for this host's role, in the order in which one would mend."""
    checks: list[Check] = [_root, lambda: _charon(config), lambda: _ha(config), lambda: _sidecar(config)]
    if isinstance(config, GatewayConfig):
        gateway = config
        checks += [lambda: _queue(gateway), lambda: _key_file(gateway), lambda: _bank(gateway)]
    else:
        client = config
        checks.append(lambda: _connections(client))
    findings: list[Finding] = []
    for check in checks:
        findings += await check()
    return findings


async def _root() -> list[Finding]:
    if os.geteuid() == 0:
        return [Finding(Grade.OK, "privileges", "running as root")]
    return [
        Finding(
            Grade.WARN,
            "privileges",
            "not root: some checks cannot see enough, and the sidecar needs CAP_NET_ADMIN and CAP_NET_RAW",
            "run as root",
        )
    ]


async def _charon(config: GatewayConfig | ClientConfig) -> list[Finding]:
    from bridge.charon.vici import Vici, ViciError

    vici = Vici(config.vici, on_event=lambda _: None, on_connect=lambda _: None, on_disconnect=lambda: None)
    try:
        release = await vici.version()
        version = version_for(release)
    except ViciError as error:
        return [
            Finding(
                Grade.FAIL,
                "charon",
                f"{config.vici}: {error}",
                "start strongSwan (charon-systemd), or set `vici` to its socket",
            )
        ]
    except HaError as error:
        return [Finding(Grade.FAIL, "charon", str(error), "use a strongSwan release from 5.9 on")]
    finally:
        vici.close()
    return [Finding(Grade.OK, "charon", f"strongSwan {release}, ha message version {version}")]


async def _ha(config: GatewayConfig | ClientConfig) -> list[Finding]:
    findings = []
    table, local = proc_address(config.ha.charon, PORT)
    rows = [line.split() for line in Path(table).read_text().splitlines()[1:]]
    row = next((columns for columns in rows if columns[1] == local), None)
    if row is None:
        return [
            Finding(
                Grade.FAIL,
                "ha plugin",
                f"charon does not hold UDP {config.ha.charon}:{PORT}",
                "install libcharon-extra-plugins and the drop-in of strongswan-conf/, restart strongSwan",
            )
        ]
    if int(row[7]) not in (0, os.geteuid()):
        findings.append(
            Finding(
                Grade.FAIL,
                "ha plugin",
                f"UDP {config.ha.charon}:{PORT} belongs to user {row[7]}",
                "that is not charon: stop it",
            )
        )
    else:
        findings.append(Finding(Grade.OK, "ha plugin", f"charon holds UDP {config.ha.charon}:{PORT}"))
    _, far = proc_address(config.ha.listen, PORT)
    if row[2] != far:
        findings.append(
            Finding(
                Grade.FAIL,
                "ha remote",
                f"charon's ha plugin does not speak to {config.ha.listen}",
                f"set charon.plugins.ha.remote = {config.ha.listen}, or ha.listen here",
            )
        )
    return findings + _settings(config)


def _settings(config: GatewayConfig | ClientConfig) -> list[Finding]:
    """What charon was configured with, from its files: VICI does not tell."""
    found = read_strongswan_conf(Path("/etc/strongswan.conf"))
    findings = []

    def setting(name: str) -> str | None:
        return found.get(f"charon-systemd.{name}", found.get(f"charon.{name}"))

    buckets = int(setting("ikesa_table_size") or 1)
    if buckets < GOOD_HASH_TABLE:
        findings.append(
            Finding(
                Grade.WARN if isinstance(config, GatewayConfig) else Grade.OK,
                "hash table",
                f"charon.ikesa_table_size is {buckets}: every look-up of an IKE_SA is linear",
                "set ikesa_table_size = 65536 and ikesa_table_segments = 256",
            )
        )
    else:
        findings.append(Finding(Grade.OK, "hash table", f"charon.ikesa_table_size is {buckets}"))
    for name, wanted, default, why in (
        ("plugins.ha.monitor", "no", "yes", "charon takes and drops segments by itself"),
        ("plugins.ha.resync", "no", "yes", "charon asks the sidecar for its SAs at start"),
    ):
        value = setting(name) or default
        if value != wanted:
            findings.append(Finding(Grade.FAIL, name, f"charon.{name} is {value}: {why}", f"set it to {wanted}"))
    segments = int(setting("plugins.ha.segment_count") or 1)
    if segments != config.ha.segments:
        findings.append(
            Finding(
                Grade.FAIL,
                "segments",
                f"charon.plugins.ha.segment_count is {segments}, ha.segments {config.ha.segments}",
                "make them equal, 16 is best",
            )
        )
    if isinstance(config, ClientConfig) and setting("reuse_ikesa") == "no":
        findings.append(
            Finding(
                Grade.FAIL,
                "reuse_ikesa",
                "charon.reuse_ikesa is no: CHILD_SAs would get a new IKE_SA",
                "remove that line",
            )
        )
    return findings


def read_strongswan_conf(path: Path, prefix: str = "") -> dict[str, str]:
    """The options of a strongswan.conf and what it includes, as section.option: value."""
    found: dict[str, str] = {}
    try:
        text = path.read_text()
    except OSError:
        return found
    sections = [prefix] if prefix else []
    for raw in text.replace("{", "{\n").replace("}", "\n}\n").splitlines():
        line = raw.split("#")[0].strip()
        if line.endswith("{"):
            sections.append(line[:-1].strip())
        elif line == "}":
            if sections:
                sections.pop()
        elif line.startswith("include "):
            pattern = line.split(None, 1)[1].strip()
            base = path.parent
            for name in sorted(base.glob(pattern) if not pattern.startswith("/") else Path("/").glob(pattern[1:])):
                found |= read_strongswan_conf(name, ".".join(sections))
        elif "=" in line:
            option, value = (part.strip() for part in line.split("=", 1))
            found[".".join([*sections, option])] = value.strip('"')
    return found


async def _sidecar(config: GatewayConfig | ClientConfig) -> list[Finding]:
    table, local = proc_address(config.ha.listen, PORT)
    held = [columns for line in Path(table).read_text().splitlines()[1:] if (columns := line.split())[1] == local]
    if not held:
        return [
            Finding(
                Grade.WARN,
                "sidecar",
                f"nobody holds UDP {config.ha.listen}:{PORT}, where charon sends keys",
                "start the sidecar, or its systemd socket, before charon",
            )
        ]
    if int(held[0][7]) not in (0, os.geteuid()):
        return [
            Finding(
                Grade.FAIL,
                "sidecar",
                f"UDP {config.ha.listen}:{PORT}, where charon sends keys, belongs to user {held[0][7]}",
                "stop that process now, then rekey: it saw keys",
            )
        ]
    return [Finding(Grade.OK, "sidecar", f"UDP {config.ha.listen}:{PORT} is held by root")]


async def _queue(config: GatewayConfig) -> list[Finding]:
    from bridge.net import rules

    try:
        backend = rules.detect()
    except rules.RulesError as error:
        return [Finding(Grade.FAIL, "NFQUEUE", str(error), "install nftables or iptables; load nfnetlink_queue")]
    findings = [Finding(Grade.OK, "NFQUEUE", f"this kernel takes rules by {backend}")]
    if config.intercept.rules == "external" or rules.present(config.intercept.queue):
        return findings
    findings.append(
        Finding(
            Grade.WARN,
            "rules",
            f"no rules to queue {config.intercept.queue} are in place",
            "they come with `ike-sa-sync gateway`; is it running?",
        )
    )
    return findings


async def _key_file(config: GatewayConfig) -> list[Finding]:
    from bridge.seal import Keyring, SealError

    path = Path(config.bank.key_file)
    try:
        Keyring.load(path)
    except (SealError, OSError) as error:
        return [
            Finding(Grade.FAIL, "key file", str(error), f"ike-sa-sync keygen {path}, the same file on all gateways")
        ]
    mode = stat.S_IMODE(path.stat().st_mode)
    return [Finding(Grade.OK, "key file", f"{path}, mode {mode:04o}")]


async def _bank(config: GatewayConfig) -> list[Finding]:
    if config.bank.url is None:
        binary = shutil.which("redis-server") or shutil.which("valkey-server")
        if binary:
            return [Finding(Grade.OK, "bank", f"private, by {binary}; other gateways cannot reach it")]
        return [Finding(Grade.FAIL, "bank", "no redis-server here", "install redis-server, or set bank.url")]
    from redis.exceptions import RedisError

    from bridge.bank.connect import connect

    try:
        client = connect(config.bank.url, BANK_PATIENCE)
        began = time.monotonic()
        await client.ping()
        took = time.monotonic() - began
    except (RedisError, OSError, ValueError) as error:
        return [Finding(Grade.FAIL, "bank", str(error), "is bank.url right, and the server up?")]
    slow = took > SLOW_BANK
    findings = [
        Finding(
            Grade.WARN if slow else Grade.OK,
            "bank",
            f"answers in {took * 1000:.1f} ms",
            "a bank this far away slows every resumption" if slow else None,
        )
    ]
    try:
        answer = await client.config_get("notify-keyspace-events")
        events = next((_text(value) for name, value in answer.items() if _text(name).startswith("notify")), "")
        seen = set(events.replace("A", "g$lshzxetd"))
        if not {"K", "h", "x", "e"} <= seen | ({"e"} if "A" in events else set()):
            findings.append(
                Finding(
                    Grade.WARN,
                    "keyspace events",
                    f"notify-keyspace-events is {events!r}: monitoring sees nothing",
                    "use redis/redis.conf, or CONFIG SET notify-keyspace-events Kg$hzxe",
                )
            )
        else:
            findings.append(Finding(Grade.OK, "keyspace events", f"notify-keyspace-events is {events}"))
    except RedisError as error:
        findings.append(Finding(Grade.WARN, "keyspace events", f"not readable here: {error}", "look on the server"))
    await client.aclose()
    return findings


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


async def _connections(config: ClientConfig) -> list[Finding]:
    from bridge.charon.vici import Vici, ViciError

    vici = Vici(config.vici, on_event=lambda _: None, on_connect=lambda _: None, on_disconnect=lambda: None)
    try:
        known = await vici.list_connections()
    except ViciError:
        return []
    finally:
        vici.close()
    return [
        Finding(Grade.OK, "connection", f"{entry.connection} to {entry.address}")
        if entry.connection in known
        else Finding(
            Grade.FAIL,
            "connection",
            f"charon has no connection {entry.connection!r} (gateway {entry.address})",
            "add it to swanctl.conf, then swanctl --load-all",
        )
        for entry in config.gateways
    ]
