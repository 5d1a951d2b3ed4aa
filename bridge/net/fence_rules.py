"""The fence: rules that keep IKE and ESP of a shared address from leaving a gateway that does not have the address.

A charon that hangs, or that did not get the order to drop its SAs in time, would go on to answer clients which are at
another gateway now; and the kernel encrypts for an address that is no longer its own.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from bridge.net.firewall import Family, Jump, Rules, View

NAME = "ike-sa-sync-fence"
"""of the nftables table, and of the iptables chain"""


def rules(addresses: Collection[str], ports: Sequence[int]) -> Rules:
    """Those for these addresses; `ports` are charon's."""
    return Rules(
        name=NAME,
        chains=(NAME,),
        nftables=_nftables_text(addresses, ports),
        iptables=lambda family, _: _iptables_text(addresses, ports, family),
        jumps=(Jump("OUTPUT", "", NAME),),
        external="takeover: {addresses: []}",
    )


def dropped(view: View) -> int:
    """The packets that were kept from leaving."""
    return sum(count for rule, count in view.counts if rule.endswith((" drop", " DROP")))


def _nftables_text(addresses: Collection[str], ports: Sequence[int]) -> str:
    lines = []
    for address in sorted(addresses):
        family = _family(address)
        sports = ", ".join(map(str, ports))
        lines.append(f"{family} saddr {address} udp sport {{ {sports} }} counter drop")
        lines.append(f"{family} saddr {address} meta l4proto esp counter drop")
    text = "\n        ".join(lines)
    return f"""\
table inet {NAME}
delete table inet {NAME}
table inet {NAME} {{
    chain output {{
        type filter hook output priority raw; policy accept;
        {text}
    }}
}}
"""


def _iptables_text(addresses: Collection[str], ports: Sequence[int], family: Family) -> str:
    lines = []
    for address in sorted(addresses):
        if _family(address) == family:
            lines += [f"-A {NAME} -p udp -s {address} --sport {port} -j DROP" for port in ports]
            lines.append(f"-A {NAME} -p esp -s {address} -j DROP")
    return "".join(f"{line}\n" for line in lines)


def _family(address: str) -> Family:
    return "ip6" if ":" in address else "ip"
