"""What `check` knows of proxy ARP and proxy neighbour discovery."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridge.check.proxy_arp import without_proxy
from bridge.ike.address import Pool

FOUR = Pool("four", "10.20.1.1", 254)
SIX = Pool("six", "fd20::1", 254)


def sysctl(folder: Path, **switched: str) -> Path:
    """A folder like /proc/sys/net, where these interfaces have it on: `arp` and `ndp`."""
    for family, name in (("ipv4", "proxy_arp"), ("ipv6", "proxy_ndp")):
        for interface in ("all", "default", "lo", "eth1"):
            path = folder / family / "conf" / interface
            path.mkdir(parents=True)
            (path / name).write_text("1\n" if switched.get(name.removeprefix("proxy_")) == interface else "0\n")
    return folder


@pytest.mark.parametrize(
    ("switched", "entries", "left"),
    [
        ({}, [], [FOUR, SIX]),
        ({"arp": "eth1"}, [], [SIX]),
        ({"arp": "all"}, [], [SIX]),
        ({"arp": "default"}, [], [FOUR, SIX]),
        ({}, ["10.20.1.7"], [SIX]),
        ({}, ["10.20.2.7"], [FOUR, SIX]),
        ({"ndp": "eth1"}, [], [FOUR, SIX]),
        ({"ndp": "eth1"}, ["fd20::7"], [FOUR]),
        ({}, ["fd20::7"], [FOUR, SIX]),
    ],
)
def test_pools_that_nobody_answers_for(
    tmp_path: Path, switched: dict[str, str], entries: list[str], left: list[Pool]
) -> None:
    answered = [{"dst": address, "dev": "eth1"} for address in entries]
    assert without_proxy([FOUR, SIX], sysctl(tmp_path, **switched), lambda: answered) == left
