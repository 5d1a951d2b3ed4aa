"""`ike-sa-sync check --plan`: what resumption would be worth on a host that has strongSwan and no sidecar yet, and the
configuration that it would take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import yaml

from bridge.charon.vici_client import ViciClient
from bridge.charon.vici_types import ConnectionInfo, SaInfo, ViciError
from bridge.charon.vpns import LearnedVpns, Vpn
from bridge.check import charon as running
from bridge.check import connections
from bridge.check.charon import CharonAnswer
from bridge.check.finding import Finding, Grade, warn
from bridge.config import ClientConfig, GatewayConfig, is_name

HEADER = "# Proposed by `ike-sa-sync check --plan`; read it before you use it.\n"
BANK = """\
# The Redis that all gateways share: set its address. Without a URL the bank is private, and no other gateway resumes.
# bank:
#   url: redis://ADDRESS:6379/0
"""

SHUNTS: Final = ("DROP", "PASS")
"""modes of children that are policies alone"""


@dataclass(frozen=True)
class Row:
    """One connection. `why` says what stands in the way, or what it costs."""

    connection: str
    role: str
    resumable: bool
    sessions: int
    why: str

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "connection": self.connection,
            "role": self.role,
            "resumable": self.resumable,
            "sessions": self.sessions,
            "why": self.why,
        }


@dataclass
class Plan:
    """`files` are proposed configurations, by role."""

    rows: list[Row] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "connections": [row.as_dict() for row in self.rows],
            "findings": [finding.as_dict() for finding in self.findings],
            "files": self.files,
        }


async def plan(config: GatewayConfig | ClientConfig) -> Plan:
    """What there is to say of this host's charon; of `config` its socket and its ends of the HA channel count."""
    answer, findings = await running.ask(config)
    if answer is None:
        return Plan(findings=findings)
    try:
        sas = await ViciClient(config.vici).list_sas()
    except ViciError as error:
        return Plan(findings=[*findings, warn("sessions", str(error), "try again")])
    made = made_of(answer, sas)
    as_client = ClientConfig(vici=config.vici, ha=config.ha)
    made.findings = findings + running.plugin(config, answer)
    if "ha" in answer.plugins:
        made.findings += running.drop_in(config if "gateway" in made.files else as_client, answer)
    for vpn in _vpns(answer):
        made.findings += [*connections.of_vpn(vpn, answer), *running.patience(vpn, answer), *_alone(vpn)]
    made.findings += connections.without_pfs(answer, list(answer.connections))
    made.findings = [finding for finding in made.findings if finding.grade is not Grade.OK]
    return made


def made_of(answer: CharonAnswer, sas: Sequence[SaInfo]) -> Plan:
    """The connections and the files, without the findings."""
    vpns = _vpns(answer)
    leading = {entry.connection for vpn in vpns for entry in vpn.gateways}
    counts = Counter((sa.connection, sa.initiator) for sa in sas if sa.state == "ESTABLISHED")
    rows = []
    for name, info in sorted(answer.connections.items()):
        if info.children and all(child.mode in SHUNTS for child in info.children):
            # a guard: it has no IKE_SAs
            continue
        resumable, why = _judged(info, answer)
        initiated, accepted = counts[name, True], counts[name, False]
        # a site's connection may serve both ways: the sessions show which
        if name in leading and (initiated or not accepted):
            rows.append(Row(name, "client", resumable, initiated, why))
        if name not in leading or accepted:
            rows.append(Row(name, "gateway", resumable, accepted, why))
    made = Plan(rows)
    usable = {row.connection for row in rows if row.role == "client" and row.resumable}
    if groups := [vpn for vpn in vpns if any(entry.connection in usable for entry in vpn.gateways)]:
        made.files["client"] = HEADER + yaml.safe_dump(_client_file(groups), sort_keys=False)
    if any(row.role == "gateway" and row.resumable for row in rows):
        made.files["gateway"] = HEADER + yaml.safe_dump(_gateway_file(answer, sas), sort_keys=False) + BANK
    return made


def _vpns(answer: CharonAnswer) -> list[Vpn]:
    return list(LearnedVpns(lambda: answer.connections, True))


def _judged(info: ConnectionInfo, answer: CharonAnswer) -> tuple[bool, str]:
    if info.version == "IKEv1":
        return False, "IKEv1: set version = 2"
    if info.ppk:
        return False, "a post-quantum preshared key (RFC 8784), which charon's ha plugin does not carry"
    pfs = answer.proposals.with_pfs([info.name])
    if pfs:
        children = ", ".join(child for _, child in pfs)
        return True, f"in two round trips for {children} (PFS)"
    if not info.children:
        return True, "without CHILD_SAs of its own"
    return True, "in one round trip"


def _alone(vpn: Vpn) -> list[Finding]:
    if len(vpn.gateways) > 1 or any(is_name(entry.address) for entry in vpn.gateways):
        return []
    [entry] = vpn.gateways
    text = f"VPN {vpn.name} has one gateway, {entry.address}: a session resumes there, or where that gateway says"
    section = f"NAME : connections.{entry.connection} {{ remote_addrs = ADDRESS }}"
    return [warn("gateways", text, f"add a connection to each other gateway, as `{section}`")]


def _client_file(vpns: Sequence[Vpn]) -> dict[str, Any]:
    groups = {
        vpn.name: [{"address": entry.address, "connection": entry.connection} for entry in vpn.gateways] for vpn in vpns
    }
    if len(groups) == 1:
        return {"gateways": next(iter(groups.values()))}
    return {"vpns": {name: {"gateways": entries} for name, entries in groups.items()}}


def _gateway_file(answer: CharonAnswer, sas: Sequence[SaInfo]) -> dict[str, Any]:
    used = Counter(sa.local.address for sa in sas if not sa.initiator)
    configured = [address for info in answer.connections.values() for address in info.local_addresses]
    address = used.most_common(1)[0][0] if used else next(iter(configured), None)
    return {"address": address, "bank": {"key_file": "/etc/ike-sa-sync/bank.key"}}
