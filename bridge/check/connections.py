"""charon's connections: those that are needed, where they lead, and what of them stands in the way."""

from __future__ import annotations

from bridge.charon.conf_parser import ChildProposals
from bridge.charon.ports import configured_ports
from bridge.charon.vici_types import ConnectionInfo
from bridge.charon.vpns import Vpn
from bridge.check.charon import CharonAnswer
from bridge.check.finding import Finding, fail, ok, warn
from bridge.check.names import resolve
from bridge.config import GatewayConfig, GatewayEntry, is_name

SHOWN = 5
"""names in one line; of the others their number"""


def of_vpn(vpn: Vpn, charon: CharonAnswer) -> list[Finding]:
    """One for each gateway, with the same children: a session goes on under the names it had."""
    findings = []
    children: dict[str, set[str]] = {}
    for entry in vpn.gateways:
        connection = charon.connections.get(entry.connection)
        if connection is None:
            text = f"charon has no connection {entry.connection!r} (gateway {entry.address})"
            findings.append(fail("connection", text, "add it to swanctl.conf, then swanctl --load-all"))
            continue
        children[connection.name] = {child.name for child in connection.children}
        findings += _reach(entry, connection)
    every = set().union(*children.values()) if children else set()
    for name, mine in children.items():
        if missing := sorted(every - mine):
            findings.append(
                warn(
                    "children",
                    f"connection {name} lacks the CHILD_SA {', '.join(missing)}, which others have",
                    "use the same names in all connections: what is missing does not come up after a move",
                )
            )
    for name in children:
        findings += _actions(charon.connections[name], charon)
    return findings


def _reach(entry: GatewayEntry, connection: ConnectionInfo) -> list[Finding]:
    """Which gateways an entry stands for, and whether a full handshake gets there: charon takes the first address of a
    connection, and the first that the first name resolves to."""
    configured = [found for text in connection.remote_addresses for found in resolve(text)]
    wanted = resolve(entry.address)
    if not wanted:
        fix = "is the name right, and does the resolver answer? It is asked again at each attempt"
        return [warn("connection", f"{entry.address} does not resolve", fix)]
    findings = []
    for address in wanted:
        where = f"{entry.address} ({address})" if is_name(entry.address) else address
        if configured and address not in configured:
            findings.append(
                warn(
                    "connection",
                    f"{connection.name} leads to {', '.join(connection.remote_addresses)}, not to {where}: sessions "
                    "resume there, and a full handshake goes elsewhere",
                    "make remote_addrs and `gateways` name the same address",
                )
            )
        elif configured and address != configured[0]:
            findings.append(
                warn(
                    "connection",
                    f"{connection.name} to {where}: sessions resume there, but a full handshake never gets there: "
                    f"charon takes the first address of the connection only, {configured[0]}",
                    f"give {address} a connection of its own, as `NAME : connections.{connection.name} "
                    f"{{ remote_addrs = {address} }}`",
                )
            )
        else:
            findings.append(ok("connection", f"{connection.name} to {where}"))
    return findings


def _actions(connection: ConnectionInfo, charon: CharonAnswer) -> list[Finding]:
    """What charon does by itself when a gateway is dead, and the sidecar does too."""
    findings = []
    where, load = charon.where(connection.name)
    for child in connection.children:
        start = charon.proposals.option(connection.name, child.name, "start_action") or ""
        wrong = {
            "dpd_action": child.dpd_action in ("start", "restart")
            and "charon sets the session up again at the dead gateway",
            "close_action": child.close_action in ("start", "restart") and "charon opens what its gateway closed again",
        }
        for name, why in wrong.items():
            if why:
                text = f"{connection.name}.{child.name}: {name} = {getattr(child, name)}: {why}, beside the sidecar"
                value = "clear" if name == "dpd_action" else "none"
                findings.append(
                    warn(name, text, f"set {name} = {value} in {where}: the sidecar resumes the session; then {load}")
                )
        if "start" in start and charon.proposals.option(connection.name, None, "keyingtries") == "0":
            text = (
                f"{connection.name}.{child.name}: start_action = {start} with keyingtries = 0: charon tries a dead "
                "gateway without end; the sidecar ends that when the session is up elsewhere"
            )
            findings.append(warn("start_action", text, f"set keyingtries = 1 in {where}, then {load}"))
    return findings


def without_pfs(charon: CharonAnswer, names: list[str]) -> list[Finding]:
    """Children with a key exchange of their own, and connections of which that cannot be seen."""
    known = [name for name in names if name in charon.connections]
    proposals: ChildProposals = charon.proposals
    findings = []
    found = proposals.with_pfs(known)
    pfs = [f"{connection}.{child} ({group})" for (connection, child), group in found.items()]
    if pfs:
        findings.append(
            warn(
                "PFS",
                f"children with a key exchange of their own: {_some(pfs)}",
                "take the group out of esp_proposals, or accept one more round trip and a Diffie-Hellman for each",
            )
        )
    if unseen := proposals.unseen(known):
        findings.append(
            warn(
                "PFS",
                f"connections of which PFS cannot be seen: {_some(unseen)}: {proposals.path} does not have them. "
                "With PFS, their first CHILD_SA after a resumption has no key exchange of its own",
                "set `swanctl` to the file that charon is loaded from",
            )
        )
    return findings


def _some(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} others" if more > 0 else "")


def ports(config: GatewayConfig, charon: CharonAnswer) -> list[Finding]:
    """Whether the rules are about the ports that charon receives on."""
    configured = configured_ports(charon.settings)
    findings = []
    for name, port in configured.items():
        if not port:
            findings.append(
                fail(
                    "ports",
                    f"charon.{name} is 0: charon takes another port at each start, requests to which are not seen",
                    f"set charon.{name} on a gateway, and restart strongSwan",
                )
            )
        elif config.intercept.ports is not None and port not in config.intercept.ports:
            findings.append(
                fail(
                    "ports",
                    f"charon receives on port {port} (charon.{name}), which intercept.ports does not have",
                    "leave intercept.ports out, or add the port: sessions from there do not resume",
                )
            )
    return findings or [ok("ports", f"charon's ports {', '.join(map(str, configured.values()))} are intercepted")]
