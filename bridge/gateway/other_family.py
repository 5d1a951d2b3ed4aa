"""A gateway's address of the other family: `address`, its name in the bank, is of one, and some of its clients know it
by the other one only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from ipaddress import ip_address

from bridge.net import address_watch


def family(address: str) -> int:
    """4 or 6."""
    return 6 if ":" in address else 4


def other_address(
    address: str, local: Iterable[str], present: Callable[[], Mapping[str, int]] = address_watch.present
) -> str:
    """That which most of its sessions have as local address (`local`); without any, the only one on the interface that
    has `address`. Empty where there is none, or no telling."""
    used = Counter(one for one in local if family(one) != family(address))
    if used:
        return min(used, key=lambda one: (-used[one], one))
    try:
        interfaces = present()
    except OSError:
        return ""
    beside = [
        one
        for one, interface in interfaces.items()
        if interface == interfaces.get(address) and family(one) != family(address) and not ip_address(one).is_link_local
    ]
    return beside[0] if len(beside) == 1 else ""
