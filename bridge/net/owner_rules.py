"""The rules that let only root speak as either end of charon's ha plugin.

charon sends the keys of each IKE_SA from one address of loopback to another, UDP port 4510, and believes what comes
back. UDP does not say which process sent a datagram, and the process that holds a port while it is read need not be the
sender. So datagrams to or from these ends are dropped unless a process of uid 0 sends them, and where they come over a
network. The rules stay when the sidecar stops: charon goes on to send, and systemd holds the sidecar's socket.
"""

from __future__ import annotations

from bridge.net.firewall import Family, Jump, Rules, View, listing

NAME = "ike-sa-sync-ha"
"""of the nftables table, and of the iptables chain for output"""
INPUT_CHAIN = "ike-sa-sync-ha-in"


def rules(addresses: tuple[str, ...], port: int) -> Rules:
    """Those for the ends `addresses`, both with this UDP port."""
    return Rules(
        name=NAME,
        chains=(NAME, INPUT_CHAIN),
        nftables=_nftables_text(addresses, port),
        iptables=lambda family, _: _iptables_text(addresses, port, family),
        jumps=(Jump("OUTPUT", "-p udp", NAME), Jump("INPUT", "-p udp", INPUT_CHAIN)),
        external="ha: {rules: external}",
    )


def present(addresses: tuple[str, ...], port: int) -> bool:
    """Whether rules for these ends are in place."""
    lines = listing(rules(addresses, port)).splitlines()
    return all(
        any(address in line and f"dport {port}" in line and ("skuid" in line or "uid-owner" in line) for line in lines)
        for address in addresses
    )


def dropped(view: View) -> int:
    """The datagrams of other users, or from a network, that were dropped."""
    return sum(count for rule, count in view.counts if rule.endswith((" drop", " DROP")))


def _nftables_text(addresses: tuple[str, ...], port: int) -> str:
    output, arriving = [], []
    for address in addresses:
        family = _family(address)
        output += [
            f"{family} {side}addr {address} udp {side}port {port} meta skuid != 0 counter drop" for side in ("d", "s")
        ]
        arriving.append(f'iifname != "lo" {family} daddr {address} udp dport {port} counter drop')
    return f"""\
table inet {NAME}
delete table inet {NAME}
table inet {NAME} {{
    chain output {{
        type filter hook output priority raw; policy accept;
        {_lines(output)}
    }}
    chain input {{
        type filter hook input priority filter + 10; policy accept;
        {_lines(arriving)}
    }}
}}
"""


def _lines(rules: list[str]) -> str:
    return "\n        ".join(rules)


def _iptables_text(addresses: tuple[str, ...], port: int, family: Family) -> str:
    lines = []
    for address in addresses:
        if _family(address) != family:
            continue
        lines += [
            f"-A {NAME} -p udp -{side} {address} --{side}port {port} -m owner ! --uid-owner 0 -j DROP"
            for side in ("d", "s")
        ]
        lines.append(f"-A {INPUT_CHAIN} ! -i lo -p udp -d {address} --dport {port} -j DROP")
    return "".join(f"{line}\n" for line in lines)


def _family(address: str) -> Family:
    return "ip6" if ":" in address else "ip"
