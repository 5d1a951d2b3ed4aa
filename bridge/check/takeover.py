"""Addresses that gateways share: what would keep their sessions from being taken over as they are. That connections and
pools differ between gateways `bridge.check.bank` finds."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import ip_interface
from pathlib import Path
from typing import Final

from bridge.charon.conf_parser import ChildProposals
from bridge.charon.vici_types import ConnectionInfo
from bridge.check.braces import blocks
from bridge.check.finding import Finding, fail, ok, warn
from bridge.config import GatewayConfig
from bridge.net import address_watch

KEEPALIVED: Final = Path("/etc/keepalived/keepalived.conf")
LOOPBACK: Final = 1
"""index of lo"""
_NO: Final = ("no", "0", "false", "disabled")
_INSTANCE: Final = re.compile(r"\bvrrp_instance\s+(?P<name>\S+)\s*\{")
_ADDRESSES: Final = re.compile(r"\b(?P<name>virtual_ipaddress)\s*\{")


def takeover(
    config: GatewayConfig,
    connections: Mapping[str, ConnectionInfo],
    *,
    proposals: ChildProposals | None = None,
    present: Mapping[str, int] | None = None,
    keepalived: Path = KEEPALIVED,
) -> list[Finding]:
    """One finding at least where the configuration has takeover.addresses. Reads files."""
    shared = config.takeover.addresses
    if not shared:
        return []
    findings = _mobike(shared, connections.values(), proposals or _proposals(config))
    findings += _on_loopback(shared, _present() if present is None else present)
    findings += _vrrp(shared, keepalived)
    if config.intercept.rules == "external":
        findings.append(
            warn(
                "takeover",
                "intercept.rules is external: the sidecar sets no rules that keep IKE and ESP of a shared address from "
                "leaving a gateway which does not have it",
                "drop them yourself while the address is at another gateway: see docs/takeover.md",
            )
        )
    return findings or [ok("takeover", f"sessions at {', '.join(shared)} can be taken over")]


def _present() -> Mapping[str, int]:
    # what the kernel does not list cannot be found on lo
    with contextlib.suppress(OSError):
        return address_watch.present()
    return {}


def _proposals(config: GatewayConfig) -> ChildProposals:
    return ChildProposals(Path(config.swanctl) if config.swanctl is not None else None)


def _mobike(shared: Iterable[str], connections: Iterable[ConnectionInfo], proposals: ChildProposals) -> list[Finding]:
    findings = []
    for connection in connections:
        local = connection.local_addresses
        if local and not set(local) & {*shared, "%any", "0.0.0.0/0", "::/0"}:
            continue
        if (proposals.option(connection.name, None, "mobike") or "yes").lower() not in _NO:
            findings.append(
                fail(
                    "takeover",
                    f"connection {connection.name} has MOBIKE on: a gateway that lost a shared address would take its "
                    "clients along to another address",
                    f"set mobike = no in connections.{connection.name} of swanctl.conf, on all gateways",
                )
            )
    return findings


def _on_loopback(shared: Iterable[str], present: Mapping[str, int]) -> list[Finding]:
    return [
        fail(
            "takeover",
            f"{address} is on lo, where every gateway has it at the same time",
            "let one gateway at a time have it, by VRRP; anycast and BGP are not supported",
        )
        for address in shared
        if present.get(address) == LOOPBACK
    ]


def _vrrp(shared: Iterable[str], path: Path) -> list[Finding]:
    try:
        text = "\n".join(re.split("[#!]", line)[0] for line in path.read_text(errors="replace").splitlines())
    except OSError:
        return []
    findings = []
    for name, body in blocks(_INSTANCE, text):
        words = body.split()
        if not _has(words, shared):
            continue
        if _is_rounded(text, body):
            findings.append(
                warn(
                    "takeover",
                    f"vrrp_instance {name} has an advert_int that VRRP version 2 rounds to whole seconds: a dead "
                    "gateway is noticed seconds later",
                    f"set `version 3` in vrrp_instance {name} of {path}, on all gateways",
                )
            )
        if "nopreempt" not in words or re.search(r"\bstate\s+MASTER\b", body):
            findings.append(
                fail(
                    "takeover",
                    f"vrrp_instance {name} preempts: a gateway that comes back would move all sessions once more",
                    f"set `state BACKUP` and `nopreempt` in {path}, on all gateways",
                )
            )
        if not any(word.startswith("notify") for word in words):
            findings.append(
                warn(
                    "takeover",
                    f"vrrp_instance {name} has no notify script",
                    "see strongswan-conf/keepalived/: the kernel's news of the address alone may come later",
                )
            )
    return findings


def _is_rounded(text: str, body: str) -> bool:
    """Whether an instance advertises at intervals that its version of VRRP does not have (RFC 5798 section 1)."""
    interval = re.search(r"\badvert_int\s+(\d*\.\d+)", body)
    version = re.search(r"\bversion\s+(\d)", body) or re.search(r"\bvrrp_version\s+(\d)", text)
    return (
        interval is not None
        and not float(interval[1]).is_integer()
        and (version is None or version[1] != "3")
        and any("." in word and _address(word) is not None for word in _virtual(body))
    )


def _virtual(body: str) -> Iterator[str]:
    """The words of an instance's virtual_ipaddress. An instance with IPv4 addresses there is one of IPv4; other
    addresses (unicast_src_ip, virtual_ipaddress_excluded, routes) say nothing of its version."""
    for block in blocks(_ADDRESSES, body):
        yield from block.body.split()


def _has(words: Iterable[str], shared: Iterable[str]) -> bool:
    return bool({_address(word) for word in words} & set(shared))


def _address(word: str) -> str | None:
    try:
        return str(ip_interface(word).ip)
    except ValueError:
        return None
