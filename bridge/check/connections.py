"""charon's connections: those that are needed, and children that cannot come up in one round trip."""

from __future__ import annotations

from pathlib import Path

from bridge.charon.conf_parser import SWANCTL_CONF, pfs_children
from bridge.check.charon import CharonAnswer
from bridge.check.finding import Finding, fail, ok, warn
from bridge.config import ClientConfig


def of_client(config: ClientConfig, charon: CharonAnswer) -> list[Finding]:
    """One for each gateway, with the same children: a session goes on under the names it had."""
    findings = []
    children: dict[str, set[str]] = {}
    for entry in config.gateways:
        connection = charon.connections.get(entry.connection)
        if connection is None:
            findings.append(
                fail(
                    "connection",
                    f"charon has no connection {entry.connection!r} (gateway {entry.address})",
                    "add it to swanctl.conf, then swanctl --load-all",
                )
            )
            continue
        children[connection.name] = {child.name for child in connection.children}
        if connection.remote_addresses and entry.address not in connection.remote_addresses:
            findings.append(
                warn(
                    "connection",
                    f"{connection.name} leads to {', '.join(connection.remote_addresses)}, not to {entry.address}",
                    "make remote_addrs and `gateways` name the same address",
                )
            )
        else:
            findings.append(ok("connection", f"{connection.name} to {entry.address}"))
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
    return findings + without_pfs(charon, [entry.connection for entry in config.gateways])


def without_pfs(charon: CharonAnswer, names: list[str], path: Path | None = None) -> list[Finding]:
    """Children with a key exchange of their own."""
    known = [name for name in names if name in charon.connections]
    found = pfs_children(known, path or SWANCTL_CONF)
    pfs = [f"{connection}.{child} ({group})" for (connection, child), group in found.items()]
    if not pfs:
        return []
    return [
        warn(
            "PFS",
            f"children with a key exchange of their own: {', '.join(pfs)}",
            "take the group out of esp_proposals, or accept one more round trip and a Diffie-Hellman for each",
        )
    ]
