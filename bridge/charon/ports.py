"""The UDP ports that charon receives IKE messages on, as strongswan.conf has them."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from bridge.charon.conf_parser import Settings
from bridge.net.packet import PORT_IKE, PORT_NAT_T

STRONGSWAN_CONF: Final = Path("/etc/strongswan.conf")
_DEFAULTS: Final = {"port": PORT_IKE, "port_nat_t": PORT_NAT_T}


def configured_ports(settings: Settings) -> dict[str, int]:
    """charon.port and charon.port_nat_t; 0 is one that the kernel chooses at each start of charon."""
    found = {}
    for name, default in _DEFAULTS.items():
        # charon-systemd reads both sections
        text = settings.get(f"charon-systemd.{name}") or settings.get(f"charon.{name}") or ""
        found[name] = int(text) if text.isdigit() else default
    return found


def charon_ports(path: Path = STRONGSWAN_CONF) -> tuple[int, ...]:
    """Those that are fixed; nothing can be said of others before charon runs."""
    return tuple(dict.fromkeys(port for port in configured_ports(Settings(path)).values() if port))
