"""`ike-sa-sync check`: is this host ready? Every finding names its fix."""

from __future__ import annotations

from bridge.charon.vpns import vpns_of
from bridge.check import bank, charon, connections, host
from bridge.check.finding import Finding, Grade
from bridge.check.guard import gateway_guard, guard
from bridge.check.return_path import return_path
from bridge.check.takeover import takeover
from bridge.config import ClientConfig, GatewayConfig

__all__ = ["Finding", "Grade", "run_checks"]


async def run_checks(config: GatewayConfig | ClientConfig) -> list[Finding]:
    """All checks for this host's role, in the order in which to fix what they find."""
    findings = host.privileges()
    running, said = await charon.ask(config)
    findings += said
    if running is not None:
        findings += charon.plugin(config, running) + charon.drop_in(config, running) + charon.unread(running)
        findings += charon.cost(config, running)
    pid = host.sidecar_pid(config)
    findings += host.sidecar(config, pid) + host.ha_rules(config) + await charon.ha_version(config)
    if isinstance(config, GatewayConfig):
        if running is not None:
            findings += connections.ports(config, running)
            findings += connections.without_pfs(running, list(running.connections))
            findings += takeover(config, running.connections)
        findings += host.queue(config, pid) + await host.match(config) + host.key_file(config) + host.hooks(config)
        findings += await bank.bank(config, running)
        if running is not None:
            pools = await bank.own_pools(config)
            findings += return_path(config, pools)
            if config.guard == "check":
                findings += gateway_guard(pools)
    elif running is not None:
        loaded = running.connections
        for vpn in vpns_of(config, lambda: loaded):
            findings += connections.of_vpn(vpn, running) + charon.patience(vpn, running)
            if config.guard == "check":
                findings += guard(vpn, running)
            findings += connections.without_pfs(running, list(dict.fromkeys(one.connection for one in vpn.gateways)))
    return findings
